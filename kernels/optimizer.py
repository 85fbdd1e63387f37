"""Adam and the average of the weights in one pass over many tensors (arXiv 1412.6980, 1711.05101).

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,
    p = p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps),
    a = a + w (p - a)    with the new p; also where there is no gradient and where the step is skipped

Two launches per group of parameters, however many tensors it has. One kernel advances the tensors' step
counts and takes from them the numbers that a tensor's elements share; the other works in blocks of SIZE
elements, each of one tensor, and reads where that lies from tables on the device:

    table      int64 [7, T]: rows PARAMETER to STEP are addresses, all of float32; 0 for no average, and for
               moments that are not there yet. Then the number of elements and of the tensor's first block
    gradients  int64 [T]: addresses, 0 for no gradient; apart, because they alone move from step to step
    blocks     int32 [blocks]: the tensor of each
    numbers    float32 [3, T]: lr / (1 - b1^t), sqrt(1 - b2^t), decay

Memory of a parameter, its gradient, moments and average has one order of elements. Arithmetic is in float32
and in the order of torch's fused Adam and lerp. Where b1 is 0 the first moment is written but not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 2048  # of a block: with 4 warps, 16 elements of up to five tensors in flight per thread
TENSORS = 128  # per program of the first kernel


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, to the last digits where exp(x) is close to 1 too."""
    series = tl.full(x.shape, 1.0, tl.float32)
    for n in tl.static_range(10, 1, -1):
        series = 1.0 + x * series / n
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["count"])
def _begin_kernel(
    table_ptr,
    gradients_ptr,
    numbers_ptr,
    skip_ptr,
    lr,  # a number, or a pointer to one
    count,  # of tensors
    log_beta1,
    log_beta2,
    weight_decay,
    DECOUPLED: tl.constexpr,
    LR_IN_MEMORY: tl.constexpr,
    SIZE: tl.constexpr,
):
    t = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = t < count
    gradient = tl.load(gradients_ptr + t, mask=inside, other=0)
    updates = (gradient != 0) & (t < tl.where(tl.load(skip_ptr) == 1.0, 0, count))
    step_at = tl.load(table_ptr + 4 * count + t, mask=updates, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_at, mask=updates, other=0.0) + 1.0
    tl.store(step_at, step, mask=updates)
    rate = tl.load(lr) if LR_IN_MEMORY else lr
    decay = rate * weight_decay if DECOUPLED else weight_decay
    numbers_at = numbers_ptr + t
    tl.store(numbers_at, rate / _one_minus_exp(step * log_beta1), mask=inside)
    tl.store(numbers_at + count, tl.sqrt(_one_minus_exp(step * log_beta2)), mask=inside)
    tl.store(numbers_at + 2 * count, tl.zeros((SIZE,), tl.float32) + decay, mask=inside)


@triton.jit
def _elements(address, offset, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointer to a tensor's element; whole blocks begin at multiples of 16 bytes."""
    pointer = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + tl.multiple_of(offset, 16)


@triton.jit
def _update_block(
    parameter,
    gradient,
    first,
    second,
    average,
    offset,
    updated,  # elements whose parameter and moments change: those of the block, or none
    averaged,  # elements whose average changes
    step_size,
    correction,
    decay,
    beta1,
    beta2,
    eps,
    weight,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
):
    e = tl.arange(0, SIZE)
    if WHOLE:  # all or none: masks that are alike for all elements let 16 bytes be moved at once
        updated = tl.zeros((SIZE,), tl.int32) + updated > 0
        averaged = tl.zeros((SIZE,), tl.int32) + averaged > 0
    else:
        updated = e < updated
        averaged = e < averaged
    p_at = _elements(parameter, offset, tl.float32, WHOLE) + e
    g_at = _elements(gradient, offset, GRADIENT, WHOLE) + e
    m_at = _elements(first, offset, tl.float32, WHOLE) + e
    v_at = _elements(second, offset, tl.float32, WHOLE) + e
    a_at = _elements(average, offset, tl.float32, WHOLE) + e
    p = tl.load(p_at, mask=updated | averaged, other=0.0)
    g = tl.load(g_at, mask=updated, other=0.0).to(tl.float32)
    v = tl.load(v_at, mask=updated, other=0.0)
    a = tl.load(a_at, mask=averaged, other=0.0)

    before = p
    if DECAYS:
        if DECOUPLED:
            p -= decay * p
        else:
            g += decay * p
    m = g
    if MOMENTUM:
        m = tl.load(m_at, mask=updated, other=0.0)
        m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * (g * g)
    p -= step_size * m / (tl.sqrt(v) / correction + eps)
    p = tl.where(updated, p, before)
    away = p - a
    a = tl.where(weight < 0.5, a + weight * away, p - away * (1.0 - weight))

    tl.store(p_at, p, mask=updated)
    tl.store(m_at, m, mask=updated)
    tl.store(v_at, v, mask=updated)
    tl.store(a_at, a, mask=averaged)


@triton.jit(do_not_specialize=["count"])
def _adam_average_kernel(
    table_ptr,
    gradients_ptr,
    blocks_ptr,
    numbers_ptr,
    skip_ptr,
    weight_ptr,
    count,
    beta1,
    beta2,
    eps,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    SIZE: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(blocks_ptr + block)
    column = table_ptr + tensor
    parameter = tl.load(column)
    first = tl.load(column + count)
    second = tl.load(column + 2 * count)
    average = tl.load(column + 3 * count)
    elements = tl.load(column + 5 * count)
    offset = (block - tl.load(column + 6 * count)) * SIZE
    gradient = tl.load(gradients_ptr + tensor)
    inside = tl.minimum(elements - offset, SIZE)
    updated = tl.where((gradient == 0) | (tl.load(skip_ptr) == 1.0), 0, inside)
    averaged = tl.where(average == 0, 0, inside)
    weight = tl.load(weight_ptr)
    step_size = tl.load(numbers_ptr + tensor)
    correction = tl.load(numbers_ptr + count + tensor)
    decay = tl.load(numbers_ptr + 2 * count + tensor)
    aligned = (parameter | gradient | first | second | average) % 16 == 0
    if aligned & (inside == SIZE):
        _update_block(
            *(parameter, gradient, first, second, average, offset, updated, averaged),
            *(step_size, correction, decay, beta1, beta2, eps, weight),
            *(GRADIENT, MOMENTUM, DECAYS, DECOUPLED, True, SIZE),
        )
    else:
        _update_block(
            *(parameter, gradient, first, second, average, offset, updated, averaged),
            *(step_size, correction, decay, beta1, beta2, eps, weight),
            *(GRADIENT, MOMENTUM, DECAYS, DECOUPLED, False, SIZE),
        )


class Tables(NamedTuple):
    """Of one group; see above."""

    table: Tensor
    gradients: Tensor
    blocks: Tensor
    numbers: Tensor


class Numbers(NamedTuple):
    """Of one group, as float32 has them."""

    betas: tuple[float, float]
    log_betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    """Weight decay apart from the gradient (AdamW), or part of it."""


GRADIENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def adam_average(
    tables: Tables, lr: float | Tensor, skip: Tensor, weight: Tensor, numbers: Numbers, gradient: torch.dtype
) -> None:
    """One update of everything that the tables name.

    `lr`, a number or float32 []; `skip`, 1.0 for none; `weight` of the new parameters in the averages:
    float32 [] on the device. `gradient`: the dtype of all gradients.
    """
    count = len(tables.gradients)
    with torch.cuda.device_of(tables.table):
        _begin_kernel[(triton.cdiv(count, TENSORS),)](
            *(tables.table, tables.gradients, tables.numbers, skip, lr, count, *numbers.log_betas),
            numbers.weight_decay,
            DECOUPLED=numbers.decoupled,
            LR_IN_MEMORY=isinstance(lr, Tensor),
            SIZE=TENSORS,
        )
        if len(tables.blocks):
            _adam_average_kernel[(len(tables.blocks),)](
                *(tables.table, tables.gradients, tables.blocks, tables.numbers, skip, weight, count),
                *(*numbers.betas, numbers.eps),
                GRADIENT=GRADIENTS[gradient],
                MOMENTUM=numbers.betas[0] != 0,
                DECAYS=numbers.weight_decay != 0,
                DECOUPLED=numbers.decoupled,
                SIZE=SIZE,
            )

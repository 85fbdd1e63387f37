"""ssim as an operation that torch knows: csrc/ssim.cu and csrc/cpu/ssim.cpp.

Images [B, C, H, W] are read as they lie, in any order of memory, and a gradient lies as its image does. Where
a gradient will be wanted the forward leaves three float32 maps per image pair (csrc/ssim.h), four for both
gradients, and the backward is one pass over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vfmvae.ops import native
from vfmvae.ops.operation import Autograd, operation

DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
}
WINDOW = 11
SHARED_MAPS = 2  # P and Q; M of the images that a gradient is wanted of comes behind


def ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    recorded = torch.is_grad_enabled()
    return _ssim(a, b, data_range, recorded and a.requires_grad, recorded and b.requires_grad)[0]


def why_not_cuda(a: Tensor, b: Tensor, data_range: float) -> str | None:
    return _why_not("cuda", a, b) or native.why_no_cuda_code(a)


def why_not_cpu(a: Tensor, b: Tensor, data_range: float) -> str | None:
    return _why_not("cpu", a, b) or native.why_no_cpu_code(a)


def _why_not(name: str, a: Tensor, b: Tensor) -> str | None:
    for x in (a, b):
        if x.dtype not in DTYPES[name]:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[name])
            return f"it takes {known}, not {x.dtype}"
    if a.device != b.device:
        return f"the images are on {a.device} and {b.device}"
    if a.ndim != 4 or a.shape[1] == 0:
        return f"it takes images [B, C, H, W], not {list(a.shape)}"
    return None


def _run(a: Tensor, b: Tensor, data_range: float, of_a: bool, of_b: bool) -> tuple[Tensor, Tensor]:
    """The index [B], and what the backward needs: [M, B, C, H - 10, W - 10] with M 0, 3 or 4."""
    index, maps = _fake(a, b, data_range, of_a, of_b)
    planes = iter(maps.unbind())
    addresses = [
        next(planes).data_ptr() if wanted else 0 for wanted in (of_a or of_b, of_a or of_b, of_a, of_b)
    ]
    arguments = {
        "a": a.data_ptr(),
        "b": b.data_ptr(),
        **dict(zip(("map_p", "map_q", "map_a", "map_b"), addresses, strict=True)),
        "out": index.data_ptr(),
        "a_strides": a.stride(),
        "b_strides": b.stride(),
        **_size(a),
        "data_range": data_range,
    }
    if a.is_cuda:
        count = native.extension().ssim_partials(
            **dict(zip(("channels", "height", "width"), a.shape[1:], strict=True))
        )
        partials = torch.empty((a.shape[0], count), dtype=torch.float32, device=a.device)
        native.extension().ssim_cuda(**arguments, partials=partials.data_ptr(), **_where(a))
    else:
        native.extension().ssim_cpu(**arguments, threads=torch.get_num_threads())
    return index, maps


def _fake(a: Tensor, b: Tensor, data_range: float, of_a: bool, of_b: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = a.shape
    count = SHARED_MAPS + of_a + of_b if of_a or of_b else 0
    shape = (count, batch, channels, height - WINDOW + 1, width - WINDOW + 1)
    index = torch.empty(batch, dtype=torch.float32, device=a.device)
    return index, torch.empty(shape, dtype=torch.float32, device=a.device)


def _run_gradient(grad: Tensor, image: Tensor, other: Tensor, maps: Tensor, own: int) -> Tensor:
    """The gradient of `image` from that of the index; `own` is where its map M stands in maps."""
    out = _gradient_fake(grad, image, other, maps, own)
    grad = grad.float().contiguous()
    arguments = {
        "grad": grad.data_ptr(),
        "image": image.data_ptr(),
        "other": other.data_ptr(),
        **{name: maps[i].data_ptr() for name, i in (("map", own), ("map_p", 0), ("map_q", 1))},
        "out": out.data_ptr(),
        "image_strides": image.stride(),
        "other_strides": other.stride(),
        "out_strides": out.stride(),
        **_size(image),
    }
    if image.is_cuda:
        native.extension().ssim_gradient_cuda(**arguments, **_where(image))
    else:
        native.extension().ssim_gradient_cpu(**arguments, threads=torch.get_num_threads())
    return out


def _gradient_fake(grad: Tensor, image: Tensor, other: Tensor, maps: Tensor, own: int) -> Tensor:
    return torch.empty_like(image)


def _size(x: Tensor) -> dict[str, Any]:
    sizes = zip(("batch", "channels", "height", "width"), x.shape, strict=True)
    return {"dtype": str(x.dtype).removeprefix("torch."), **dict(sizes)}


def _where(x: Tensor) -> dict[str, int]:
    return {"device": x.device.index, "stream": torch.cuda.current_stream(x.device).cuda_stream}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, ctx.of_a, ctx.of_b = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    a, b, maps = ctx.saved_tensors
    wanted = [
        need and left for need, left in zip(ctx.needs_input_grad[:2], (ctx.of_a, ctx.of_b), strict=True)
    ]
    of_a = _ssim_gradient(grad, a, b, maps, SHARED_MAPS) if wanted[0] else None
    of_b = _ssim_gradient(grad, b, a, maps, SHARED_MAPS + ctx.of_a) if wanted[1] else None
    return of_a, of_b, None, None, None


_DEVICES = ("cpu", "cuda")
_ssim_gradient = operation("ssim_gradient", _run_gradient, _gradient_fake, _DEVICES)
_ssim = operation("ssim", _run, _fake, _DEVICES, Autograd(_setup, _backward))

"""qk_norm_rope: the reference, checks of arguments, and what the kernels need; check_qk_norm_rope.py holds
the kernels' numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import compile_triton_for_hopper, run_python
from tests.ops.agreement import assert_agrees
from vfmvae import ops

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_qk_norm_rope.py")

B, N, HEADS, D = 2, 3, 2, 4


def angles(tokens: int, width: int) -> Tensor:
    """[tokens, width], the same for both of a pair."""
    return torch.randn(tokens, width // 2).repeat_interleave(2, dim=1)


def norm_of(kind: str, biased: bool, width: int = D) -> ops.QKNorm:
    bias = torch.randn(width, dtype=torch.float64) if biased else None
    return ops.QKNorm(1 + 0.3 * torch.randn(width, dtype=torch.float64), bias, 0.1, kind)


def normed(row: Tensor, norm: ops.QKNorm) -> Tensor:
    centred = row - row.mean() if norm.kind == "layer" else row
    row = centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight
    return row if norm.bias is None else row + norm.bias


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("biased", [True, False])
def test_reference_is_the_formula_at_every_head_and_token(kind: str, biased: bool) -> None:
    qkv, angle = torch.randn(B, N, 3 * HEADS * D, dtype=torch.float64), angles(N, D).double()
    norms = norm_of(kind, biased), norm_of(kind, biased)
    results = ops.qk_norm_rope(qkv, HEADS, *norms, (angle.cos(), angle.sin()), fused=False)
    for which, result in enumerate(results):
        assert result.shape == (B, HEADS, N, D)
        for b in range(B):
            for head in range(HEADS):
                for n in range(N):
                    row = qkv[b, n].view(3, HEADS, D)[which, head]
                    if which < 2:
                        row = normed(row, norms[which])
                        pairs = torch.view_as_complex(row.view(-1, 2).contiguous())
                        turned = pairs * torch.polar(torch.ones(D // 2).double(), angle[n, ::2])
                        row = torch.view_as_real(turned).flatten()
                    torch.testing.assert_close(result[b, head, n], row)


def test_without_norm_and_rotation_they_are_parts_of_qkv() -> None:
    qkv = torch.randn(B, N, 3 * HEADS * D)
    for which, result in enumerate(ops.qk_norm_rope(qkv, HEADS, None, None)):
        expected = qkv.view(B, N, 3, HEADS, D)[:, :, which].transpose(1, 2)
        assert torch.equal(result, expected)


def test_scores_of_rotated_tokens_depend_on_their_distance() -> None:
    positions = torch.arange(6, dtype=torch.float64)
    angle = torch.outer(positions, 2.0 ** -torch.arange(2)).repeat_interleave(2, dim=1)
    same = torch.randn(3 * D, dtype=torch.float64).repeat(1, 6, 1)
    query, key, _ = ops.qk_norm_rope(same, 1, None, None, (angle.cos(), angle.sin()), fused=False)
    scores = (query @ key.mT)[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert not math.isclose(scores[0, 0], scores[0, 1], rel_tol=1e-3)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_agrees_on_the_cpu(kind: str) -> None:
    angle, norm = angles(N, D), norm_of(kind, True)

    def run(qkv: Tensor, *affine: Tensor, fused: bool) -> tuple[Tensor, ...]:
        norms = (ops.QKNorm(*affine[i : i + 2], 1e-6, kind) for i in (0, 2))
        return ops.qk_norm_rope(qkv, HEADS, *norms, (angle.cos(), angle.sin()), fused=fused)

    assert_agrees(run, [torch.randn(B, N, 3 * HEADS * D), *norm[:2], *norm_of(kind, True)[:2]])


@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_of_the_projections_dtype(autocast: bool) -> None:
    qkv, angle = torch.randn(B, N, 3 * HEADS * D).bfloat16(), angles(N, D)
    norms = [ops.QKNorm(torch.randn(D).requires_grad_(), None, 1e-6, "rms") for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = ops.qk_norm_rope(qkv, HEADS, *norms, (angle.cos(), angle.sin()))
    truth = ops.qk_norm_rope(qkv.double(), HEADS, *norms, (angle.cos(), angle.sin()), fused=False)
    for one, exact in zip(found, truth, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - exact).norm() <= 1e-2 * exact.norm()
    assert torch.autograd.grad(found[0].sum(), norms[0].weight)[0].dtype == torch.float32


def test_what_does_not_fit_is_said() -> None:
    qkv, norm = torch.randn(B, N, 3 * HEADS * D), norm_of("rms", False)
    with pytest.raises(ValueError, match=r"24 channels; they must be 3 \* 5 heads"):
        ops.qk_norm_rope(qkv, 5, None, None)
    with pytest.raises(ValueError, match=r"query_norm.weight is \[3\]"):
        ops.qk_norm_rope(qkv, HEADS, norm._replace(weight=torch.ones(3)), None)
    with pytest.raises(ValueError, match="key_norm is of kind 'batch'"):
        ops.qk_norm_rope(qkv, HEADS, None, norm._replace(kind="batch"))
    with pytest.raises(ValueError, match=r"cos is \[3, 2\].*must be \[3, 4\]"):
        ops.qk_norm_rope(qkv, HEADS, None, None, (torch.ones(N, 2), torch.ones(N, 2)))
    with pytest.raises(ValueError, match="even width, not 3"):
        ops.qk_norm_rope(torch.randn(1, N, 9), 1, None, None, (torch.ones(N, 3), torch.ones(N, 3)))
    with pytest.raises(ValueError, match=r"floating point \[B, N, 3 C\], not torch.int64"):
        ops.qk_norm_rope(qkv.long(), HEADS, None, None)


def test_the_kernels_say_what_they_do_not_take() -> None:
    qkv = torch.randn(B, N, 3 * HEADS * D)
    with pytest.raises(ValueError, match="triton.*(on cpu|not installed)"):
        ops.qk_norm_rope(qkv, HEADS, None, None, fused="triton")
    with pytest.raises(ValueError, match="not torch.float64"):
        ops.qk_norm_rope(qkv.double(), HEADS, None, None, fused="triton")
    with pytest.raises(ValueError, match="at most 512 numbers, not 600"):
        ops.qk_norm_rope(torch.randn(1, 1, 1800), 1, None, None, fused="triton")


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


@pytest.mark.parametrize(
    ("width", "kind", "element", "registers"),
    [(72, "layer", "*bf16", 168), (64, "rms", "*bf16", 168), (72, "layer", "*fp32", 240)],
)
def test_kernels_compile_for_hopper_without_spills(
    width: int, kind: str, element: str, registers: int
) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import qk_norm_rope as kernels

    tile, biased = kernels.tile_of(128, 257, 16, width), kind == "layer"
    constants = {"D": width, "HEIGHT": tile.height, "WIDTH": tile.width, "STAGES": kernels.STAGES}
    constants |= dict.fromkeys(("QUERY_KIND", "KEY_KIND"), kernels.KINDS[kind])
    constants |= dict.fromkeys(("ROTATED", "OF_VALUE", "OF_QKV", "OF_QUERY_WEIGHT", "OF_KEY_WEIGHT"), True)
    constants |= dict.fromkeys(("QUERY_BIASED", "KEY_BIASED", "OF_QUERY_BIAS", "OF_KEY_BIAS"), biased)
    floats = ("_weight_ptr", "_bias_ptr", "cos_ptr", "sin_ptr", "partials_ptr")
    for kernel in (kernels._qk_norm_rope_fwd_kernel, kernels._qk_norm_rope_bwd_kernel):
        names = [n for n in kernel.arg_names if not n.isupper()]
        signature = {n: element if n.endswith("_ptr") else "i32" for n in names}
        signature |= {n: "*fp32" for n in names if n.endswith(floats)}
        signature |= {n: "fp32" for n in names if n.endswith("_eps")}
        own = {n: c for n, c in constants.items() if n in kernel.arg_names}
        resources = compile_triton_for_hopper(kernel, signature, own)
        assert resources.spilled == 0 and resources.registers <= registers, resources
        assert resources.shared <= 32 << 10 and min(resources.wide) > 0, resources


def test_programs_cover_all_tokens_and_heads() -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels.qk_norm_rope import tile_of

    for batch, tokens, heads in ((1, 1, 1), (1, 257, 16), (128, 256, 12), (2, 33, 7)):
        tile = tile_of(batch, tokens, heads, 72)
        blocks = batch * -(-tokens // tile.height)
        assert tile.programs % blocks == 0 and tile.width == 128
        groups = tile.programs // blocks
        assert (groups - 1) * tile.heads < heads <= groups * tile.heads

"""gaussian_posterior and the noise of a seed: the formulas, the choice, what the kernels need;
check_posterior.py holds the kernels' numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.helpers import DEVICES, compile_triton_for_hopper, run_python
from tests.host_reads import host_reads
from vfmvae import ops
from vfmvae.ops import native, posterior
from vfmvae.ops.noise import philox, seeded_normal

CHECKS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/check_posterior.py")


def test_sample_and_divergence_are_those_of_a_normal_distribution() -> None:
    mean, logvar, noise = (torch.randn(3, 2, 4, 4).double() for _ in range(3))
    z, kl = ops.gaussian_posterior(mean, logvar, noise)
    distribution = Normal(mean, (0.5 * logvar).exp())
    torch.testing.assert_close(z, distribution.mean + distribution.stddev * noise)
    torch.testing.assert_close(kl, kl_divergence(distribution, Normal(0.0, 1.0)).flatten(1).sum(1))


def test_log_variance_is_clamped() -> None:
    mean, one = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    logvar = torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2)
    z, kl = ops.gaussian_posterior(mean, logvar, one)
    torch.testing.assert_close(z.flatten(), torch.tensor([-15.0, 10.0]).exp())
    assert torch.isfinite(kl).all()


def test_half_precision_is_computed_in_float32() -> None:
    mean, logvar, noise = (torch.randn(2, 3, 4, 4).bfloat16() for _ in range(3))
    z, kl = ops.gaussian_posterior(mean, logvar, noise)
    wide, truth = ops.gaussian_posterior(mean.float(), logvar.float(), noise.float())
    assert torch.equal(z, wide.bfloat16()) and torch.equal(kl, truth)


def words(text: str) -> Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_gives_the_published_words(counter: str, key: str, expected: str, device: str) -> None:
    """The known answers of philox4x32-10 in Random123, the publication's own library."""
    found = philox(words(counter).to(device)[:, None].expand(4, 3), words(key).to(device))
    assert torch.equal(found.cpu(), words(expected)[:, None].expand(4, 3))


def seed(number: int = 3, first: int = 0) -> Tensor:
    return torch.tensor([number, first])


def test_the_noise_of_a_seed_is_normal() -> None:
    noise = seeded_normal(seed(), (64, 16, 16, 16), torch.float64).flatten()
    n = noise.numel()
    # Five standard errors of each moment of n independent normal numbers.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - moment) < 5 * math.sqrt(variance / n), power
    # Kolmogorov and Smirnov's distance, exceeded once in 10,000 times.
    cdf = Normal(0.0, 1.0).cdf(noise.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max()
    assert distance < 2.2253 / math.sqrt(n)


def test_elements_images_and_seeds_are_independent() -> None:
    noise = seeded_normal(seed(), (6, 8, 16, 16))
    rows = [*noise.flatten(1), *seeded_normal(seed(4), (6, 8, 16, 16)).flatten(1)]
    rows += [*seeded_normal(seed(3 + (1 << 32)), (2, 8, 16, 16)).flatten(1)]
    # The four numbers that one counter gives.
    lanes = noise.permute(0, 2, 3, 1).reshape(-1, 4).t()
    for sequences in (torch.stack(rows), lanes):
        correlation = torch.corrcoef(sequences) - torch.eye(len(sequences))
        assert correlation.abs().max() < 5.5 / math.sqrt(sequences.shape[1])
    assert noise.unique().numel() > 0.999 * noise.numel()


def test_an_image_has_its_noise_in_every_batch() -> None:
    whole = seeded_normal(seed(5, 10), (7, 3, 5, 5))
    parts = [
        seeded_normal(seed(5, 10 + first), (count, 3, 5, 5)) for first, count in ((0, 2), (2, 1), (3, 4))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(seeded_normal(seed(5, 10 + (1 << 32)), (7, 3, 5, 5)), whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_devices_draw_the_same() -> None:
    there = seeded_normal(seed(5, 10).cuda(), (7, 3, 5, 5))
    torch.testing.assert_close(there.cpu(), seeded_normal(seed(5, 10), (7, 3, 5, 5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_seed_stands_for_its_noise(fused: bool) -> None:
    mean, logvar = (torch.randn(2, 3, 4, 4).double().requires_grad_() for _ in range(2))
    noise = seeded_normal(seed(9, 4), (2, 3, 4, 4), torch.float64)
    found = []
    for given in (seed(9, 4), noise):
        results = ops.gaussian_posterior(mean, logvar, given, fused=fused)
        found.append((*results, *torch.autograd.grad([r.sum() for r in results], (mean, logvar))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_seed_is_not_read_by_the_host() -> None:
    mean, logvar = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    given = seed()
    with host_reads() as reads:
        z, kl = ops.gaussian_posterior(mean, logvar, given)
        (z.sum() + kl.sum()).backward()
    assert reads == []


@pytest.mark.gpu
def test_a_captured_graph_draws_by_what_the_seed_holds() -> None:
    mean, logvar = (torch.randn(2, 16, 8, 8, device="cuda") for _ in range(2))
    given = seed().cuda()
    ops.gaussian_posterior(mean, logvar, given, fused="triton")  # is compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = ops.gaussian_posterior(mean, logvar, given, fused="triton")
    for number, first in ((3, 0), (4, 0), (4, 2)):
        given.copy_(seed(number, first))
        graph.replay()
        expected, _ = ops.gaussian_posterior(mean, logvar, seed(number, first).cuda(), fused="triton")
        assert torch.equal(z, expected)


def test_shapes_must_fit() -> None:
    mean = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"mean \(2, 3, 4, 4\) and logvar \(2, 3, 4, 5\) differ in shape"):
        ops.gaussian_posterior(mean, torch.zeros(2, 3, 4, 5), mean)
    for noise in (mean[:1], seed()[:1], torch.zeros(2)):
        with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4\), or an int64 seed of shape \(2,\)"):
            ops.gaussian_posterior(mean, mean, noise)
    with pytest.raises(ValueError, match=r"mean is \[2, 3, 4\]; needed is \[B, C, h, w\]"):
        ops.gaussian_posterior(mean[..., 0], mean[..., 0], seed())
    with pytest.raises(ValueError, match="mean is on cpu, noise on meta"):
        ops.gaussian_posterior(mean, mean, seed().to("meta"))


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python(*CHECKS, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


# Not marked gpu: benchmarks/gpu_suite.py runs the checks themselves.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    run_python(*CHECKS)


@pytest.mark.parametrize("channels", [16, 32, 33])
@pytest.mark.parametrize("seeded", [True, False])
def test_kernels_compile_for_hopper_without_spills(channels: int, seeded: bool) -> None:
    pytest.importorskip("triton")
    from vfmvae.kernels import posterior

    for kernel in (posterior._posterior_fwd_kernel, posterior._posterior_bwd_kernel):
        names = [n for n in kernel.arg_names if not n.isupper()]
        signature = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names}
        if seeded:
            signature["noise_ptr"] = "*i64"
        constants = {"C": channels, "SIZE": posterior.ELEMENTS, "SEEDED": seeded}
        resources = compile_triton_for_hopper(kernel, signature, constants)
        assert resources.spilled == 0 and resources.registers <= 104, resources
        assert resources.shared <= 8 * 1024, resources


def test_what_it_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(mean: Tensor, noise: Tensor) -> str:
        with pytest.raises(ValueError, match="cannot be used here") as error:
            ops.gaussian_posterior(mean, mean, noise, fused="triton")
        return str(error.value)

    x = torch.zeros(2, 3, 4, 4)
    assert "not torch.float64" in refusal(x.double(), seed())
    assert "not torch.float64" in refusal(x, x.double())
    assert "no gradient of the noise" in refusal(x, x.clone().requires_grad_())
    assert "[B, C, h, w] with elements, not [0, 3, 4, 4]" in refusal(x[:0], seed())
    large = torch.empty(1, 1 << 11, 1 << 10, 1 << 10, device="meta")
    assert "fewer than 2^31 elements of a sample" in refusal(large, seed().to("meta"))
    monkeypatch.setattr(native, "why_no_triton", lambda x: None)
    assert posterior._why_not_triton(x, x, seed()) is None

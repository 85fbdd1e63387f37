from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vfmvae import ops
from vfmvae.ops.noise import seeded_normal
from vfmvae.tokenizer.bottleneck import BottleneckConfig, DiscreteBottleneck, Posterior


def test_posterior_samples_with_noise_generator_or_mode() -> None:
    posterior = Posterior(torch.randn(2, 6, 4, 4))
    noise = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + posterior.std * noise)
    drawn = [posterior.sample(generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert torch.equal(posterior.moments[:, :3], posterior.mean)
    var = posterior.logvar.exp()
    expected = 0.5 * (posterior.mean**2 + var - 1 - posterior.logvar).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    with pytest.raises(ValueError, match="noise is .* of shape"):
        posterior.sample(noise[:1])


def test_sample_and_divergence_come_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, whole = [], ops.gaussian_posterior
    monkeypatch.setattr(ops, "gaussian_posterior", lambda *a, **k: calls.append(1) or whole(*a, **k))
    moments = 3 * torch.randn(2, 6, 4, 4)
    moments[0, 3, 0, :2] = torch.tensor([-40.0, 40.0])
    moments.requires_grad_()
    noise, weight = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    posterior = Posterior(moments)
    latents, kl = posterior.sample(noise), posterior.kl()
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad((latents * weight).sum() + 0.1 * kl.sum(), moments)
    mean, logvar = moments.double().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    expected = mean + (0.5 * logvar).exp() * noise, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    torch.testing.assert_close((latents.double(), kl.double()), expected, rtol=1e-5, atol=1e-5)
    (truth,) = torch.autograd.grad((expected[0] * weight).sum() + 0.1 * expected[1].sum(), moments)
    torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-5)


def test_divergence_has_a_graph_although_the_sample_had_none() -> None:
    moments = torch.randn(2, 6, 4, 4, requires_grad=True)
    posterior = Posterior(moments)
    with torch.no_grad():
        posterior.sample()
        assert not posterior.kl().requires_grad
    (gradient,) = torch.autograd.grad(posterior.kl().sum(), moments)
    torch.testing.assert_close(gradient[:, :3], moments[:, :3])
    torch.testing.assert_close(gradient[:, 3:], 0.5 * (moments[:, 3:].exp() - 1))
    alone = Posterior(moments)  # nothing is sampled
    assert torch.equal(alone.kl(), posterior.kl()) and alone.kl() is alone.kl()


def test_a_sample_with_a_seed_is_one_with_its_noise() -> None:
    posterior, seed = Posterior(torch.randn(2, 6, 4, 4)), torch.tensor([7, 3])
    noise = seeded_normal(seed, (2, 3, 4, 4))
    torch.testing.assert_close(posterior.sample(seed), posterior.mean + posterior.std * noise)
    with pytest.raises(ValueError, match="noise is .* of shape"):
        posterior.sample(torch.tensor([7]))


def discrete(beta: float = 0.25) -> DiscreteBottleneck:
    return DiscreteBottleneck(BottleneckConfig("discrete", codebooks=2, codes=10, beta=beta), channels=6)


def test_codes_are_the_nearest_on_the_sphere() -> None:
    bottleneck, x = discrete(), torch.randn(2, 6, 3, 2)
    posterior = bottleneck(x)
    assert posterior.indices.shape == (2, 2, 3, 2)
    for book in range(2):
        chunk = F.normalize(x[:, 3 * book : 3 * book + 3], dim=1)
        codes = F.normalize(bottleneck.codebooks[book].weight, dim=1)
        distance = (chunk[:, None] - codes[None, :, :, None, None]).norm(dim=2)  # [B, V, h, w]
        assert torch.equal(posterior.indices[:, book], distance.argmin(dim=1))
        chosen = codes[posterior.indices[:, book]].permute(0, 3, 1, 2)
        torch.testing.assert_close(posterior.codes[:, 3 * book : 3 * book + 3], chosen)
    torch.testing.assert_close(posterior.sample(), posterior.codes)
    torch.testing.assert_close(bottleneck.lookup(posterior.indices), posterior.codes)


def test_gradient_goes_straight_through_to_the_normalised_chunk() -> None:
    bottleneck = discrete()
    x = torch.randn(1, 6, 2, 2, requires_grad=True)
    weight = torch.randn(1, 6, 2, 2)
    (bottleneck(x).sample() * weight).sum().backward()
    y = x.detach().clone().requires_grad_()
    normalised = torch.cat([F.normalize(c, dim=1) for c in y.chunk(2, dim=1)], dim=1)
    (normalised * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert bottleneck.codebooks[0].weight.grad is None


def test_losses_are_the_formula() -> None:
    bottleneck, x = discrete(beta=0.3), torch.randn(2, 6, 3, 2)
    posterior = bottleneck(x)
    quantization = entropy = 0.0
    for book in range(2):
        chunk = F.normalize(x[:, 3 * book : 3 * book + 3], dim=1)
        codes = F.normalize(bottleneck.codebooks[book].weight, dim=1)
        error = (chunk - posterior.codes[:, 3 * book : 3 * book + 3]).square().mean()
        quantization += (0.3 + 1.0) * error / 2
        vectors = chunk.permute(0, 2, 3, 1).reshape(-1, 3)
        p = (-torch.cdist(vectors, codes).square() / 0.01).softmax(dim=1)
        mean = p.mean(dim=0)
        each = -(p * p.clamp_min(1e-30).log()).sum(dim=1).mean()
        entropy += (each + (mean * (mean + 1e-7).log()).sum()) / 2
    torch.testing.assert_close(posterior.quantization_loss, quantization)
    torch.testing.assert_close(posterior.entropy_loss, entropy, rtol=1e-4, atol=1e-5)


def test_usage_counts_hits_in_training_only() -> None:
    bottleneck, x = discrete(), torch.randn(4, 6, 4, 4)
    posterior = bottleneck.train()(x)
    hits = torch.bincount(posterior.indices[:, 0].flatten(), minlength=5)
    torch.testing.assert_close(bottleneck.codebooks[0].usage, 0.01 * hits)
    bottleneck.eval()(x)
    torch.testing.assert_close(bottleneck.codebooks[0].usage, 0.01 * hits)


def test_uniform_assignments_have_the_lowest_entropy_loss() -> None:
    bottleneck = DiscreteBottleneck(BottleneckConfig("discrete", codes=4), channels=4)
    bottleneck.codebooks[0].weight.data = torch.eye(4)
    spread = torch.eye(4).t().reshape(1, 4, 2, 2)
    assert bottleneck(spread).entropy_loss.item() == pytest.approx(-math.log(4), abs=1e-4)
    same = torch.eye(4)[:, :1].reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert bottleneck(same).entropy_loss.item() == pytest.approx(0.0, abs=1e-4)


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match='bottleneck.kind is "vq"; needed is one of gaussian, discrete'):
        BottleneckConfig("vq")
    for field, value, needed in (
        ("initial_logvar", math.nan, "needed is a finite number"),
        ("codebooks", 0, "it must be at least 1"),
        ("codes", 0, "it must be at least 1"),
        ("beta", -0.5, "it must be at least 0"),
        ("entropy_temperature", 0.0, "it must be positive"),
    ):
        with pytest.raises(ValueError, match=f"bottleneck.{field} is {value}; {needed}"):
            BottleneckConfig(**{field: value})
    with pytest.raises(ValueError, match="10 codes cannot be divided over 3 codebooks"):
        BottleneckConfig("discrete", codebooks=3, codes=10)
    with pytest.raises(ValueError, match="7 latent channels cannot be cut into 2"):
        DiscreteBottleneck(BottleneckConfig("discrete", codebooks=2), channels=7)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(1, 3, 2, 2, dtype=torch.int64), r"shape \(1, 3, 2, 2\); needed is \[B, 2, h, w\]"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"shape \(2, 2, 2\); needed is \[B, 2, h, w\]"),
        (torch.zeros(0, 2, 2, 2, dtype=torch.int64), r"shape \(0, 2, 2, 2\); needed"),
        (torch.zeros(1, 2, 2, 2), "dtype torch.float32; needed is an integer dtype"),
        (torch.zeros(1, 2, 2, 2, dtype=torch.bool), "dtype torch.bool; needed is an integer dtype"),
        (torch.full((1, 2, 2, 2), 5), r"indices go from 5 to 5; each codebook has the codes 0\.\.4"),
        (torch.arange(8).view(1, 2, 2, 2) - 1, "indices go from -1 to 6"),
        ([[0, 1]], r"indices must be a torch.Tensor, \[B, 2, h, w\] of integers; this is a list"),
    ],
)
def test_bad_indices_are_named(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discrete().lookup(indices)


def test_lookup_takes_the_integers_that_indices_are_stored_in() -> None:
    bottleneck, indices = discrete(), torch.randint(5, (2, 2, 3, 3))
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        assert torch.equal(bottleneck.lookup(indices.to(dtype)), bottleneck.lookup(indices))


def test_a_generator_draws_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, randn, devices = Posterior(torch.randn(2, 8, 2, 2, device="meta")), torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *a, **k: devices.append(str(k["device"])) or randn(*a, **k))
    assert posterior.sample(generator=torch.Generator("cpu")).device.type == "meta"
    assert posterior.sample().device.type == "meta"
    assert devices == ["cpu", "meta"]


def test_variance_and_deviation_are_those_of_the_normal_distribution() -> None:
    posterior = Posterior(torch.randn(2, 8, 2, 2))
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    torch.testing.assert_close(posterior.var, normal.variance)
    torch.testing.assert_close(
        posterior.kl(),
        torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3)),
    )

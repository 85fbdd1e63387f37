"""The step's forward is the tokenizer's own, cut at the latents."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tokenizer.tiny import tiny_tokenizer
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.equivariance import Equivariance, transform_images, transform_latents
from vfmvae.training.forward import Snapshot, TrainingForward


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tiny_tokenizer().train()


def images_and_noise(tokenizer: Tokenizer, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    side = size // tokenizer.config.downsample
    return torch.rand(2, 3, size, size) * 2 - 1, torch.randn(2, tokenizer.config.latent_channels, side, side)


def test_it_computes_what_the_tokenizer_computes(tokenizer: Tokenizer) -> None:
    images, noise = images_and_noise(tokenizer)
    output = TrainingForward(tokenizer)(images, noise, Equivariance(), align=True)
    posterior = tokenizer.encode(images)
    latents = posterior.mode() + posterior.logvar.mul(0.5).exp() * noise
    torch.testing.assert_close(output.latents, latents)
    torch.testing.assert_close(output.images[0], tokenizer.decode(latents))
    assert [image.shape[-1] for image in output.images] == [64, 32, 16, 8, 4, 2]
    assert torch.equal(output.targets, images)
    assert output.alignment is not None and output.preservation is None
    features = tokenizer.encoder(images).layers
    torch.testing.assert_close(output.alignment, tokenizer.alignment_loss(latents, features))


def test_the_graph_is_cut_at_the_latents(tokenizer: Tokenizer) -> None:
    output = TrainingForward(tokenizer)(*images_and_noise(tokenizer), Equivariance(), align=False)
    assert output.alignment is None
    assert torch.equal(output.leaf, output.latents) and output.leaf.is_leaf
    output.images[0].sum().backward()
    assert output.leaf.grad is not None
    assert all(p.grad is None for p in tokenizer.fusion.parameters())
    output.latents.backward(output.leaf.grad)
    assert all(p.grad is not None for p in tokenizer.fusion.parameters())


def test_targets_and_latents_change_alike(tokenizer: Tokenizer) -> None:
    change = Equivariance(latent_scale=0.5, rotation=90)
    images, noise = images_and_noise(tokenizer, 128)
    output = TrainingForward(tokenizer)(images, noise, change, align=False)
    assert torch.equal(output.targets, transform_images(images, change))
    assert output.images[0].shape == output.targets.shape
    torch.testing.assert_close(output.images[0], tokenizer.decode(transform_latents(output.latents, change)))


@pytest.mark.parametrize("with_encoder", [True, False])
def test_a_snapshot_stays_where_it_was(tokenizer: Tokenizer, with_encoder: bool) -> None:
    parts = (tokenizer.fusion, tokenizer.bottleneck, *([tokenizer.encoder] if with_encoder else []))
    snapshot, forward = Snapshot(*copy.deepcopy(parts)), TrainingForward(tokenizer)
    images, noise = images_and_noise(tokenizer)
    before = tokenizer.encode(images).mode().detach()
    assert forward(images, noise, Equivariance(), False, snapshot).preservation == 0
    with torch.no_grad():
        tokenizer.last_fusion_weight.add_(0.1)
        if with_encoder:
            for parameter in tokenizer.encoder.parameters():
                parameter.mul_(1.1)
    output = forward(images, noise, Equivariance(), False, snapshot)
    distance = (tokenizer.encode(images).mode() - before).square().mean()
    torch.testing.assert_close(output.preservation, distance)
    assert distance > 0
    output.preservation.backward()
    assert all(p.grad is None and not p.requires_grad for p in snapshot.parameters())
    assert tokenizer.last_fusion_weight.grad is not None


def test_a_snapshot_beside_a_frozen_encoder_does_not_run_it_again(tokenizer: Tokenizer) -> None:
    snapshot = Snapshot(copy.deepcopy(tokenizer.fusion), copy.deepcopy(tokenizer.bottleneck))
    runs: list[int] = []
    tokenizer.encoder.register_forward_hook(lambda *call: runs.append(1))
    TrainingForward(tokenizer)(*images_and_noise(tokenizer), Equivariance(), False, snapshot)
    assert len(runs) == 1


def test_reconstructing_is_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    images, _ = images_and_noise(tokenizer)
    expected = tokenizer.decode(tokenizer.encode(images).mode())
    torch.testing.assert_close(TrainingForward(tokenizer).reconstruct(images), expected)

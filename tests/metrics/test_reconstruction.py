"""PSNR against its definition, SSIM against scikit-image, the perceptual distance handed to its network."""

from __future__ import annotations

import math

import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity

from vfmvae.images import to_unit
from vfmvae.metrics.reconstruction import lpips, psnr, ssim


def test_psnr_of_constant_errors_is_known_and_per_image() -> None:
    target = torch.zeros(3, 3, 8, 8)
    prediction = torch.stack([torch.full((3, 8, 8), error) for error in (2.0, 0.2, 0.02)])
    # The range is 2, so an error of 2 / 10^k everywhere gives 20 k dB.
    assert psnr(prediction, target).tolist() == pytest.approx([0.0, 20.0, 40.0], abs=1e-5)


def test_psnr_is_the_same_in_the_usual_range() -> None:
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    ours = psnr(a * 2 - 1, b * 2 - 1)
    usual = [
        10 * math.log10(1 / float((x.double() - y.double()).square().mean()))
        for x, y in zip(a, b, strict=True)
    ]
    assert ours.tolist() == pytest.approx(usual, rel=1e-6)


def test_equal_images_have_infinite_psnr_and_ssim_one() -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert psnr(images, images).tolist() == [math.inf, math.inf]
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])


def test_psnr_refuses_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) and target \(2, 3, 8, 8\) differ in shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_ssim_is_that_of_scikit_image() -> None:
    photograph = torch.from_numpy(data.astronaut()[100:164, 180:260].copy()).permute(2, 0, 1)
    noisy = (photograph + torch.randn(photograph.shape) * 20).clamp(0, 255).to(torch.uint8)
    images = torch.stack([photograph, noisy])
    distorted = torch.stack([noisy, photograph // 2])
    ours = ssim(to_unit(distorted), to_unit(images))
    for value, a, b in zip(ours, distorted, images, strict=True):
        _, values = structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        # An 11 x 11 window that fits inside the image: the outer 5 pixels have no value of their own.
        assert value.item() == pytest.approx(values[:, 5:-5, 5:-5].mean(), abs=1e-6)


def test_lpips_is_the_networks_distance_per_pair_without_a_graph() -> None:
    scale = torch.tensor(3.0, requires_grad=True)

    def network(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return scale * (prediction - target).abs().flatten(1).mean(dim=1)

    prediction = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.5)]).requires_grad_()
    distance = lpips(prediction, torch.zeros(2, 3, 4, 4), network)
    assert distance.tolist() == [0.0, 1.5]
    assert not distance.requires_grad
    with pytest.raises(ValueError, match="differ in shape"):
        lpips(prediction, torch.zeros(1, 3, 4, 4), network)

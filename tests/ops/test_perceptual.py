from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from vfmvae import ops


@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_ssim_equals_scikit_image(size: tuple[int, int]) -> None:
    image = astronaut()[: size[0], : size[1]].astype(np.float64) / 127.5 - 1
    noisy = np.clip(image + 0.2 * np.random.default_rng(0).standard_normal(image.shape), -1, 1)
    expected, full = structural_similarity(
        image, noisy, data_range=2, channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (image, noisy))
    inside = full[5:-5, 5:-5].mean()  # where the 11 x 11 window fits; scikit-image crops the same frame
    assert ops.ssim(a, b).item() == pytest.approx(inside, abs=1e-10)
    assert ops.ssim(a, b).item() == pytest.approx(expected, abs=1e-10)
    assert ops.ssim(a, a).item() == pytest.approx(1.0)


def test_small_and_unequal_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ops.ssim(torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 8, 64))
    with pytest.raises(ValueError, match="differ in shape"):
        ops.ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))

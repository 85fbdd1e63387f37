"""Standard normal numbers as a function of (seed, image, element), without a state.

Philox4x32-10 (Salmon et al., SC 2011) turns a counter of four words of 32 bits and a key of two into four
random words. Here the key is the seed's 64 bits, and the counter is the number of four elements (low, high)
and the image's place in the global batch (low, high). So an image gets the same noise in whatever batch it
comes, on every device, up to the rounding of log, cos and sin, and again when it is computed a second time.
kernels/posterior.py computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of the counter's words 0 and 2
STEPS = (0x9E3779B9, 0xBB67AE85)  # of the key, from round to round: golden ratio and sqrt(3) - 1
WORD = 0xFFFFFFFF


def is_seed(noise: Tensor) -> bool:
    """Whether it stands for noise: int64 [2], a random number and the first image's place in the global
    batch."""
    return noise.dtype == torch.int64


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Random words [4, ...] from counters [4, ...] and a key [2]; words are int64 from 0 to 2^32 - 1."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        # The 64 bits of a product are right, though torch takes the first for its sign.
        first, second = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1 = ((second >> 32) & WORD) ^ x1 ^ key0, second & WORD
        x2, x3 = ((first >> 32) & WORD) ^ x3 ^ key1, first & WORD
        key0, key1 = (key0 + STEPS[0]) & WORD, (key1 + STEPS[1]) & WORD
    return torch.stack([x0, x1, x2, x3])


def seeded_normal(seed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise for images from seed[1] on, [B, C, h, w] in channels-last memory.

    Elements are counted position by position, the channels of one after another.

    Args:
        seed: int64 [2], on the device of the result; it is not read by the host.
        shape: B, C, h, w.
    """
    batch, channels, height, width = shape
    device, elements = seed.device, channels * height * width
    block = torch.arange(-(-elements // 4), device=device).expand(batch, -1)
    image = (seed[1] + torch.arange(batch, device=device)[:, None]).expand_as(block)
    counter = torch.stack([block, torch.zeros_like(block), image & WORD, (image >> 32) & WORD])
    key = torch.stack([seed[0] & WORD, (seed[0] >> 32) & WORD])
    radius, angle = philox(counter, key).view(2, 2, *block.shape).unbind(1)  # [2, B, blocks] each
    # Box and Muller (1958): two normal numbers from two words. The first is rounded here as in the kernel.
    radius = (radius.float() * 2.0**-32 + 2.0**-33).double().log().mul(-2.0).sqrt()
    angle = (angle.double() + 0.5) * (2 * math.pi / 2**32)
    numbers = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)  # [2, 2, B, blocks]
    numbers = numbers.flatten(0, 1).permute(1, 2, 0).flatten(1)[:, :elements].to(dtype)
    return numbers.view(batch, height, width, channels).permute(0, 3, 1, 2)

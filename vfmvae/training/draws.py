"""Every random number of a step as a function of (seed, step, stream, call, position in the global batch).

One process, several processes and gradient accumulation therefore see the same numbers for the same image,
and a resumed run draws what it would have drawn: there is no generator state to store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


class StepDraws:
    """The draws of one step for images `first` to `first + count` of a global batch of `total` images.

    The n-th call on one object is the n-th substream, so every process, and every part of an accumulated
    batch, must make the same calls in the same order on an object of its own. `stream` separates users of one
    step that do not know how often the other one draws.

    A batch is drawn whole and cut, on the CPU by numpy's Philox, on CUDA by the device's own generator:
    neither waits for the other, but the numbers differ between the two (and between models of GPU, whose
    generator splits a tensor differently).
    """

    def __init__(
        self, seed: int, step: int, device: torch.device, first: int, count: int, total: int, stream: int = 0
    ) -> None:
        if min(seed, step, stream) < 0:
            raise ValueError(
                f"seed {seed}, step {step} and stream {stream} name random numbers; none may be negative"
            )
        if not 0 <= first <= first + count <= total:
            raise ValueError(f"images {first} to {first + count} lie outside of a batch of {total}")
        self._seed, self._step, self._stream = seed, step, stream
        self._device = device
        self._rows = slice(first, first + count)
        self._total = total
        self._calls = 0

    def normal(self, shape_per_image: Sequence[int]) -> Tensor:
        """Standard normal numbers [count, *shape_per_image], float32, on the device."""
        return self._drawn("normal", (self._total, *shape_per_image))[self._rows]

    def uniform(self, shape_per_image: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1), [count, *shape_per_image], float32, on the device."""
        return self._drawn("uniform", (self._total, *shape_per_image))[self._rows]

    def uniform_of_batch(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1) that the whole batch shares, [count], float32, on the device."""
        return self._drawn("uniform", (count,))

    def seed(self) -> Tensor:
        """Of noise that is made where it is used (`vfmvae.ops.noise`): int64 [2] on the device.

        A random number, the same on every device, and the place of the first image, so that an image gets
        the same noise in every batch and part.
        """
        number = int(self._next_call().random_raw())
        seed = torch.empty(2, dtype=torch.int64, device=self._device)
        seed[0].fill_(number - (number >> 63 << 64))  # the same 64 bits with a sign
        seed[1].fill_(self._rows.start)
        return seed

    def decisions(self, count: int) -> list[float]:
        """Uniform numbers in [0, 1) for what the shapes of a step's tensors depend on: plain numbers, the
        same in every process and on every device.
        """
        return np.random.Generator(self._next_call()).random(count).tolist()

    def again(self, call: int, method: str, arguments: tuple[Any, ...]) -> Tensor:
        """What a method's call number `call` (0 for the first) on an object like this one gives."""
        self._calls = call
        return getattr(self, method)(*arguments)

    def _drawn(self, law: Literal["normal", "uniform"], shape: tuple[int, ...]) -> Tensor:
        philox = self._next_call()
        if self._device.type == "cuda":
            # Made here and not with the object: a generator cannot be made while a CUDA graph is captured.
            generator = torch.Generator(self._device).manual_seed(philox.random_raw())
            draw = torch.randn if law == "normal" else torch.rand
            return draw(shape, generator=generator, device=self._device)
        numpy = np.random.Generator(philox)
        draw_on_host = numpy.standard_normal if law == "normal" else numpy.random
        return torch.from_numpy(draw_on_host(shape, dtype=np.float32)).to(self._device)

    def _next_call(self) -> np.random.Philox:
        """A generator of its own for this call.

        Philox (Salmon et al., SC 2011) turns (key, counter) into bits. The call, stream and step are the
        upper words of the 256-bit counter, and drawing advances the lowest, so streams never overlap. torch's
        CPU generator would not do: it uses 32 bits of its seed, so streams of a long run would meet.
        """
        counter = np.array([0, self._calls, self._stream, self._step], dtype=np.uint64)
        self._calls += 1
        return np.random.Philox(counter=counter, key=self._seed)


class Draw(NamedTuple):
    """One call on a `StepDraws`, and what it gave."""

    method: str
    arguments: tuple[Any, ...]
    numbers: Tensor


class StandingDraws(StepDraws):
    """Draws that stay where they were made first, for a step that is recorded and replayed.

    The first object draws, those of later steps give the same tensors: `renew` fills them anew before.
    """

    def __init__(self, made: dict[int, Draw], *where: Any) -> None:
        """`made`: by call, kept by who records the step; `where`: arguments of StepDraws."""
        super().__init__(*where)
        self._made = made

    def normal(self, shape_per_image: Sequence[int]) -> Tensor:
        return self._standing("normal", tuple(shape_per_image))

    def uniform(self, shape_per_image: Sequence[int]) -> Tensor:
        return self._standing("uniform", tuple(shape_per_image))

    def uniform_of_batch(self, count: int) -> Tensor:
        return self._standing("uniform_of_batch", count)

    def seed(self) -> Tensor:
        return self._standing("seed")

    def _standing(self, method: str, *arguments: Any) -> Tensor:
        call = self._calls
        if call not in self._made:
            self._made[call] = Draw(method, arguments, getattr(super(), method)(*arguments))
            return self._made[call].numbers
        made = self._made[call]
        if made[:2] != (method, arguments):
            raise RuntimeError(
                f"draw {call} of stream {self._stream} is {method}{arguments} in this step and was"
                f" {made.method}{made.arguments} in an earlier one: a recorded step draws the same each time"
            )
        self._calls += 1
        return made.numbers


def renew(made: dict[int, Draw], draws: StepDraws) -> None:
    """Fill what a `StandingDraws` made with the numbers of another step."""
    for call, draw in made.items():
        draw.numbers.copy_(draws.again(call, draw.method, draw.arguments))

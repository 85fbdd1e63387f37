"""When a loss counts: a factor for its weight, as a function of the images seen so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSchedule:
    """On from `start`, at full strength `ramp` images later, and off from `end`.

    All in images seen, so a schedule does not depend on the batch size.
    """

    start: int = 0
    end: int | None = None
    """None: never ends."""
    ramp: int = 0
    """Images over which the factor rises linearly from 0 to 1; 0: at once."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.ramp < 0:
            raise ValueError(f"schedule: start {self.start} and ramp {self.ramp} must not be negative")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"schedule: end {self.end} must lie after start {self.start}")

    def factor(self, seen_images: int) -> float:
        """What to multiply the weight by, in [0, 1]; at 0 the loss need not be computed.

        0                        before start
        (seen - start) / ramp    while it rises, so still 0 at start itself
        1                        then
        0                        from end on, risen or not
        """
        if seen_images < self.start or (self.end is not None and seen_images >= self.end):
            return 0.0
        if seen_images >= self.start + self.ramp:
            return 1.0
        return (seen_images - self.start) / self.ramp

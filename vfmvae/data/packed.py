"""Many strings in three arrays: a million names cost their letters and 16 bytes each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class PackedStrings:
    """Strings as UTF-8, one after the other: text uint8 [bytes], starts and ends int64 [N]."""

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.text = text
        self.starts = starts
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        encoded = [os.fsencode(string) for string in strings]
        ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        return cls.split(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @classmethod
    def split(cls, text: np.ndarray, ends: np.ndarray) -> PackedStrings:
        """Strings that fill `text` without a gap."""
        return cls(text, np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]]), ends)

    @classmethod
    def concatenate(cls, packs: Sequence[PackedStrings]) -> PackedStrings:
        shifts = np.cumsum([0, *(len(pack.text) for pack in packs)])
        empty = np.zeros(0, np.int64)
        return cls(
            np.concatenate([np.zeros(0, np.uint8), *(pack.text for pack in packs)]),
            np.concatenate([empty, *(p.starts + shift for p, shift in zip(packs, shifts, strict=False))]),
            np.concatenate([empty, *(p.ends + shift for p, shift in zip(packs, shifts, strict=False))]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self.text[self.starts[number] : self.ends[number]].tobytes())

    def __iter__(self) -> Iterator[str]:
        text = self.text.tobytes()
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield os.fsdecode(text[start:end])

    def take(self, rows: np.ndarray) -> PackedStrings:
        """The strings of these numbers; the text is shared."""
        return PackedStrings(self.text, self.starts[rows], self.ends[rows])

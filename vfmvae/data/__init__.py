"""Images for training and evaluation: uint8 batches by position, from photographs or folders."""

from __future__ import annotations

from vfmvae.data.images import ImageFolder, open_data
from vfmvae.data.photographs import Photographs
from vfmvae.data.source import ImageBatch, ImageSource, Split, validation_batches

__all__ = [
    "ImageBatch",
    "ImageFolder",
    "ImageSource",
    "Photographs",
    "Split",
    "open_data",
    "validation_batches",
]

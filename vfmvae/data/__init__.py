"""Images for training and evaluation: uint8 batches by position, from photographs or folders."""

from __future__ import annotations

from vfmvae.data.images import ImageFolder, open_data
from vfmvae.data.loader import Request, load_batches, worker_deaths
from vfmvae.data.photographs import Photographs
from vfmvae.data.source import ImageBatch, ImageSource, Split, validation_batches

__all__ = [
    "ImageBatch",
    "ImageFolder",
    "ImageSource",
    "Photographs",
    "Request",
    "Split",
    "load_batches",
    "open_data",
    "validation_batches",
    "worker_deaths",
]

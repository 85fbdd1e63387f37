"""Images for training and evaluation: uint8 batches by position; photographs, drawn ones or stored ones."""

from __future__ import annotations

from vfmvae.data.formats import open_data, open_samples
from vfmvae.data.images import Images
from vfmvae.data.latents import Latents
from vfmvae.data.loader import Backend, ImageLoader, LatentLoader, choose_backend, load_batches
from vfmvae.data.photographs import Photographs
from vfmvae.data.samples import Fault, SampleError, Samples
from vfmvae.data.scenes import Scenes
from vfmvae.data.shapes import Shapes
from vfmvae.data.source import ImageBatch, ImageSource, Request, Split, validation_batches
from vfmvae.data.workers import worker_deaths

__all__ = [
    "Backend",
    "Fault",
    "ImageBatch",
    "ImageLoader",
    "ImageSource",
    "Images",
    "LatentLoader",
    "Latents",
    "Photographs",
    "Request",
    "SampleError",
    "Samples",
    "Scenes",
    "Shapes",
    "Split",
    "choose_backend",
    "load_batches",
    "open_data",
    "open_samples",
    "validation_batches",
    "worker_deaths",
]

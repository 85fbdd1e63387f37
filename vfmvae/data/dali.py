"""Training batches decoded and cut by NVIDIA DALI: on the GPU with nvJPEG, or by its threads on the CPU.

Worker processes read the bytes, look at the headers and draw the windows (`Images.encoded`), by the same
positions as everywhere; DALI decodes what the window needs of each image, resizes it with the same Lanczos
filter and mirrors it. DALI's own readers are not used: they shuffle within a buffer and cannot be put at a
position, and one damaged file ends them.

On a CPU the pictures are Pillow's but for half a grey level on average (tests/data/test_dali.py). What DALI
would not decode alike (CMYK, 16 bits, palettes, turned photographs) Pillow decodes beforehand, and a batch
that DALI refuses is read by Pillow, which says which image is to blame.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Generator, Iterable
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vfmvae.data.images import EncodedBatch, Images
from vfmvae.data.source import ImageBatch, ImageSource, Request
from vfmvae.data.transforms import Window
from vfmvae.data.workers import read_ahead

LOBES = 3  # of the Lanczos filter, to each side
MOST_THREADS = 8  # of a process; a machine may run one per GPU


class _Piece(NamedTuple):
    """A batch before decoding, and what asked for it."""

    request: Request
    batch: EncodedBatch


def why_not(source: ImageSource, device: torch.device) -> str | None:
    """What speaks against DALI here."""
    if not isinstance(source, Images):
        return "embedded photographs and drawn images are made in memory, and nothing is decoded"
    if source.split != "train":
        return "held-out images are cut as ADM does it, which DALI has no filters for"
    if device.type not in ("cpu", "cuda"):
        return f"it does not know the device {device}"
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:  # no package nvidia at all
        found = None
    return None if found else 'the package nvidia-dali is not installed: pip install "vfmvae[dali]"'


def load_batches(
    source: Images, batch_size: int, requests: Iterable[Request], workers: int, device: torch.device
) -> Generator[ImageBatch, None, None]:
    """The batches that are asked for, in this order, their images on `device`.

    DALI decodes a batch while the one before it is used. Close it where it is not read to its end. Raises as
    vfmvae.data.loader.load_batches does.
    """
    decoder = _Decoder(source.resolution, batch_size, device)
    with closing(read_ahead(partial(_read, source, batch_size), requests, workers)) as pieces:
        before: _Piece | None = None
        for piece in pieces:
            done = None if before is None else _finish(decoder, source, before)
            decoder.begin(piece.batch)
            before = piece
            if done is not None:
                yield done
        if before is not None:
            yield _finish(decoder, source, before)


def _read(source: Images, batch_size: int, asked: Request) -> _Piece:
    return _Piece(asked, source.encoded(asked.number, batch_size, asked.crops))


def _finish(decoder: _Decoder, source: Images, piece: _Piece) -> ImageBatch:
    """The batch that was begun with this piece; by Pillow if DALI cannot decode all of it."""
    asked, encoded = piece
    try:
        images = decoder.end()
    except RuntimeError as error:
        batch = source.batch(asked.number, decoder.batch_size, asked.crops)
        if not batch["faults"]:
            warnings.warn(f"DALI could not decode a batch that Pillow can: {_cause(error)}", stacklevel=2)
        batch["image"] = batch["image"].to(decoder.device)
        return batch
    return {
        "image": images,
        "label": encoded.label,
        "key": encoded.key,
        "number": encoded.number,
        "faults": encoded.faults,
    }


class _Decoder:
    """A DALI pipeline for batches of one size, one at a time; made anew after an error, which breaks it."""

    def __init__(self, resolution: int, batch_size: int, device: torch.device) -> None:
        self.resolution = resolution
        self.batch_size = batch_size
        self.device = device
        self._pipeline: Any = None
        self._refused: RuntimeError | None = None  # by the pipeline when the batch was begun
        self._held: tuple[Any, torch.cuda.Event] | None = None

    def begin(self, batch: EncodedBatch) -> None:
        """Start decoding; errors are raised by `end`."""
        if self._pipeline is None:
            self._pipeline = _build(self.resolution, self.batch_size, self.device)
        areas = [
            _area(w, shape, self.resolution) for w, shape in zip(batch.windows, batch.shapes, strict=True)
        ]
        images = batch.data.numpy()
        ends = np.cumsum(batch.sizes)
        inputs: dict[str, list[np.ndarray]] = {
            "encoded": [images[end - size : end] for end, size in zip(ends, batch.sizes, strict=True)],
            **{name: [getattr(area, name) for area in areas] for name in _Area._fields},
        }
        try:
            for name, values in inputs.items():
                self._pipeline.feed_input(name, values)
            self._pipeline.schedule_run()
        except RuntimeError as error:
            self._refused = error

    def end(self) -> Tensor:
        """uint8 [B, 3, R, R] in channels-last memory, of the batch that was begun.

        RuntimeError where DALI fails.
        """
        refused, self._refused = self._refused, None
        try:
            if refused is not None:
                raise refused
            (found,) = self._pipeline.outputs()
        except RuntimeError:
            self._pipeline = None
            raise
        return self._copy(found).permute(0, 3, 1, 2)

    def _copy(self, found: Any) -> Tensor:
        """DALI's batch [B, R, R, 3] in memory of our own: its own is used again as soon as it is let go."""
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(found.as_array()))
        if self._held is not None:
            self._held[1].synchronize()  # of the batch before: long done
        copied = torch.from_dlpack(found.as_tensor()).clone()
        event = torch.cuda.Event()
        event.record()
        self._held = found, event
        return copied


class _Area(NamedTuple):
    """What a window needs of an image, as the pipeline takes it; (y, x) each."""

    anchor: np.ndarray  # int32: where decoding begins
    shape: np.ndarray  # int32: how much is decoded
    low: np.ndarray  # float32: the window in what was decoded; mirrored, its right end comes first
    high: np.ndarray


def _area(window: Window, shape: tuple[int, int], resolution: int) -> _Area:
    """The window with what the Lanczos filter reads beyond it, as far as there is any."""
    left, top, side, mirrored = window
    width, height = shape
    right, bottom = min(left + side, width), min(top + side, height)
    reach = LOBES * max(side / resolution, 1.0) + 1
    x0, y0 = max(0, math.floor(left - reach)), max(0, math.floor(top - reach))
    x1, y1 = min(width, math.ceil(right + reach)), min(height, math.ceil(bottom + reach))
    first, last = (right - x0, left - x0) if mirrored else (left - x0, right - x0)
    return _Area(
        np.array([y0, x0], np.int32),
        np.array([y1 - y0, x1 - x0], np.int32),
        np.array([top - y0, first], np.float32),
        np.array([bottom - y0, last], np.float32),
    )


def _build(resolution: int, batch_size: int, device: torch.device) -> Any:
    """The pipeline, ready to run; ValueError where DALI does not start on this machine."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    options: dict[str, Any] = (
        {"device": "mixed", "jpeg_fancy_upsampling": True} if on_gpu else {"device": "cpu"}
    )

    @pipeline_def
    def decode_and_cut() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        anchor, shape = (
            fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("anchor", "shape")
        )
        low, high = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("low", "high"))
        part = fn.decoders.image_slice(
            encoded,
            anchor,
            shape,
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=False,  # only upright images come here, by Pillow's reading of their EXIF
            **options,
        )
        return fn.resize(
            part,
            size=[resolution, resolution],
            roi_start=low,
            roi_end=high,
            roi_relative=False,
            interp_type=types.INTERP_LANCZOS3,
            antialias=True,
        )

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    number = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    try:
        pipeline = decode_and_cut(
            batch_size=batch_size, num_threads=threads, device_id=number, prefetch_queue_depth=1
        )
        pipeline.build()
    except RuntimeError as error:
        raise ValueError(
            f"DALI does not start here ({_cause(error)}); choose the data backend torch"
        ) from error
    return pipeline


def _cause(error: RuntimeError) -> str:
    """The part of DALI's report that says what happened, without its traceback."""
    before, found, after = str(error).partition("encountered:")
    lines = [line.strip() for line in (after if found else before).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"

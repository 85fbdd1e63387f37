"""Which format a data set has, by its path."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from vfmvae.data.drawn import Drawn
from vfmvae.data.folder import open_folder
from vfmvae.data.huggingface import is_dataset, open_dataset
from vfmvae.data.images import Images
from vfmvae.data.latent_folder import MANIFEST
from vfmvae.data.photographs import Photographs
from vfmvae.data.samples import Part, Samples
from vfmvae.data.scenes import Scenes
from vfmvae.data.shapes import Shapes
from vfmvae.data.source import ImageSource, Split, check_split_and_resolution
from vfmvae.data.webdataset import is_shards, open_shards

DRAWN: Mapping[str, type[Drawn]] = {source.name: source for source in (Scenes, Shapes)}
"""Names that stand for drawn images; a folder called so is `./scenes` or `./shapes`."""


def open_samples(path: str, part: Part) -> Samples:
    """The stored images at `path`: a Hugging Face data set, tar shards, or a folder of image files.

    Shards without an index are read once, with a progress bar on a terminal. ValueError where there is
    nothing of the kind, or nothing for `part`.
    """
    if path in DRAWN and not Path(path).exists():
        raise ValueError(f"{path} are drawn as they are needed; no images are stored")
    if (Path(path) / MANIFEST).is_file() and any(Path(path).glob("*.safetensors")):
        raise ValueError(
            f"{path} holds latents; describe them with vfmvae latents info {path}, and train on them with"
            f" vfmvae train_diffusion --latents {path}"
        )
    if is_dataset(path):
        return open_dataset(path, part)
    from rich.console import Console  # not needed by those who read batches alone
    from rich.progress import Progress

    console = Console(stderr=True)
    if not is_shards(path):
        with console.status(f"listing {path}") if console.is_terminal else nullcontext():
            return open_folder(Path(path), part)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("indexing shards", total=None, visible=False)
        return open_shards(
            path, part, lambda done, total: bar.update(task, completed=done, total=total, visible=True)
        )


def open_data(path: str | None, split: Split, resolution: int, seed: int = 0) -> ImageSource:
    """The embedded photographs for None, drawn images for a name of `DRAWN`, else the data set at `path`
    (`open_samples`).
    """
    if path is None:
        return Photographs(split, resolution, seed)
    if path in DRAWN:
        return DRAWN[path](split, resolution, seed)
    check_split_and_resolution(split, resolution)
    return Images(open_samples(path, split), resolution, split, seed)

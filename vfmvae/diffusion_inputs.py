"""Where a diffusion run's latents come from: a folder of them, or images that are encoded in every step.

Both give batches by number, so a run resumes by its step, and turn a batch into `DiffusionInputs`. Latents
are a tokenizer's own here; the model normalises them.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vfmvae.data import (
    Fault,
    ImageBatch,
    Images,
    Latents,
    Request,
    choose_backend,
    load_batches,
    open_data,
    validation_batches,
)
from vfmvae.data.latent_folder import check_shards, read_manifest
from vfmvae.data.latents import LatentBatch
from vfmvae.data.loader import load_latents
from vfmvae.diffusion_config import DiffusionConfig
from vfmvae.encoders import FrozenEncoder, build_encoder
from vfmvae.images import to_unit
from vfmvae.tokenizer import Posterior, Tokenizer
from vfmvae.tokenizer.files import load_tokenizer, tokenizer_hash
from vfmvae.training.diffusion_forward import DiffusionInputs
from vfmvae.training.distributed import first_rank_first, local_rank, mean_over_ranks, rank, world_size
from vfmvae.training.draws import StepDraws
from vfmvae.training.job import DataIdentity

LAST = -1  # the encoder's layer whose tokens are aligned with


class Source(Protocol):
    """What a run asks of the place that its latents come from."""

    name: str
    classes: tuple[str, ...]
    images: int
    """In all, held-out ones included."""
    training_images: int
    tokenizer: Tokenizer | None
    """What decodes latents."""
    tokenizer_hash: str | None
    """None where that is not known, or where there is no tokenizer."""

    def faults(self) -> list[Fault]:
        """What opening it has found."""
        ...

    def identity(self) -> DataIdentity: ...

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of the latents, float32 [C]."""
        ...

    def batches(self, numbers: Iterable[int], size: int) -> Generator[Any, None, None]:
        """Training batches of `size` images by their numbers; each has "faults" or none."""
        ...

    def evaluation_batches(self, size: int) -> Iterator[Any]:
        """Batches that an evaluation uses, always the same ones in the same order."""
        ...

    def inputs(self, batch: Any, draws: StepDraws) -> DiffusionInputs:
        """What a step learns from, on the device; labels that are missing are those of the null class."""
        ...


def open_source(config: DiffusionConfig, device: torch.device, dtype: torch.dtype | None) -> Source:
    """ValueError for a folder, data or a tokenizer that cannot be used, or do not fit each other."""
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, device, config.fused).requires_grad_(False)
        tokenizer.compute_dtype = dtype
    if config.latents is not None:
        source: Source = LatentInputs(config, tokenizer, device)
    else:
        source = ImageInputs(config, tokenizer, device)
    check_classes(source, config.diffusion.classes)
    return source


def check_classes(source: Source, classes: int) -> None:
    """ValueError where a label would be no class of the model."""
    if len(source.classes) > classes:
        raise ValueError(
            f"{source.name} has {len(source.classes)} classes, and diffusion.classes is {classes}; give it at"
            f" least as many"
        )


def verify_checksums(folder: Path, fields: Collection[str]) -> None:
    """Read every byte, with a bar; ValueError for a shard that is missing or damaged, or has numbers that are
    not finite in these fields.
    """
    from rich.console import Console  # a machine that only measures speed may not have it

    from vfmvae.inference import progress

    manifest = read_manifest(folder)
    with progress(Console(quiet=rank() > 0), "checking", len(manifest.shards), "shards") as bar:
        check_shards(folder, manifest, True, partial(bar.advance, bar.task_ids[0]), fields)


class LatentInputs:
    """Latents of a folder; with moments there, a sample of each posterior is drawn in every step."""

    def __init__(self, config: DiffusionConfig, tokenizer: Tokenizer | None, device: torch.device) -> None:
        assert config.latents is not None
        self.config, self.device, self.tokenizer = config, device, tokenizer
        self.name = config.latents
        stored = read_manifest(Path(config.latents)).settings.fields
        self.fields = ["moments" if "moments" in stored else "latents"]
        self.fields += ["features"] if config.needs_features else []
        self.fields += ["class_token"] if config.diffusion.class_token_width is not None else []
        self.latents = Latents(config.latents, "train", config.seed, False, self.fields)
        self.validation = Latents(config.latents, "validation", config.seed, False, self.fields)
        self.classes = self.latents.classes
        self.images = self.training_images = len(self.latents)
        settings = self.latents.manifest.settings
        self.tokenizer_hash = None if settings.tokenizer == "unknown" else settings.tokenizer
        self._check(tokenizer)
        with first_rank_first():
            if config.verify_latents and local_rank() == 0:  # once on each machine
                # Not the features, which are most of the bytes: those who write them look.
                read = [field for field in self.fields if field != "features"]
                read += ["latents_flip"] if "latents" in read and settings.flips else []
                verify_checksums(self.latents.path, read)

    def _check(self, tokenizer: Tokenizer | None) -> None:
        model, entry = self.config.diffusion, self.latents.read(0, 1)
        found, needed = self.latents.manifest.latent_shape, (model.channels, *[model.latent_size] * 2)
        if found != needed:
            raise ValueError(
                f"{self.name} holds latents {list(found)}, and the model takes {list(needed)}; set"
                f" diffusion.channels and diffusion.latent_size to those of the latents"
            )
        constant = (self.latents.std.flatten() == 0).nonzero().flatten().tolist()
        if constant:
            raise ValueError(
                f"{self.name}: channel {constant[0]} is the same in all latents, so it cannot be normalised;"
                f" check the tokenizer with `vfmvae reconstruct`, or encode with --storage fp32"
            )
        check_widths(self.config, entry["features"], entry["class_token"], self.name)
        if tokenizer is None or self.tokenizer_hash is None:
            return
        own = tokenizer_hash(tokenizer)
        if own != self.tokenizer_hash:
            raise ValueError(
                f"the latents in {self.name} are those of another tokenizer ({self.tokenizer_hash[:12]}) than"
                f" {self.config.tokenizer} ({own[:12]}); give the one that encoded them, or encode again"
            )

    def faults(self) -> list[Fault]:
        return []

    def identity(self) -> DataIdentity:
        return DataIdentity(self.name, len(self.latents), self.latents.manifest.settings.names)

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.latents.mean.flatten(), self.latents.std.flatten()

    def batches(self, numbers: Iterable[int], size: int) -> Generator[LatentBatch, None, None]:
        return load_latents(self.latents, size, numbers, self.config.workers, self.device)

    def evaluation_batches(self, size: int) -> Iterator[LatentBatch]:
        """The first latents of the folder, which training sees too: none are held out."""
        count = min(self.config.evaluation.images, len(self.latents))
        for start in range(0, count, size):
            yield self.validation.read(start, min(start + size, count))

    def inputs(self, batch: LatentBatch, draws: StepDraws) -> DiffusionInputs:
        latents = batch["latent"]
        if latents is None:
            moments = batch["moments"]
            assert moments is not None
            mean, log_variance = moments.to(self.device).chunk(2, dim=1)
            latents = mean + (0.5 * log_variance).exp() * draws.normal(mean.shape[1:])
        features, token = (
            None if x is None else x.to(self.device) for x in (batch["features"], batch["class_token"])
        )
        labels = known_labels(batch["label"], self.config.diffusion.classes, self.device)
        return DiffusionInputs(latents.to(self.device), labels, features, token)


class ImageInputs:
    """Images, encoded in every step; without a tokenizer their pixels in [-1, 1] are the latents."""

    def __init__(self, config: DiffusionConfig, tokenizer: Tokenizer | None, device: torch.device) -> None:
        assert config.data is not None
        self.config, self.device, self.tokenizer, self.name = config, device, tokenizer, config.data
        model = config.diffusion
        if tokenizer is None:
            channels, self.resolution = 3, model.latent_size
        else:
            channels = tokenizer.config.latent_channels
            self.resolution = model.latent_size * tokenizer.config.downsample
        if channels != model.channels:
            what = "images" if tokenizer is None else f"latents of {config.tokenizer}"
            raise ValueError(
                f"the {what} have {channels} channels, and diffusion.channels is {model.channels};"
                f" make them equal"
            )
        self.encoder = self._encoder()
        with first_rank_first():  # it indexes shards and converts parquet files, for all
            self.data = open_data(config.data, "train", self.resolution, config.seed)
            self.held_out = open_data(config.data, "validation", self.resolution, config.seed)
        self.backend = choose_backend(self.data, config.data_backend, device)
        self.classes = self.data.classes
        self.training_images = len(self.data)
        self.images = len(self.data) + len(self.held_out)
        self.tokenizer_hash = None if tokenizer is None else tokenizer_hash(tokenizer)

    def _encoder(self) -> FrozenEncoder | None:
        """What features and class tokens come from, if it is not the tokenizer's own."""
        config = self.config.encoder
        needed = self.config.needs_features or self.config.diffusion.class_token_width is not None
        if not needed:
            return None
        if config is None:
            config = None if self.tokenizer is None else self.tokenizer.encoder.config
            where = "tokenizer.encoder.layers"
        else:
            where = "encoder.layers"
        if config is None or LAST not in config.layers:
            layers = "no encoder" if config is None else f"{where} {config.layers}"
            raise ValueError(
                f"alignment compares with the last layer (-1) of an encoder, and there is {layers}"
            )
        if self.config.encoder is None:
            return None
        return build_encoder(config).to(self.device).requires_grad_(False)

    def faults(self) -> list[Fault]:
        return [*self.data.faults(), *self.held_out.faults()]

    def identity(self) -> DataIdentity:
        keys = self.data.keys_digest() if isinstance(self.data, Images) else ""
        return DataIdentity(self.name, len(self.data), keys)

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of the first `statistics_images` training images in the seed's order, in float64; a collective.

        Each image is one draw of its posterior. Every process encodes a part of them.
        """
        if self.tokenizer is None:
            return torch.zeros(3), torch.ones(3)
        size = 32
        each = -(-self.config.statistics_images // (size * world_size()))  # batches of a process
        numbers = range(rank() * each, (rank() + 1) * each)
        sums = torch.zeros(2, self.config.diffusion.channels, dtype=torch.float64, device=self.device)
        seen = 0
        for number, batch in zip(numbers, self.batches(numbers, size), strict=True):
            draws = StepDraws(self.config.seed, number, self.device, 0, size, size, STATISTICS)
            latents = self.inputs(batch, draws).latents.double()
            sums += torch.stack([latents, latents.square()]).sum(dim=(1, 3, 4))
            seen += latents[:, 0].numel()
        means = sums / seen
        mean_over_ranks(means)
        mean, std = means[0], (means[1] - means[0].square()).clamp_min(0).sqrt()
        if not mean.isfinite().all() or not (std > 0).all():
            raise ValueError(
                f"the latents of {self.config.tokenizer} on {self.name} are not finite, or a channel does not"
                f" vary; check the tokenizer with `vfmvae reconstruct`, or try --dtype fp32"
            )
        return mean.float().cpu(), std.float().cpu()

    def batches(self, numbers: Iterable[int], size: int) -> Generator[ImageBatch, None, None]:
        requests = (Request(number) for number in numbers)
        loaded = load_batches(self.data, size, requests, self.config.workers, self.device, self.backend)
        with closing(loaded):
            yield from loaded

    def evaluation_batches(self, size: int) -> Iterator[ImageBatch]:
        """Held-out images."""
        wanted = self.config.evaluation.images
        for number, batch in zip(
            range(-(-wanted // size)), validation_batches(self.held_out, size), strict=False
        ):
            yield first_images(batch, wanted - number * size)

    @torch.no_grad()
    def inputs(self, batch: ImageBatch, draws: StepDraws) -> DiffusionInputs:
        images = batch["image"].to(self.device)
        labels = known_labels(batch["label"], self.config.diffusion.classes, self.device)
        tokenizer, encoder = self.tokenizer, self.encoder
        features = class_token = None
        if tokenizer is None:
            latents = to_unit(images)
        else:
            seen = tokenizer.encoder(images)
            side = self.config.diffusion.latent_size
            posterior = tokenizer.fuse(seen.layers, (side, side))
            if isinstance(posterior, Posterior):
                latents = posterior.sample(draws.normal(posterior.mean.shape[1:]))
            else:
                latents = posterior.mode()
            if encoder is None and LAST in tokenizer.encoder.config.layers:
                features = seen.layers[tokenizer.encoder.config.layers.index(LAST)]
                class_token = seen.pooled
        if encoder is not None:
            seen = encoder(images)
            features, class_token = seen.layers[encoder.config.layers.index(LAST)], seen.pooled
        if self.config.diffusion.class_token_width is None:
            class_token = None
        features = features if self.config.needs_features else None
        check_widths(self.config, features, class_token, self.name)
        return DiffusionInputs(latents.float(), labels, features, class_token)


def first_images(batch: ImageBatch, count: int) -> ImageBatch:
    """At most so many of a batch."""
    return {
        "image": batch["image"][:count],
        "label": batch["label"][:count],
        "key": batch["key"][:count],
        "number": batch["number"][:count],
        "faults": batch["faults"],
    }


STATISTICS = 7
"""Stream of the draws that statistics are measured with."""


def known_labels(labels: Tensor, classes: int, device: torch.device) -> Tensor:
    """On the device, a missing label (-1) as the null class; the host does not wait."""
    labels = labels.to(device, non_blocking=True)
    return torch.where(labels < 0, classes, labels)


def check_widths(
    config: DiffusionConfig, features: Tensor | None, class_token: Tensor | None, name: str
) -> None:
    """ValueError where an encoder's features do not have the width that the model expects."""
    model = config.diffusion
    if features is not None and any(width != features.shape[-1] for width in model.alignment_widths):
        raise ValueError(
            f"the encoder's features ({name}) are {features.shape[-1]} wide, and diffusion.alignment_widths"
            f" is {model.alignment_widths}; make them equal"
        )
    if class_token is not None and class_token.shape[-1] != model.class_token_width:
        raise ValueError(
            f"the encoder's class token ({name}) is {class_token.shape[-1]} wide, and"
            f" diffusion.class_token_width is {model.class_token_width}; make them equal"
        )

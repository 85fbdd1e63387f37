"""Convert a published checkpoint to a folder that `vfmvae.load` reads.

python -m vfmvae.convert --from vfm-vae --checkpoint network.pth --config config.yaml --output tokenizer
python -m vfmvae.convert --from repa --checkpoint last.pt --config args.json --output transformer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vfmvae.cli import UsageError, command, parse
from vfmvae.convert import diffusion, vfm_vae
from vfmvae.convert.files import read_arguments, read_config, read_generator, read_state
from vfmvae.diffusion.files import save_transformer
from vfmvae.latents import read_statistics


@dataclass
class Convert:
    """Convert a published checkpoint. Example:
    python -m vfmvae.convert --from vfm-vae --checkpoint network.pth --config config.yaml --output tokenizer
    """

    source: Annotated[Literal["vfm-vae", "repa", "reg", "sit", "lightningdit"], tyro.conf.arg(name="from")]
    """Whose format the checkpoint has: that of a tokenizer (vfm-vae) or of a diffusion model."""
    checkpoint: Path
    """.pth with G_ema or G; of diffusion models .pt with ema or model; or a .safetensors of either."""
    config: Path
    """Published YAML (G_kwargs; LightningDiT's sections), or a JSON of the model's arguments."""
    output: Path
    """Folder for config.json and model.safetensors."""
    statistics: Path | None = None
    """Of a diffusion model's latents: latents_stats.pt, or a .safetensors, with mean and std [1, C, 1, 1]."""


@command
def main() -> None:
    options = parse(Convert, "convert")
    described = _tokenizer(options) if options.source == "vfm-vae" else _diffusion(options, options.source)
    print(f"{options.output}: {described}")


def _tokenizer(options: Convert) -> str:
    if options.statistics is not None:
        raise UsageError("--statistics are of a diffusion model's latents; --from vfm-vae makes a tokenizer")
    arguments = read_arguments(options.config)
    tokenizer = vfm_vae.convert(read_generator(options.checkpoint), arguments, options.checkpoint)
    tokenizer.save(options.output)
    count = sum(p.numel() for p in tokenizer.parameters())
    encoder = tokenizer.config.encoder
    size = f" with {encoder.vit.depth} blocks of width {encoder.vit.width}" if encoder.vit else ""
    return f"{count / 1e6:.1f} M parameters, {encoder.name}{size}"


def _diffusion(options: Convert, source: Literal["repa", "reg", "sit", "lightningdit"]) -> str:
    arguments = read_config(options.config)
    statistics = None if options.statistics is None else read_statistics(options.statistics)
    state = read_state(options.checkpoint)
    model = diffusion.convert(source, state, arguments, statistics, options.checkpoint)
    save_transformer(model, options.output)
    count, config = sum(p.numel() for p in model.parameters()), model.config
    shape = f"{config.channels} x {config.latent_size} x {config.latent_size}"
    std = model.latents_std.mean().item()
    origin = "" if statistics else " (no --statistics given)"
    return f"{count / 1e6:.1f} M parameters, latents {shape} with a mean std of {std:.4g}{origin}"


if __name__ == "__main__":
    main()

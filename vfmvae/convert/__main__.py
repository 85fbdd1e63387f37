"""Convert a published checkpoint to a folder that `vfmvae.load` reads.

python -m vfmvae.convert --from vfm-vae --checkpoint network.pth --config config.yaml --output tokenizer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vfmvae.cli import command, parse
from vfmvae.convert.files import read_arguments, read_generator
from vfmvae.convert.vfm_vae import convert


@dataclass
class Convert:
    """Convert a published checkpoint. Example:
    python -m vfmvae.convert --from vfm-vae --checkpoint network.pth --config config.yaml --output tokenizer
    """

    source: Annotated[Literal["vfm-vae"], tyro.conf.arg(name="from")]
    """Whose format the checkpoint has."""
    checkpoint: Path
    """.pth with G_ema or G, or a .safetensors of the generator."""
    config: Path
    """Published YAML (G_kwargs), or a JSON of those arguments."""
    output: Path
    """Folder for config.json and model.safetensors."""


@command
def main() -> None:
    options = parse(Convert, "convert")
    arguments = read_arguments(options.config)
    tokenizer = convert(read_generator(options.checkpoint), arguments, options.checkpoint)
    tokenizer.save(options.output)
    count = sum(p.numel() for p in tokenizer.parameters())
    encoder = tokenizer.config.encoder
    size = f" with {encoder.vit.depth} blocks of width {encoder.vit.width}" if encoder.vit else ""
    print(f"{options.output}: {count / 1e6:.1f} M parameters, {encoder.name}{size}")


if __name__ == "__main__":
    main()

"""`vfmvae.load`: whatever model lies in a folder or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import torch

from vfmvae.diffusion.files import is_diffusion, load_transformer
from vfmvae.diffusion.transformer import DiffusionTransformer
from vfmvae.model_files import CONFIG_FILE, find_model
from vfmvae.serialization import read_json
from vfmvae.tokenizer import Tokenizer
from vfmvae.tokenizer.files import load_tokenizer


def load(
    path_or_hub_id: str | Path, device: str | torch.device = "cpu", fused: bool = True
) -> Tokenizer | DiffusionTransformer:
    """Load a tokenizer or a diffusion transformer: a saved one, or that of a training run.

    Args:
        path_or_hub_id: a folder, or the id (owner/name) of a repository on the hub.
        fused: use fused operations where they apply.

    Returns it on `device`, in eval mode. Raises ValueError where something is missing, damaged or does not
    fit.
    """
    folder = find_model(path_or_hub_id)
    if is_diffusion(read_json(folder / CONFIG_FILE)):
        return load_transformer(folder, device, fused)
    return load_tokenizer(folder, device, fused)

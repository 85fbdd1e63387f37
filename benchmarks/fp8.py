"""What float8 in a frozen encoder's linear layers does to its features and to reconstructions, and its time.

    python benchmarks/fp8.py --tokenizer runs/NAME                       features and reconstructions
    python benchmarks/fp8.py --encoder siglip2-large-patch16-512         features alone
    python benchmarks/fp8.py --encoder siglip2-large-patch16-512 --random

The encoder reads images in float64, under bfloat16 autocast (as it runs on a GPU), and so with its linear
layers in float8. Of each layer that a tokenizer reads: ||x - x64|| / ||x64|| over all tokens, and the mean
cosine of a token with the same in float64. A tokenizer then reconstructs the images from each: its measures
against the images, and how far latents and reconstructions are from those of float64.

Float8 numbers and their products are the same on every device, but for the order of sums. Times are measured
on CUDA alone: a GPU without float8 is refused, a CPU multiplies the same numbers in float32, more slowly. The
JSON goes to benchmarks/results/fp8-NAME-DEVICE.json unless --json says otherwise; tables.py reads it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, Stopwatch, one_line, print_table, provenance, write_result
from torch import Tensor

from vfmvae.data.ordered import open_in_order
from vfmvae.encoders import EncoderConfig, FrozenEncoder, build_encoder
from vfmvae.encoders.fp8 import use_fp8
from vfmvae.images import to_uint8, to_unit
from vfmvae.losses.perceptual import perceptual_network
from vfmvae.metrics.reconstruction import lpips, psnr, ssim
from vfmvae.tokenizer import Tokenizer, load_tokenizer
from vfmvae.training.device import pick_device, set_precision
from vfmvae.training.regions import compile_blocks

FORMS = ("float64", "bfloat16", "float8")


def main() -> None:
    options = read_options()
    device = pick_device(options.device)
    set_precision(deterministic=True)
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer, device).requires_grad_(False)
        encoder, pixels = tokenizer.encoder, tokenizer.config.resolution
    else:
        weights = None if options.random else "pretrained"
        torch.manual_seed(0)
        config = EncoderConfig(options.encoder, tuple(options.layers))
        encoder = build_encoder(config, weights).to(device)
        tokenizer, pixels = None, options.pixels
    images = open_in_order(options.data, "validation", pixels, options.images).read(0, options.images)
    batches = images["image"].to(device).split(options.batch)
    forms = forms_of(encoder)
    features = {form: read(one, batches) for form, one in forms.items()}
    result: dict[str, Any] = {
        **provenance(device),
        "encoder": encoder.config.name,
        "weights": "random" if options.random else "trained",
        "tokenizer": Path(options.tokenizer).name if options.tokenizer else None,
        "images": sum(map(len, batches)),
        "pixels": pixels,
        "layers": layer_errors(encoder.config.layers, features),
    }
    if tokenizer is not None:
        result["reconstructions"] = reconstructions(tokenizer, batches, features)
    if device.type == "cuda":
        result["times_ms"] = times(forms, batches[0])
    name = "tokenizer" if tokenizer is not None else encoder.config.name
    write_result(options.json or RESULTS / f"fp8-{name}-{device.type}.json", result)
    show(result)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/fp8.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokenizer", metavar="RUN", help="a training run or a saved tokenizer")
    what.add_argument("--encoder", metavar="NAME", help="an encoder of the table")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 12, -1], help="of --encoder")
    parser.add_argument("--pixels", type=int, default=256, help="of images for --encoder, which sees twice")
    parser.add_argument("--random", action="store_true", help="random weights for --encoder")
    parser.add_argument("--data", help="a folder of images; by default the embedded photographs")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.random and not options.encoder:
        parser.error("--random goes with --encoder: a tokenizer has weights")
    return options


def forms_of(encoder: FrozenEncoder) -> dict[str, FrozenEncoder]:
    """The encoder in each arithmetic."""
    half, eighth = copy.deepcopy(encoder), copy.deepcopy(encoder)
    half.always_bfloat16 = True
    use_fp8(eighth, emulate=next(encoder.parameters()).device.type == "cpu")
    return {"float64": copy.deepcopy(encoder).double(), "bfloat16": half, "float8": eighth}


def read(encoder: FrozenEncoder, batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """Layers of each batch."""
    return [encoder(batch).layers for batch in batches]


def layer_errors(
    layers: Sequence[int], features: dict[str, list[list[Tensor]]]
) -> list[dict[str, int | float]]:
    """A row per layer: the relative error and the cosine of each form."""
    rows = []
    for place, layer in enumerate(layers):
        row: dict[str, int | float] = {"layer": layer}
        exact = torch.cat([batch[place] for batch in features["float64"]]).double()
        for form in FORMS[1:]:
            found = torch.cat([batch[place] for batch in features[form]]).double()
            row[f"{form}_error"] = ((found - exact).norm() / exact.norm()).item()
            row[f"{form}_cosine"] = F.cosine_similarity(found, exact, dim=-1).mean().item()
        rows.append(row)
    return rows


@torch.no_grad()
def reconstructions(
    tokenizer: Tokenizer, batches: Sequence[Tensor], features: dict[str, list[list[Tensor]]]
) -> list[dict[str, Any]]:
    """A row per form: means over the images, which are rounded to 8 bits, as evaluate does it."""
    network = perceptual_network("mini").to(batches[0].device).eval()
    size = tuple(side // tokenizer.config.downsample for side in batches[0].shape[-2:])
    images = to_unit(torch.cat(list(batches)))
    rows: list[dict[str, Any]] = []
    exact: dict[str, Tensor] = {}
    for form in FORMS:
        latents = [tokenizer.fuse(layers, size).mode() for layers in features[form]]
        decoded = to_unit(torch.cat([to_uint8(tokenizer.decode(batch)) for batch in latents]))
        found = {"latents": torch.cat(latents), "images": decoded}
        exact = exact or found
        difference = (found["latents"] - exact["latents"]).norm() / exact["latents"].norm()
        measures = {
            "psnr": psnr(decoded, images),
            "ssim": ssim(decoded, images),
            "mini_distance": lpips(decoded, images, network),
            "psnr_to_float64": psnr(decoded, exact["images"]).clamp_max(99.0),
        }
        means = {name: value.double().mean().item() for name, value in measures.items()}
        rows.append({"encoder": form, **means, "latent_error": difference.item()})
    return rows


def times(forms: dict[str, FrozenEncoder], images: Tensor) -> dict[str, float]:
    """Of a forward of the batch, with blocks as they are and compiled; the device's work alone."""
    watch, found = Stopwatch(images.device), {}
    for compiled in ("", "_compiled"):
        for form in FORMS[1:]:
            if compiled:
                compile_blocks(forms[form].blocks, "default")
            taken = watch.median_seconds(lambda form=form: forms[form](images), repeats=9)  # type: ignore[misc]
            found[f"{form}{compiled}"] = 1e3 * taken
    return found


def show(result: dict[str, Any]) -> None:
    for title, rows in (("features", "layers"), ("reconstructions", "reconstructions")):
        if found := result.get(rows):
            cells = [[v if isinstance(v, str) else f"{v:.5g}" for v in row.values()] for row in found]
            print_table(f"{result['encoder']}, {title}", list(found[0]), cells)
    if "times_ms" in result:
        print(one_line(result["times_ms"]))
    print(one_line({k: v for k, v in result.items() if not isinstance(v, list | dict)}))


if __name__ == "__main__":
    main()

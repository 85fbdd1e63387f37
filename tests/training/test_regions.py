"""The blocks that are compiled, recomputed and sharded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tokenizer.tiny import VIT, tiny_tokenizer
from vfmvae.encoders import EncoderConfig, ViTConfig, build_encoder
from vfmvae.encoders.fp8 import use_fp8
from vfmvae.training import regions
from vfmvae.training.regions import compile_blocks, decoder_blocks, encoder_blocks, recompute_blocks


def test_blocks_are_found_in_their_order() -> None:
    tokenizer = tiny_tokenizer()
    found = encoder_blocks(tokenizer.encoder)
    assert len(found) == VIT.depth
    names = [name for name, module in tokenizer.encoder.named_modules() if any(module is b for b in found)]
    assert [name.rpartition(".")[2] for name in names] == [str(number) for number in range(VIT.depth)]
    assert decoder_blocks(tokenizer) == list(tokenizer.decoder.blocks)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made as for a compiler, and run by PyTorch: compiling them takes minutes on a CPU."""
    options = regions._compile_options()
    monkeypatch.setattr(regions, "_compile_options", lambda: {**options, "backend": "aot_eager"})
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "siglip2-large-patch16-512",
        "dinov2-giant",
        "dinov2-with-registers-base",
        "dinov3-vitb16",
        "eva02-clip-base-patch16-224",
        "clip-vit-large-patch14",
        "qwen2.5-vl-3b",
    ],
)
def test_compiled_blocks_of_every_family_are_run_whole(name: str, fp8: bool, traced_only: None) -> None:
    qwen = name.startswith("qwen")
    if qwen:
        pytest.importorskip("transformers")
    # Qwen's first blocks attend within windows of 8 patches, the last of each quarter to the whole image.
    vit = ViTConfig(32, 8 if qwen else 3, 2, 14 if qwen else 8, 56, mlp_width=48)
    encoder = build_encoder(EncoderConfig(name, (1, -1), 1.0, vit=vit), None)
    if fp8:
        use_fp8(encoder, emulate=True)
    images = torch.rand(2, 3, 5 * encoder.image_multiple, 3 * encoder.image_multiple) * 2 - 1
    expected = encoder(images)
    compile_blocks(encoder_blocks(encoder), "default")
    found = encoder(images)
    assert not counters["graph_break"]
    # One for all blocks that do the same: their weights come in as arguments.
    assert counters["stats"]["unique_graphs"] == (2 if qwen else 1)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_recomputing_keeps_less_and_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, again = tiny_tokenizer(), tiny_tokenizer()
    again.load_state_dict(kept.state_dict())
    recompute_blocks(decoder_blocks(again), "off")
    assert again.state_dict().keys() == kept.state_dict().keys()
    latents, gradients, stored = torch.randn(1, 8, 4, 4), [], []
    for tokenizer in (kept, again):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            image = tokenizer.decode(latents)
        stored.append(sum(sizes))
        image.square().mean().backward()
        gradients.append([p.grad for p in tokenizer.decoder.parameters() if p.grad is not None])
    assert stored[1] < stored[0] / 2
    assert len(gradients[0]) == len(gradients[1]) > 10
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)

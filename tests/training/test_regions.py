"""The blocks that are compiled, recomputed and sharded."""

from __future__ import annotations

import pytest
import torch

from tests.tokenizer.tiny import VIT, tiny_tokenizer
from vfmvae.training.regions import decoder_blocks, encoder_blocks, recompute_blocks


def test_blocks_are_found_in_their_order() -> None:
    tokenizer = tiny_tokenizer()
    found = encoder_blocks(tokenizer.encoder)
    assert len(found) == VIT.depth
    names = [name for name, module in tokenizer.encoder.named_modules() if any(module is b for b in found)]
    assert [name.rpartition(".")[2] for name in names] == [str(number) for number in range(VIT.depth)]
    assert decoder_blocks(tokenizer) == list(tokenizer.decoder.blocks)


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

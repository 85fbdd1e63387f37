"""What torch.compile and export see on CUDA of the decoder and the fusion: one graph, of fused operations.

Needs no GPU: tensors of this device without memory, and operations that believe it is there.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vfmvae.ops import mlp_triton, native
from vfmvae.tokenizer import DecoderConfig
from vfmvae.tokenizer.decoder import Decoder
from vfmvae.tokenizer.fusion import FusionConfig, LatentFusion


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def built_for(device_type: str, *_: object) -> str | None:
        return None if device_type == "cuda" else f"the tensor is on {device_type}"

    constant = torch.compiler.assume_constant_result
    monkeypatch.setattr(native, "_cuda_objection", constant(built_for))
    monkeypatch.setattr(native, "_triton_objection", constant(built_for))
    monkeypatch.setattr(mlp_triton, "_card_objection", constant(lambda device_index: None))


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_graph_of_the_fused_operations(dtype: torch.dtype) -> None:
    config = DecoderConfig(
        channel_base=1024,
        channel_max=32,
        num_res_blocks=1,
        latent_widths=(8, 8, 8, 8),
        style_width=16,
        attention_blocks=(0,),
        attention_depths=(1,),
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        decoder = Decoder(config, 8, 16)
        inputs = torch.empty(2, 8, 4, 4, dtype=dtype), torch.empty(2, 16)
    graph = torch.export.export(decoder, inputs, strict=True).graph
    found = Counter(str(node.target).split(".")[1] for node in graph.nodes if "vfmvae." in str(node.target))
    layers = sum(config.num_layers(block) for block in range(6))
    assert found["depthwise_conv2d_with_statistics"] == layers
    assert found["upsample_blur"] == 11 + 2  # without blur: in block 3's latent branch and in the first block
    assert found["modulated_to_rgb"] == 6
    assert found["group_norm_cuda"] >= layers
    # The last block has 4 channels: rows of 8 bytes, which the hardware that copies tiles does not take.
    narrow = sum(config.num_layers(block) for block in range(6) if config.channels(block) % 8)
    assert found["demodulated_mlp"] == (layers - narrow if dtype == torch.bfloat16 else 0)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_graph_of_the_latent_fusion(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, std: tensor)  # it reads numbers
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        fusion = LatentFusion(FusionConfig(layer_widths=(8, 8)), 32, 2, 16)
        features = [torch.empty(2, 16, 32, dtype=dtype) for _ in range(2)]
    graph = torch.export.export(fusion, (features, (2, 2)), strict=True).graph
    found = Counter(str(node.target).split(".")[1] for node in graph.nodes if "vfmvae." in str(node.target))
    assert found["normed_linears"] == 2 * 3 and found["geglu_halves"] == 3
    assert not any("pixel_unshuffle" in str(node.target) for node in graph.nodes)

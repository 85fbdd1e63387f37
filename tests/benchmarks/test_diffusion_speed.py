"""The diffusion benchmark: arithmetic as counted, sides that agree, shares, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.scripts import script
from vfmvae.diffusion import SIZES, DiffusionTransformer, TransformerConfig

script("published_diffusion")
sides = script("diffusion_sides")
diffusion, tables, suite = map(script, ("diffusion", "tables", "gpu_suite"))
CPU = torch.device("cpu")


def options(*arguments: str):
    common = ("--device", "cpu", "--size", "tiny", "--repeats", "1", "--no-memory")
    return diffusion.read_options([*common, *arguments])


@pytest.mark.parametrize("name", ["sit", "lightningdit", "reg"])
def test_the_arithmetic_is_as_counted(name: str) -> None:
    config = sides.configuration(name, options(), CPU).diffusion
    model = DiffusionTransformer(config)
    x = torch.randn(1, config.channels, config.latent_size, config.latent_size)
    token = None if config.class_token_width is None else torch.randn(1, config.class_token_width)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, torch.rand(1), torch.zeros(1, dtype=torch.int64), token)
    assert counter.get_total_flops() == sides.flops_per_image(config)


def test_the_published_size_has_the_published_arithmetic() -> None:
    # Of DiT-XL/2, which has 256 tokens too: 118.6 Gflops, a multiply-add as one (arXiv 2212.09748).
    assert sides.flops_per_image(TransformerConfig(**SIZES["XL"])) == pytest.approx(2 * 118.6e9, rel=2e-3)


@pytest.mark.parametrize("name", ["sit", "lightningdit", "reg"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_sides_have_the_same_losses_and_updates(name: str, dtype: str) -> None:
    built = sides.build(name, options("--dtype", dtype), CPU)
    names = {"sit": ["velocity"], "lightningdit": ["velocity", "cosine"]}
    for _ in range(2):
        ours, published = built["fused"].train(), built["reference"].train()
        for loss in names.get(name, ["velocity", "alignment", "class_token"]):
            assert ours[loss].item() == pytest.approx(published[loss].item(), abs=diffusion.TOLERANCE[dtype])
    if dtype == "fp32":
        expected = built["reference"].model.state_dict()
        for key, found in built["fused"].model.state_dict().items():
            torch.testing.assert_close(found, expected[key], rtol=0, atol=1e-5, msg=key)


def test_sides_that_differ_end_the_command() -> None:
    built = sides.build("sit", options(), CPU)
    with torch.no_grad():
        built["fused"].model.final_layer.linear.bias += 1
    with pytest.raises(SystemExit, match="velocity is .* in 'reference' and .* in 'fused'"):
        diffusion.check_agreement(built, 1e-3)


def test_compiled_twins_share_parameters_and_leave_the_plain_model_alone() -> None:
    built = sides.build("reg", options("--compiled"), CPU)
    for route in ("fused", "reference"):
        plain, twin = built[route].model, built[f"{route}, compiled"].model
        assert all(a is b for a, b in zip(plain.parameters(), twin.parameters(), strict=True))
        assert all(block._compiled_call_impl is not None for block in twin.blocks)
        assert all(block._compiled_call_impl is None for block in plain.blocks)
        assert twin.blocks[0].attn is not plain.blocks[0].attn and twin.fused is plain.fused


def test_few_steps_have_the_guided_share_of_many() -> None:
    for kind, share in (("none", 0.0), ("interval", 0.8), ("always", 1.0)):
        for steps in (5, 10, 250):
            assert diffusion.guided_share(diffusion.GUIDANCE[kind], steps) == pytest.approx(share)
    with pytest.raises(SystemExit):
        options("--steps", "7")


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out" / "diffusion-cpu.json"
    chosen = options("--model", "sit", "--batch", "1", "--depth", "1", "--output", str(output))
    monkeypatch.setattr(diffusion, "read_options", lambda: chosen)
    diffusion.main()
    result = json.loads(output.read_text())
    assert result["torch"] == torch.__version__ and result["ceilings"]["matrix_flops"] > 0
    training = [row for row in result["rows"] if row["task"] == "training"]
    assert [row["path"] for row in training] == ["fused", "reference"]
    for row in result["rows"]:
        assert (row["model"], row["size"], row["depth"], row["batch"]) == ("sit", "tiny", 1, 1)
        assert row["images_per_second"] > 0
    for row in training:
        assert row["matrix_share"] == pytest.approx(
            row["flops_per_image"] * row["images_per_second"] / result["ceilings"]["matrix_flops"]
        )
    sampling = [row for row in result["rows"] if row["task"] == "sampling"]
    assert [(row["guided"], row["passes_per_step"]) for row in sampling] == 2 * [
        ("none", 1.0),
        ("interval", 1.8),
        ("always", 2.0),
    ]
    assert all(row["times_faster_than_always"] == 1 for row in sampling if row["guided"] == "always")
    table = tables.render_folder(output.parent)
    assert "<!-- diffusion-cpu -->" in table and "| sit-tiny, depth 1, batch 1 | fused | " in table


def test_half_the_batch_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def build(name: str, chosen, device: torch.device):
        tried.append(chosen.batch)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(diffusion, "build", build)
    chosen = options("--batch", "4")
    assert list(diffusion.measured("sit", chosen, CPU, None)) == [] and tried == [4, 2, 1]


def test_the_suite_measures_it_last_and_the_document_has_its_place(tmp_path: Path) -> None:
    found = suite.parts("cuda", tmp_path, "90a-real")
    assert [part.name for part in found].index("diffusion") > [p.name for p in found].index("compile")
    document = tables.DOCUMENT.read_text()
    for name in ("diffusion-cuda", "diffusion-cpu"):
        tables.replace_table(document, name, "")

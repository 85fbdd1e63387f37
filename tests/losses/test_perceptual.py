"""LPIPS on random weights against torchvision's VGG and the lpips package; `mini`'s distance by behaviour."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vfmvae import weights
from vfmvae.discriminators.blur import gaussian_blur
from vfmvae.encoders import EncoderConfig, build_encoder
from vfmvae.images import to_uint8, to_unit
from vfmvae.losses import perceptual
from vfmvae.losses.perceptual import (
    LAYERS,
    LINEAR_LAYERS,
    LPIPS,
    VGG16,
    FeatureDistance,
    PerceptualNetwork,
    load_vgg,
    perceptual_network,
)

# SHA-256 of the 1472 float32 numbers in the package lpips 0.1.4, layer after layer.
DIGEST = "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"


@pytest.fixture(scope="module")
def theirs() -> torchvision.models.VGG:
    """torchvision's VGG16 without its classifier, with random weights that keep activations alive."""
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    vgg.classifier = torch.nn.Identity()
    for parameter in vgg.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(std=0.1)
    return vgg.eval()


@pytest.fixture(scope="module")
def vgg_file(theirs: torchvision.models.VGG, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as torchvision's download: a torch file, with a classifier in it."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save({**theirs.state_dict(), "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def mini() -> PerceptualNetwork:
    return perceptual_network("mini")


def pair(size: tuple[int, int] = (32, 48), batch: int = 2) -> tuple[Tensor, Tensor]:
    a, b = (torch.rand(batch, 3, *size) * 2 - 1 for _ in range(2))
    return a, b


def photographs() -> Tensor:
    """Eight crops, [8, 3, 64, 64] in [-1, 1]."""
    from skimage.data import astronaut, coffee

    crops = [
        image[y : y + 64, x : x + 64]
        for image in (astronaut(), coffee())
        for y in (80, 200)
        for x in (150, 250)
    ]
    return to_unit(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


def lpips_in_float64(vgg: torchvision.models.VGG, a: Tensor, b: Tensor) -> Tensor:
    """The definition: features of scaled images, unit vectors, weighted squared difference, mean, sum."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    linear = load_file(LINEAR_LAYERS)
    x, y = (a.double() - shift) / scale, (b.double() - shift) / scale
    total = torch.zeros(len(a), dtype=torch.float64)
    layers = iter(LAYERS)
    for index, layer in enumerate(vgg.double().features[:30]):
        x, y = layer(x.clone()), layer(y.clone())
        if index in (3, 8, 15, 22, 29):
            u, v = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
            difference = (u - v).square() * linear[next(layers)].double().view(-1, 1, 1)
            total += difference.sum(1).flatten(1).mean(1)
    vgg.float()
    return total


def test_lpips_is_the_definition_on_torchvisions_network(
    theirs: torchvision.models.VGG, vgg_file: Path
) -> None:
    network = perceptual_network("lpips-vgg", vgg_file)
    for size in ((32, 48), (17, 35)):
        a, b = pair(size)
        with torch.no_grad():
            ours, truth = network(a, b), lpips_in_float64(theirs, a, b)
        assert ours.dtype == torch.float32
        assert truth.min() > 1e-3
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0.0)


def test_lpips_is_that_of_the_package(vgg_file: Path) -> None:
    package = pytest.importorskip("lpips", reason="the package lpips is not installed")
    reference = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = torch.load(vgg_file, weights_only=True)
    own = {
        "features." + name.partition(".")[2]: name for name in reference.net.state_dict()
    }  # slice1.0.weight
    reference.net.load_state_dict({own[name]: tensor for name, tensor in state.items() if name in own})
    for index, name in enumerate(LAYERS):
        theirs = reference.lins[index].model[-1].weight.flatten()
        assert torch.equal(theirs, load_file(LINEAR_LAYERS)[name])
    a, b = pair()
    network = perceptual_network("lpips-vgg", vgg_file)
    torch.testing.assert_close(network(a, b), reference(a, b).flatten(), rtol=1e-5, atol=1e-7)
    a.requires_grad_()
    (ours,) = torch.autograd.grad(network(a, b).sum(), a)
    (published,) = torch.autograd.grad(reference(a, b).sum(), a)
    assert (ours - published).norm() <= 1e-4 * published.norm()


def test_the_linear_layers_are_the_published_numbers() -> None:
    layers = load_file(LINEAR_LAYERS)
    assert [layers[name].numel() for name in LAYERS] == [64, 128, 256, 512, 512]
    numbers = torch.cat([layers[name] for name in LAYERS])
    assert numbers.dtype == torch.float32 and numbers.min() > 0
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest() == DIGEST
    with safe_open(LINEAR_LAYERS, "pt") as file:
        assert "BSD-2-Clause" in file.metadata()["license"]
    assert "Richard Zhang" in LINEAR_LAYERS.with_suffix(".LICENSE").read_text()


def test_bfloat16_and_channels_last_stay_near_float32(vgg_file: Path) -> None:
    a, b = pair((64, 64))
    exact = perceptual_network("lpips-vgg", vgg_file)
    rounded = perceptual_network("lpips-vgg", vgg_file, torch.bfloat16)
    features = rounded.features(a)
    assert all(f.dtype == torch.bfloat16 for f in features)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    assert rounded.relu1_2.dtype == torch.float32, "the published weights are not rounded"
    distance = rounded(a, b)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, exact(a, b), rtol=2e-2, atol=0.0)


def test_surrounding_autocast_changes_nothing(vgg_file: Path) -> None:
    network, (a, b) = perceptual_network("lpips-vgg", vgg_file), pair()
    with torch.autocast("cpu", torch.bfloat16):
        surrounded = network(a, b)
    assert torch.equal(surrounded, network(a, b))


def networks(vgg_file: Path, mini: PerceptualNetwork) -> list[PerceptualNetwork]:
    return [perceptual_network("lpips-vgg", vgg_file), mini]


def test_what_both_networks_promise(vgg_file: Path, mini: PerceptualNetwork) -> None:
    for network in networks(vgg_file, mini):
        a, b = to_unit(to_uint8(pair()[0])), to_unit(to_uint8(pair()[1]))
        assert torch.equal(network(a, a), torch.zeros(2)), "equal images"
        assert network(a, b).shape == (2,) and network(a, b).dtype == torch.float32
        torch.testing.assert_close(network(a, b), network(b, a))
        torch.testing.assert_close(network(to_uint8(a), to_uint8(b)), network(a, b))
        torch.testing.assert_close(
            network(a, b)[:1], network(a[:1], b[:1]), msg="pairs do not see each other"
        )
        split = network.distance(network.features(a), network.features(b))
        torch.testing.assert_close(split, network(a, b))
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_gradient_reaches_the_prediction_alone(vgg_file: Path, mini: PerceptualNetwork) -> None:
    for network in networks(vgg_file, mini):
        a, b = pair()
        a.requires_grad_()
        b.requires_grad_()
        loss = network(a, b).sum()
        loss.backward()
        assert a.grad is not None and b.grad is None
        assert all(parameter.grad is None for parameter in network.parameters())
        # Along the gradient the distance falls as fast as the gradient says.
        step = 1e-2 * a.grad / a.grad.norm()
        with torch.no_grad():
            fallen = network(a + step, b).sum() - network(a - step, b).sum()
        assert fallen.item() == pytest.approx(2e-2 * a.grad.norm().item(), rel=0.05)


def test_features_of_the_target_record_no_graph(mini: PerceptualNetwork) -> None:
    recorded: list[bool] = []

    class Spy(PerceptualNetwork):
        def features(self, images: Tensor) -> list[Tensor]:
            maps = mini.features(images)
            recorded.append(any(m.requires_grad for m in maps))
            return maps

        def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
            return mini.distance(a, b)

    a, b = pair()
    Spy()(a.requires_grad_(), b.requires_grad_())
    assert sorted(recorded) == [False, True]


def test_feature_distance_is_the_formula_on_the_encoders_tokens() -> None:
    config = EncoderConfig("mini", layers=(0, 3, -1), scale_factor=2.0)
    encoder = build_encoder(config)
    a, b = pair((32, 32))
    expected = torch.zeros(2, dtype=torch.float64)
    for x, y in zip(encoder(a).layers, encoder(b).layers, strict=True):
        cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1)  # [B, N]
        expected += (2 - 2 * cosine).mean(dim=1) / 3
    torch.testing.assert_close(FeatureDistance(encoder)(a, b).double(), expected, rtol=1e-5, atol=0.0)


def test_mini_minds_lost_detail_more_than_a_change_of_brightness(mini: PerceptualNetwork) -> None:
    images = photographs()
    blurred = gaussian_blur(images, 1.0)
    size = (blurred - images).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    brighter = images + size  # as far in mean squared error
    assert (mini(blurred, images) > 3 * mini(brighter, images)).all()
    more = [mini(gaussian_blur(images, sigma), images) for sigma in (0.5, 1.0, 2.0)]
    assert (more[0] < more[1]).all() and (more[1] < more[2]).all()


def test_mini_in_bfloat16_stays_near_float32(mini: PerceptualNetwork) -> None:
    images = photographs()
    blurred = gaussian_blur(images, 2.0)
    distance = perceptual_network("mini", dtype=torch.bfloat16)(blurred, images)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, mini(blurred, images), rtol=5e-2, atol=0.0)


def test_images_that_do_not_fit_are_named(vgg_file: Path, mini: PerceptualNetwork) -> None:
    lpips = perceptual_network("lpips-vgg", vgg_file)
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, not 15 x 40"):
        lpips(torch.zeros(1, 3, 15, 40), torch.zeros(1, 3, 15, 40))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 16, 16\)"):
        lpips(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        mini(torch.zeros(1, 3, 20, 16), torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="unknown perceptual network 'vgg'; known: lpips-vgg, mini"):
        perceptual_network("vgg")  # type: ignore[arg-type]


def test_vgg_from_torch_and_safetensors_files(
    theirs: torchvision.models.VGG, vgg_file: Path, tmp_path: Path
) -> None:
    safetensors = tmp_path / "model.safetensors"
    state = {f"features.{name}": tensor for name, tensor in theirs.features.state_dict().items()}
    save_file({**state, "head.fc.weight": torch.zeros(2, 2)}, safetensors)
    for path in (vgg_file, safetensors, tmp_path):
        for name, tensor in load_vgg(path).state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_vgg_from_torchs_own_cache(vgg_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    vgg_file.rename(tmp_path / "checkpoints" / vgg_file.name)
    try:
        assert torch.equal(load_vgg().features[0].bias, load_vgg(tmp_path / "checkpoints").features[0].bias)
    finally:
        (tmp_path / "checkpoints" / vgg_file.name).rename(vgg_file)


def test_vgg_from_the_hub(vgg_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[str] = []

    def hub(repository: str, encoder: str) -> dict[str, Tensor]:
        asked.append(repository)
        return weights.read_weights(vgg_file)

    monkeypatch.setattr(perceptual, "read_hub_weights", hub)
    assert torch.equal(load_vgg().features[28].weight, load_vgg(vgg_file).features[28].weight)
    assert asked == ["timm/vgg16.tv_in1k"]


def test_missing_vgg_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(weights.hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as refusal:
        load_vgg()
    for said in (str(tmp_path / "checkpoints" / "vgg16-397923af.pth"), "timm/vgg16.tv_in1k", "mini"):
        assert said in str(refusal.value)
    with pytest.raises(
        ValueError, match="LPIPS needs ImageNet weights of VGG16: .*nowhere.pth does not exist"
    ):
        load_vgg(tmp_path / "nowhere.pth")


def test_weights_of_another_vgg_are_refused(tmp_path: Path) -> None:
    state = VGG16().state_dict()
    state["features.1.running_mean"] = torch.zeros(64)  # the variant with batch norm
    save_file(state, tmp_path / "vgg16_bn.safetensors")
    with pytest.raises(ValueError, match="VGG16; unknown: features.1.running_mean"):
        load_vgg(tmp_path / "vgg16_bn.safetensors")


def test_lpips_freezes_the_network_it_is_given() -> None:
    vgg = VGG16()
    LPIPS(vgg)
    assert not any(parameter.requires_grad for parameter in vgg.parameters())

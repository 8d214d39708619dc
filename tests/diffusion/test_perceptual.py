"""LPIPS against torchmetrics' on the same weights, read from files in the published layouts."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchvision.models.vgg import cfgs, make_layers

from common.errors import InputError
from diffusion.perceptual import LINEAR, LPIPS, VGG16


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """VGG16's convolutions with weights that keep the size of what goes through; torchvision's own, biases apart."""
    generator = torch.Generator().manual_seed(0)
    features = make_layers(cfgs["D"])
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    return features


@pytest.fixture(scope="module")
def root(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data with VGG16 as torchvision publishes it, the classifier shortened."""
    root = tmp_path_factory.mktemp("data")
    (root / "weights").mkdir()
    weights = {f"features.{key}": value for key, value in features.state_dict().items()}
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, root / VGG16)
    return root


@pytest.fixture(scope="module")
def reference(features: nn.Sequential) -> nn.Module:
    """torchmetrics' net with those weights and the published ones of the channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: features)
        return torchmetrics_lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True)


@pytest.fixture(scope="module")
def lpips(root: Path) -> LPIPS:
    return LPIPS().load(root)


def images(number: int, size: tuple[int, int] = (32, 40), channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(number)) * 2 - 1


@pytest.mark.parametrize("size", [(32, 40), (16, 16)])
def test_it_is_torchmetrics(lpips, reference, size):
    one, other = images(0, size), images(1, size)
    assert lpips(one, other).shape == (2,)
    torch.testing.assert_close(lpips(one, other), reference(one, other)[:, 0, 0, 0], rtol=1e-5, atol=0)


def test_its_gradient_is_torchmetrics(lpips, reference):
    one, other = images(0).requires_grad_(), images(1)
    ours, theirs = (torch.autograd.grad(net(one, other).sum(), one)[0] for net in (lpips, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_equal_images_have_no_distance_and_a_finite_gradient(lpips):
    one = images(0).requires_grad_()
    distance = lpips(one, one.detach())
    assert distance.tolist() == [0, 0]
    assert torch.autograd.grad(distance.sum(), one)[0].abs().max() == 0


def test_grey_images_are_seen_in_three_equal_channels(lpips):
    one, other = images(0, channels=1), images(1, channels=1)
    assert torch.equal(lpips(one, other), lpips(one.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_it_stays_in_fp32_under_autocast(lpips):
    one, other = images(0), images(1)
    plain = lpips(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(one, other), plain)
        assert lpips(one.bfloat16(), other).dtype == torch.float32


# Files


def test_a_file_of_channel_weights_comes_before_the_installed_one(root, lpips, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / VGG16).symlink_to(root / VGG16)
    published = {key: value for key, value in lpips.state_dict().items() if key.startswith("lin")}
    torch.save({key: 2 * value for key, value in published.items()}, tmp_path / LINEAR)
    doubled = LPIPS().load(tmp_path)
    torch.testing.assert_close(doubled(images(0), images(1)), 2 * lpips(images(0), images(1)))


def test_a_missing_vgg16_says_what_to_fetch_and_where_it_goes(tmp_path):
    with pytest.raises(InputError) as refused:
        LPIPS().load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}/weights/vgg16-397923af.pth: there is no such file; fetch torchvision's VGG16 of ImageNet "
        "(VGG16_Weights.IMAGENET1K_V1, vgg16-397923af.pth) and put it there, or train without the perceptual loss: "
        "--model.perceptual none"
    )


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "weights").mkdir()
    layers = make_layers(cfgs["A"]).state_dict()  # VGG11
    torch.save({f"features.{key}": value for key, value in layers.items()}, tmp_path / VGG16)
    with pytest.raises(InputError, match="vgg16-397923af.pth: not the weights of VGG16's LPIPS, for features.2.weight "
                                         "of shape 64x64x3x3 is not there"):  # fmt: skip
        LPIPS().load(tmp_path)

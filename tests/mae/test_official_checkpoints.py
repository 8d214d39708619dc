"""init_from: checkpoints in the layout that MAE releases, written out here and filled with random values."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from test_masked_autoencoder import published, published_table
from torch import Tensor

from common.data import Digits
from common.errors import InputError
from common.model import VisionTransformer
from common.training.checkpoints import read
from common.training.initialisation import initialise
from mae import MaskedAutoencoder

CONFIGS = Path(__file__).parents[2] / "mae" / "configs"

# Unless said otherwise patches of 2x2 on a grid of 4x4, 2 blocks of width 16, and a decoder of 3 blocks of width 24.
ENCODER = {"patch_size": 2, "width": 16, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 24, "decoder_depth": 3, "decoder_heads": 3}
TABLES = {"pos_embed", "decoder_pos_embed"}

Shapes = dict[str, tuple[int, ...]]


# The releases: names and shapes


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, width: int) -> Shapes:
    return {**norm(f"{name}.norm1", width),
            **linear(f"{name}.attn.qkv", width, 3 * width), **linear(f"{name}.attn.proj", width, width),
            **norm(f"{name}.norm2", width),
            **linear(f"{name}.mlp.fc1", width, 4 * width), **linear(f"{name}.mlp.fc2", 4 * width, width)}  # fmt: skip


def encoder(tokens: int = 16, patch_size: int = 2, channels: int = 3, depth: int = 2) -> Shapes:
    """What all three releases share: everything before the last norm."""
    shapes = {"cls_token": (1, 1, 16), "pos_embed": (1, tokens + 1, 16),
              "patch_embed.proj.weight": (16, channels, patch_size, patch_size),
              "patch_embed.proj.bias": (16,)}  # fmt: skip
    for index in range(depth):
        shapes |= block(f"blocks.{index}", 16)
    return shapes


def decoder(tokens: int = 16, values: int = 2 * 2 * 3) -> Shapes:
    shapes = {"mask_token": (1, 1, 24), "decoder_pos_embed": (1, tokens + 1, 24), **linear("decoder_embed", 16, 24)}
    for index in range(3):
        shapes |= block(f"decoder_blocks.{index}", 24)
    return {**shapes, **norm("decoder_norm", 24), **linear("decoder_pred", 24, values)}


ENCODER_RELEASE = {**encoder(), **norm("norm", 16)}
FULL_RELEASE = {**ENCODER_RELEASE, **decoder()}
FINETUNED_RELEASE = {**encoder(), **norm("fc_norm", 16), **linear("head", 16, 5)}


def save(path: Path, shapes: Shapes, **tensors: Tensor) -> dict[str, Tensor]:
    """Saves a release with random values, or the given ones, and returns its parameters."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1 and name.endswith("weight"):
            weights[name] = values / math.prod(shape[1:]) ** 0.5
        else:
            weights[name] = 0.2 * values + ("norm" in name and name.endswith("weight"))
    weights |= tensors
    torch.save({"model": weights}, path)
    return weights


# The nets


def autoencoder(**options) -> MaskedAutoencoder:
    torch.manual_seed(5)
    return MaskedAutoencoder(**{"image_size": 8, **ENCODER, **DECODER, **options}).eval()


def classifier(**options) -> VisionTransformer:
    torch.manual_seed(5)
    return VisionTransformer(**{"image_size": 8, "classes": 5, "pool": "avg", **ENCODER, **options}).eval()


def load(net: VisionTransformer, source: Path) -> dict:
    return initialise(net, net, str(source))


def assert_holds(net: VisionTransformer, weights: dict[str, Tensor], names: set[str]) -> None:
    own = net.state_dict()
    for name in names:
        expected = weights[name]
        if name == "patch_embed.proj.weight":
            expected = expected.permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(own[name], expected), name


# What is loaded


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_a_full_release_predicts_as_published(tmp_path: Path, position):
    fixed = {"pos_embed": published_table((4, 4), 16), "decoder_pos_embed": published_table((4, 4), 24)}
    weights = save(tmp_path / "full.pth", FULL_RELEASE, **(fixed if position == "sincos" else {}))
    net = autoencoder(position=position)
    report = load(net, tmp_path / "full.pth")
    computed = TABLES if position == "sincos" else set()
    assert set(report["loaded"]) == FULL_RELEASE.keys() - computed
    assert not report["missing"] and not report["unexpected"]
    assert not report["resampled"] and "position_prior" not in report
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 16)
    with torch.no_grad():
        loss, prediction, mask = net(images, noise, 0.75)
        expected = published(weights, images, noise, 0.75, heads=(2, 3))
    torch.testing.assert_close(prediction, expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(mask, expected[2]) and prediction.std() > 0.1


def test_an_encoder_release_leaves_the_decoder_fresh_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = save(tmp_path / "encoder.pth", ENCODER_RELEASE)
    net = autoencoder()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = load(net, tmp_path / "encoder.pth")
    assert set(report["loaded"]) == ENCODER_RELEASE.keys() and not report["unexpected"]
    assert set(report["missing"]) == decoder().keys()
    assert_holds(net, weights, ENCODER_RELEASE.keys())
    assert_holds(net, before, decoder().keys())
    assert re.search(r"init_from missing: 44 .*decoder_blocks \(36\)", capsys.readouterr().out)


def test_a_full_release_gives_a_classifier_its_encoder(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = save(tmp_path / "full.pth", FULL_RELEASE)
    net = classifier()
    report = load(net, tmp_path / "full.pth")
    assert set(report["loaded"]) == encoder().keys()
    assert set(report["missing"]) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(report["unexpected"]) == {"norm.weight", "norm.bias", *decoder()}
    assert_holds(net, weights, encoder().keys())
    images = torch.randn(2, 3, 8, 8)
    convolved = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=2)
    torch.testing.assert_close(net.patch_embed(images), convolved.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    said = capsys.readouterr().out
    assert "init_from missing: 4 fc_norm.weight, fc_norm.bias, head.weight, head.bias" in said
    assert re.search(r"init_from unexpected: 46 .*decoder_blocks \(36\)", said)


def test_a_classifier_on_the_class_token_takes_the_norm_too(tmp_path: Path):
    weights = save(tmp_path / "encoder.pth", ENCODER_RELEASE)
    net = classifier(pool="cls", classes=0)
    report = load(net, tmp_path / "encoder.pth")
    assert not report["missing"] and not report["unexpected"]
    assert_holds(net, weights, ENCODER_RELEASE.keys())


def test_a_fine_tuned_release_gives_timms_logits(tmp_path: Path):
    weights = save(tmp_path / "finetuned.pth", FINETUNED_RELEASE)
    reference = timm.models.VisionTransformer(img_size=8, patch_size=2, num_classes=5, embed_dim=16, depth=2,
                                              num_heads=2, global_pool="avg").eval()  # fmt: skip
    reference.load_state_dict(weights)
    net = classifier()
    report = load(net, tmp_path / "finetuned.pth")
    assert set(report["loaded"]) == FINETUNED_RELEASE.keys() == net.state_dict().keys()
    assert not report["missing"] and not report["unexpected"]
    images = torch.randn(3, 3, 8, 8)
    expected = reference(images)
    torch.testing.assert_close(net(images), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


# Another grid, another net


def test_both_learned_tables_are_resampled_to_another_grid(tmp_path: Path, capsys: pytest.CaptureFixture):
    weights = save(tmp_path / "full.pth", FULL_RELEASE)
    net = autoencoder(image_size=(12, 8))
    with pytest.warns(UserWarning, match="^pos_embed, decoder_pos_embed: the position table was interpolated"):
        report = load(net, tmp_path / "full.pth")
    assert set(report["loaded"]) == FULL_RELEASE.keys() and not report["missing"] and not report["unexpected"]
    assert report["resampled"] == ["pos_embed", "decoder_pos_embed"] and report["position_prior"] == "interpolated"
    assert "init_from resampled: 2 pos_embed, decoder_pos_embed" in capsys.readouterr().out
    assert_holds(net, weights, FULL_RELEASE.keys() - TABLES)
    for name, width in [("pos_embed", 16), ("decoder_pos_embed", 24)]:
        table = getattr(net, name)
        assert torch.equal(table[:, 0], weights[name][:, 0])  # the class token's row is no place
        plane = weights[name][:, 1:].reshape(1, 4, 4, width).permute(0, 3, 1, 2)
        expected = F.interpolate(plane, (6, 4), mode="bicubic", antialias=True)
        torch.testing.assert_close(table[:, 1:], expected.flatten(2).transpose(1, 2))


def test_fixed_tables_are_computed_for_another_grid(tmp_path: Path):
    fixed = {"pos_embed": published_table((4, 4), 16), "decoder_pos_embed": published_table((4, 4), 24)}
    weights = save(tmp_path / "full.pth", FULL_RELEASE, **fixed)
    net = autoencoder(image_size=(12, 8), position="sincos")
    report = load(net, tmp_path / "full.pth")
    assert set(report["loaded"]) == FULL_RELEASE.keys() - TABLES
    assert not report["resampled"] and "position_prior" not in report
    assert_holds(net, weights, FULL_RELEASE.keys() - TABLES)
    torch.testing.assert_close(net.pos_embed, published_table((6, 4), 16), atol=1e-6, rtol=0)
    torch.testing.assert_close(net.decoder_pos_embed, published_table((6, 4), 24), atol=1e-6, rtol=0)


def test_learned_tables_that_a_fixed_one_replaces_are_said(tmp_path: Path):
    save(tmp_path / "full.pth", FULL_RELEASE)
    with pytest.warns(UserWarning, match="pos_embed is not taken, since model.position=sincos"):
        report = load(autoencoder(position="sincos"), tmp_path / "full.pth")
    assert {"pos_embed", "decoder_pos_embed"} <= set(report["unexpected"])


def test_learned_tables_that_start_as_sines_and_cosines_are_recorded(tmp_path: Path):
    save(tmp_path / "full.pth", FULL_RELEASE, pos_embed=published_table((4, 4), 16))
    assert load(classifier(), tmp_path / "full.pth")["position_prior"] == "sincos"


@pytest.mark.parametrize("net", [autoencoder, classifier])
@pytest.mark.parametrize("options, message", [
    ({"width": 8}, r"cls_token \(1, 1, 8\) \(there \(1, 1, 16\)\)"),
    ({"depth": 3}, r"blocks.2.norm1.weight \(16,\) \(absent\), .* and 9 more"),
    ({"patch_size": 4, "image_size": 16}, r"patch_embed.proj.weight \(16, 48\) \(there \(16, 3, 2, 2\)\)"),
])  # fmt: skip
def test_another_encoder_is_refused(tmp_path: Path, net: Callable, options, message):
    save(tmp_path / "full.pth", FULL_RELEASE)
    with pytest.raises(InputError, match=f"full.pth does not cover the encoder: {message}"):
        load(net(**options), tmp_path / "full.pth")


@pytest.mark.parametrize("net", [autoencoder, classifier])
def test_a_shallower_encoder_is_refused(tmp_path: Path, net: Callable):
    save(tmp_path / "full.pth", FULL_RELEASE)
    with pytest.raises(InputError, match=r"has blocks that this encoder lacks: blocks.1.norm1.weight \(16,\) \(absent"):
        load(net(depth=1), tmp_path / "full.pth")


@pytest.mark.parametrize("options", [{"decoder_width": 12}, {"decoder_depth": 4}, {"decoder_depth": 2}])
def test_another_decoder_is_fresh_as_a_whole(tmp_path: Path, options):
    save(tmp_path / "full.pth", FULL_RELEASE)
    net = autoencoder(**options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = load(net, tmp_path / "full.pth")
    names = {name for name in before if name.startswith("decoder_")}
    assert names <= set(report["missing"]) and not names & set(report["loaded"])
    assert_holds(net, before, names)


def test_the_table_of_a_fresh_decoder_was_not_resampled(tmp_path: Path):
    save(tmp_path / "full.pth", FULL_RELEASE)
    with pytest.warns(UserWarning, match="^pos_embed: the position table"):
        report = load(autoencoder(image_size=(12, 8), decoder_depth=4), tmp_path / "full.pth")
    assert report["resampled"] == ["pos_embed"] and "decoder_pos_embed" in report["missing"]


def test_options_beside_the_weights_do_no_harm(tmp_path: Path):
    weights = save(tmp_path / "full.pth", FULL_RELEASE)
    torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(blr=1e-3)}, tmp_path / "training.pth")
    assert set(load(autoencoder(), tmp_path / "training.pth")["loaded"]) == FULL_RELEASE.keys()


# The command: the release has what the fixture's small net on digits has

SMALL_ENCODER = encoder(tokens=4, patch_size=4, channels=1, depth=1)
SMALL_PRETRAINED = {**SMALL_ENCODER, **norm("norm", 16)}
SMALL_FULL = {**SMALL_PRETRAINED, **decoder(tokens=4, values=4 * 4)}
SMALL_FINETUNED = {**SMALL_ENCODER, **norm("fc_norm", 16), **linear("head", 16, 10)}
AS_THERE = [word for key, value in DECODER.items() for word in (f"--model.{key}", value)]


@pytest.mark.parametrize("config, options, shapes, loaded", [
    ("digits.yaml", AS_THERE, SMALL_FULL, SMALL_FULL),
    ("digits.yaml", AS_THERE, SMALL_PRETRAINED, SMALL_PRETRAINED),
    ("digits_finetune.yaml", [], SMALL_FULL, SMALL_ENCODER),
    ("digits_finetune.yaml", [], SMALL_FINETUNED, SMALL_FINETUNED),
])  # fmt: skip
def test_the_command_starts_from_a_release(command: Callable, tmp_path: Path, config, options, shapes, loaded):
    weights = save(tmp_path / "release.pth", shapes)
    options = [*options, "--init_from", "release.pth", "--run_name", "a", "--model.optim.lr", "0"]  # trains nothing
    outcome = command("fit", *options, config=CONFIGS / config, study="mae")
    assert outcome.code == 0, outcome.err
    assert f"init_from loaded: {len(loaded)} " in outcome.out
    results = json.loads((tmp_path / "runs/mae/a/results.json").read_text())
    assert set(results["init_from"]["loaded"]) == loaded.keys()
    trained = read(tmp_path / "runs/mae/a/checkpoints/last.ckpt")["state_dict"]
    for name in loaded.keys() - {"patch_embed.proj.weight"}:
        assert torch.equal(trained[f"net.{name}"], weights[name]), name


def test_the_command_validates_a_fine_tuned_release_as_it_is(command: Callable, tmp_path: Path):
    weights = save(tmp_path / "release.pth", SMALL_FINETUNED)
    outcome = command("validate", "--init_from", "release.pth", config=CONFIGS / "digits_finetune.yaml", study="mae")
    assert outcome.code == 0, outcome.err
    images, labels = Digits().read(tmp_path, "val")
    reference = timm.models.VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16,
                                              depth=1, num_heads=2, global_pool="avg").eval()  # fmt: skip
    reference.load_state_dict(weights)
    with torch.no_grad():
        logits = reference(images / 127.5 - 1)
    rows = dict(line.split() for line in outcome.out.splitlines() if len(line.split()) == 2)
    assert float(rows["acc1"]) == pytest.approx(100 * (logits.argmax(dim=1) == labels).float().mean().item(), abs=0.01)
    assert float(rows["loss"]) == pytest.approx(F.cross_entropy(logits, labels).item(), abs=0.01)


def test_the_command_does_not_validate_a_decoder_that_was_never_trained(command: Callable, tmp_path: Path):
    save(tmp_path / "release.pth", SMALL_PRETRAINED)
    outcome = command("validate", *AS_THERE, "--init_from", "release.pth", config=CONFIGS / "digits.yaml", study="mae")
    assert outcome.code == 2 and "release.pth lacks mask_token, decoder_pos_embed" in outcome.err
    assert not (tmp_path / "runs").exists()

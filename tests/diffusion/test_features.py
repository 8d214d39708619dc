"""Extractors against torch-fidelity's network on random weights, and against the results of a trained run."""

import json
import shutil
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

import diffusion.features
from common.data import Digits
from common.errors import InputError
from diffusion.features import Inception, load_classifier, sha256

CONFIGS = Path(__file__).parents[2] / "supervised" / "configs"


@pytest.fixture(scope="module")
def theirs() -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with random weights under which features do not vanish."""
    with mock.patch("torch.load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        net = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased", "logits"], "no file")
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(theirs.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights) -> Inception:
    with warnings.catch_warnings(action="ignore"):
        return Inception(weights)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (2, 3, 20, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_pooled_features_and_logits_without_bias_are_torch_fidelitys(inception, theirs, images):
    pooled, unbiased, biased = theirs(images)
    found = inception(images)
    assert found.pooled.shape == (2, 2048) and found.logits.shape == (2, 1008) and found.pooled.std() > 0.01
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=0)
    torch.testing.assert_close(found.logits, unbiased, rtol=0, atol=0)
    torch.testing.assert_close(found.logits + theirs.fc.bias, biased)
    assert (found.logits - biased).abs().max() > 0.01


def test_spatial_features_are_the_first_branch_of_mixed_6d_in_rows_columns_channels(inception, theirs, images):
    x = (interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                 "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
        x = getattr(theirs, name)(x)
    branch = theirs.Mixed_6d.branch1x1
    x = F.relu(branch.bn(branch.conv(x)))
    spatial = inception(images).spatial
    assert x.shape == (2, 192, 17, 17) and spatial.shape == (2, 17 * 17 * 7)
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 3, 2), (16, 16, 6)]:
        torch.testing.assert_close(spatial[:, (row * 17 + column) * 7 + channel], x[:, channel, row, column])
    assert (spatial > 0).float().mean() > 0.1


def test_neither_autocast_nor_a_lowered_matmul_precision_changes_features(inception, images):
    expected = inception(images)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = inception(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["images.float()", "images[0]", "images[:, :1]", "images.permute(0, 2, 3, 1)"])
def test_images_that_are_not_uint8_channels_first_are_refused(inception, images, wrong):
    with pytest.raises(InputError, match=r"takes uint8 \(B, 3, H, W\) in 0-255"):
        inception(eval(wrong))


def test_a_missing_weights_file_says_what_to_fetch_and_where_it_goes(tmp_path):
    with pytest.raises(InputError, match=r"w\.pth: there is no such file.*fetch https://github\.com/toshas/torch-fidelity/releases/"
                                         r"download/v0\.2\.0/weights-inception-2015-12-05-6726825d\.pth"):
        Inception(tmp_path / "w.pth")


def test_a_file_that_is_not_inceptions_weights_is_refused(weights, tmp_path):
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"truncated\.pth: truncated"):
        Inception(truncated)
    other = tmp_path / "other.pth"
    torch.save({key: value for key, value in torch.load(weights).items() if "Mixed_6d" not in key}, other)
    with pytest.raises(InputError, match=r"other\.pth: does not hold Inception's weights .*Mixed_6d"):
        Inception(other)


def test_weights_other_than_the_published_file_are_warned_of(weights, monkeypatch):
    with pytest.warns(UserWarning, match="not the published file"):
        found = Inception(weights)
    assert found.sha256 == sha256(weights)
    monkeypatch.setattr(diffusion.features, "INCEPTION_SHA256", sha256(weights))
    with warnings.catch_warnings(action="error"):
        Inception(weights)


# A classifier of the suite


@pytest.fixture
def run_folder(command) -> Path:
    """A short training on 8x8 digits, with an average of the weights."""
    outcome = command("fit", "--run_name", "judge", "--model.optim.ema", 0.5)
    assert outcome.code == 0, outcome.err
    return Path("runs/supervised/judge")


def test_the_classifier_of_a_run_is_the_one_that_the_run_was_judged_by(run_folder):
    digits = Digits().read(Path("data"), "val")
    classifier = load_classifier(run_folder)
    pooled, spatial, logits = classifier(digits.images)
    accuracy = 100 * (logits.argmax(1) == digits.labels).double().mean()
    measured = json.loads((run_folder / "results.json").read_text())["metrics"]
    assert float(accuracy) == pytest.approx(measured["val/acc1"]) != pytest.approx(measured["val_raw/acc1"])
    assert float(F.cross_entropy(logits, digits.labels)) == pytest.approx(measured["val/loss"], rel=1e-5)
    assert spatial is None
    # The pooled features are what the head sees.
    average = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["ema"]["state_dict"]
    assert pooled.shape == (300, 16) == (300, classifier.features)
    torch.testing.assert_close(logits, F.linear(pooled, average["head.weight"], average["head.bias"]))
    assert classifier.sha256 == sha256(run_folder / "checkpoints" / "last.ckpt")


def test_images_of_another_size_are_fitted_to_the_classifiers(run_folder):
    classifier = load_classifier(run_folder)
    digits = Digits().read(Path("data"), "val").images[:4]
    enlarged = digits.repeat_interleave(3, 2).repeat_interleave(3, 3)
    fitted = F.interpolate(enlarged / 255, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(classifier(enlarged).pooled, classifier.net((fitted - 0.5) / 0.5), rtol=1e-4, atol=1e-4)


def test_a_run_of_ones_own_class_keeps_its_transformation(run_folder, tmp_path, monkeypatch):
    (tmp_path / "blind.py").write_text("from supervised import Classification\n\n\nclass Blind(Classification):\n"
                                       "    def transform(self, images):\n        return 0 * images\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["model"]["class_path"] = "blind.Blind"
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    logits = load_classifier(run_folder)(Digits().read(Path("data"), "val").images[:4]).logits
    torch.testing.assert_close(logits, logits[:1].expand(4, -1))


def test_what_is_no_classifier_is_refused_with_the_reason(run_folder, tmp_path):
    def refusal(folder: Path) -> str:
        with pytest.raises(InputError) as error:
            load_classifier(folder)
        return str(error.value)

    assert "there is no run folder" in refusal(tmp_path / "nothing")
    assert "neither inception nor the run folder" in refusal(tmp_path)
    shutil.copytree(run_folder, tmp_path / "bare", ignore=lambda *_: ["checkpoints"])
    assert "bare holds no checkpoint" in refusal(tmp_path / "bare")
    text = (run_folder / "config.yaml").read_text()
    (tmp_path / "bare" / "config.yaml").write_text(text.replace("Classification", "Classify"))
    assert "(Problem with given class_path 'supervised.Classify': module 'supervised'" in refusal(tmp_path / "bare")
    shutil.copyfile(CONFIGS / "rooms.yaml", tmp_path / "bare" / "config.yaml")
    assert "is a run of Depth, which is no classification" in refusal(tmp_path / "bare")
    (run_folder / "config.yaml").write_text(text.replace("width: 16", "width: 32"))
    assert "does not fit the config of its run folder" in refusal(run_folder)

"""Pre-training as its user sees it: fit, validate, pictures at their cadence, predictions, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mae.pretraining
from common.data import Digits
from common.training.checkpoints import read
from mae.pictures import MASKED


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def scores(out: str) -> dict[str, float]:
    """The printed table: name -> value."""
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[0] in ("loss", "mse", "mse_of_mean")}


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The panels (B, 4, 3, H, W) of every figure that a command draws; of 2 validation images, which are quick."""
    record, figure = [], mae.pretraining.figure
    monkeypatch.setattr(mae.pretraining, "SHOWN", 2)

    def recorded(shown: torch.Tensor, title: str):
        record.append(shown)
        return figure(shown, title)

    monkeypatch.setattr(mae.pretraining, "figure", recorded)
    return record


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two grey pictures of the digits' own size, one of them in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "further").mkdir(parents=True)
    for seed, name in enumerate(("first.png", "further/second.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(folder / name)
    return folder


def test_the_same_command_gives_the_same_weights(done: Callable, tmp_path: Path) -> None:
    options = ["--data.augment.crop_scale", "[0.3,1.0]", "--data.augment.flip", "0.5", "--model.optim.ema", "0.9",
               "--data.batch_per_device", "64"]  # fmt: skip
    found = []
    for folder in ("one", "other"):
        done("fit", *options, "--runs", folder, "--run_name", "a")
        checkpoint = read(tmp_path / folder / "mae/a/checkpoints/last.ckpt")
        metrics = results(tmp_path / folder / "mae/a")["metrics"]
        timed = ("train/images_per_second", "train/data_wait")
        scored = {tag: value for tag, value in metrics.items() if tag not in timed}
        found.append((checkpoint["state_dict"], checkpoint["ema"]["state_dict"], scored))
    for one, other in zip(*(run[:2] for run in found), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert found[0][2] == found[1][2] and "val_raw/mse_of_mean" in found[0][2]


# Pictures of a training


def test_pictures_are_drawn_at_their_cadence_and_after_the_last_epoch(
    done: Callable, tmp_path: Path, drawn: list
) -> None:
    done("fit", "--run_name", "a", "--model.picture_epochs", "2", "--trainer.max_epochs", "5")
    folder = tmp_path / "runs/mae/a"
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["val/reconstruction"]
    logged = events.Images("val/reconstruction")
    assert [picture.step for picture in logged] == [18, 36, 45]  # 9 steps an epoch
    (file,) = (folder / "figures").iterdir()
    assert file.name == "reconstruction.png"
    last = np.asarray(Image.open(io.BytesIO(logged[-1].encoded_image_string)))
    np.testing.assert_array_equal(np.asarray(Image.open(file)), last)

    first, second, third = drawn
    digits = Digits().read(tmp_path, "val").images[:2] / 255
    torch.testing.assert_close(first[:, 0], digits.expand(-1, 3, -1, -1), atol=1e-6, rtol=0)
    for later in (second, third):
        assert torch.equal(first[:, :2], later[:, :2])  # the same images under the same masks
        assert not torch.equal(first[:, 2], later[:, 2])


def test_no_pictures_are_drawn_where_none_are_asked_for(done: Callable, tmp_path: Path, drawn: list) -> None:
    done("fit", "--run_name", "a", "--model.picture_epochs", "0")
    assert not drawn and not (tmp_path / "runs/mae/a/figures").exists()


def test_the_picture_is_that_of_the_average(done: Callable, tmp_path: Path, drawn: list) -> None:
    """The same training with and without an average: it must show where there is one."""
    for run, ema in [("raw", "null"), ("ema", "0.9")]:
        done("fit", "--run_name", run, "--model.picture_epochs", "5", "--model.optim.ema", ema)
    weights = [read(tmp_path / f"runs/mae/{run}/checkpoints/last.ckpt")["state_dict"] for run in ("raw", "ema")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    raw, average = drawn
    assert torch.equal(raw[:, :2], average[:, :2]) and not torch.equal(raw[:, 2], average[:, 2])


# Predictions


@pytest.mark.parametrize("typed", ["{}/pictures", "./further/../pictures/"])
def test_a_prediction_writes_a_picture_of_each_file(
    done: Callable, tmp_path: Path, pictures: Path, drawn: list, typed: str
) -> None:
    (tmp_path / "further").mkdir()
    options = ["--run_name", "a", "--trainer.max_epochs", "1"]
    done("fit", *options)
    folder, before, given = tmp_path / "runs/mae/a", content(tmp_path / "runs/mae/a"), content(pictures)
    out = done("predict", *options, "--data.images", typed.format(tmp_path))
    assert out == "reconstructions -> runs/mae/a/predictions\n"
    after = content(folder)
    assert after.keys() - before.keys() == {Path("predictions/first.png.png"),
                                            Path("predictions/further/second.png.png")}  # fmt: skip
    assert before.items() <= after.items() and content(pictures) == given
    assert Image.open(folder / "predictions/first.png.png").format == "PNG"
    for shown, name in zip(drawn, ("first.png", "further/second.png"), strict=True):
        pixels = torch.from_numpy(np.array(Image.open(pictures / name))) / 255
        torch.testing.assert_close(shown[0, 0], pixels.expand(3, -1, -1), atol=1e-5, rtol=0)


def test_a_prediction_takes_a_ratio_and_a_seed_of_its_own(
    done: Callable, tmp_path: Path, pictures: Path, drawn: list
) -> None:
    done("fit", "--run_name", "a")
    folder = tmp_path / "runs/mae/a"
    options = ["--run_name", "a", "--data.images", "pictures"]

    def predicted(*more: str) -> tuple[dict[Path, bytes], list[float]]:
        """The files, and the share of each picture's pixels that are shown as masked."""
        drawn.clear()
        done("predict", *options, *more)
        colour = torch.tensor(MASKED)[:, None, None]
        return content(folder / "predictions"), [(row[0, 1] == colour).all(0).float().mean().item() for row in drawn]

    config = (folder / "config.yaml").read_bytes()
    as_trained, trained_shares = predicted()
    half, half_shares = predicted("--model.predict.mask_ratio", "0.5")
    other, other_shares = predicted("--model.predict.mask_ratio", "0.5", "--model.predict.seed", "3")
    assert (trained_shares, half_shares, other_shares) == ([0.75] * 2, [0.5] * 2, [0.5] * 2)
    for name in as_trained:
        assert len({as_trained[name], half[name], other[name]}) == 3, name
    assert predicted("--model.predict.mask_ratio", "0.5", "--model.predict.seed", "3")[0] == other
    assert predicted()[0] == as_trained
    assert predicted("--model.predict.seed", "0")[0] == as_trained  # the run's own
    assert (folder / "config.yaml").read_bytes() == config


# Weights that are no run


def test_weights_are_validated_and_shown_without_a_run(
    done: Callable, tmp_path: Path, pictures: Path, drawn: list
) -> None:
    done("fit", "--run_name", "source", "--model.optim.ema", "0.9")
    source = tmp_path / "runs/mae/source"
    before, trained = content(tmp_path / "runs"), results(source)["metrics"]
    out = done("validate", "--init_from", "runs/mae/source")
    assert "runs/mae/source on digits, val: 300 images" in out
    expected = {name: trained[f"val/{name}"] for name in ("loss", "mse", "mse_of_mean")}
    assert trained["val/loss"] != pytest.approx(trained["val_raw/loss"], abs=1e-3)
    assert scores(out) == pytest.approx(expected, abs=1e-4)
    assert content(tmp_path / "runs") == before and not list((tmp_path / "runs/mae").glob("digits*"))

    done("predict", "--run_name", "source", "--model.optim.ema", "0.9", "--data.images", "pictures")
    done("predict", "--init_from", "runs/mae/source", "--run_name", "shown", "--data.images", "pictures")
    assert content(tmp_path / "runs/mae/shown/predictions") == content(source / "predictions")
    assert content(tmp_path / "runs/mae/shown").keys() == {Path("predictions") / name for name in (
        "first.png.png", "further/second.png.png")}  # fmt: skip
    assert before.items() <= content(tmp_path / "runs").items()


def test_a_run_s_own_checkpoint_counts_and_not_what_it_started_from(
    done: Callable, tmp_path: Path, pictures: Path
) -> None:
    done("fit", "--run_name", "source")
    started = ["--init_from", "runs/mae/source", "--run_name", "second", "--seed_everything", "1"]
    done("fit", *started)
    source, second = (results(tmp_path / "runs/mae" / run) for run in ("source", "second"))
    assert second["metrics"]["val/loss"] < source["metrics"]["val/loss"] - 0.01  # it went on from there
    out = done("validate", *started)
    assert "runs/mae/second after 18 steps on digits, val: 300 images" in out
    assert scores(out)["loss"] == pytest.approx(second["metrics"]["val/loss"], abs=1e-4)
    assert results(tmp_path / "runs/mae/second") == second

    done("predict", *started, "--data.images", "pictures")
    found = content(tmp_path / "runs/mae/second/predictions")
    done("predict", "--run_name", "source", "--data.images", "pictures", "--model.predict.seed", "1")
    assert not found.items() & content(tmp_path / "runs/mae/source/predictions").items()


# What is refused


SHARE = "is not a share between 0 and 1, both excluded; MAE masks 0.75"


@pytest.mark.parametrize("arguments, line", [
    (["--model.mask_ratio", "0"], f"model.mask_ratio: 0.0 {SHARE}"),
    (["--model.mask_ratio", "1"], f"model.mask_ratio: 1.0 {SHARE}"),
    (["--model.mask_ratio", "-0.1"], f"model.mask_ratio: -0.1 {SHARE}"),
    (["--model.mask_ratio", "1.5"], f"model.mask_ratio: 1.5 {SHARE}"),
    (["--model.mask_ratio", "nan"], "model.mask_ratio: nan is not a finite number"),
    (["--model.predict.mask_ratio", "1"], f"model.predict.mask_ratio: 1.0 {SHARE}"),
    (["--model.predict.mask_ratio", "0"], f"model.predict.mask_ratio: 0.0 {SHARE}"),
    (["--model.mask_ratio", "0.99"], "model.mask_ratio: 0.99 leaves 0 of 16 tokens visible; at least one must be "
                                     "visible and one masked"),
    (["--model.predict.mask_ratio", "0.99"], "model.predict.mask_ratio: 0.99 leaves 0 of 16 tokens visible; at least "
                                             "one must be visible and one masked"),
    (["--model.patch_size", "3"], "model.patch_size=3 does not divide image_size=8x8; nearest that do: 2 and 4"),
    (["--model.decoder_heads", "3"], "model.decoder_heads=3 does not divide decoder_width=16; nearest that do: 2 and "
                                     "4"),
    (["--model.decoder_depth", "0"], "model.decoder_depth=0 must be at least 1"),
    (["--model.patch_size", "1", "--model.norm_pix_loss", "patch"],
     "model.norm_pix_loss=patch: a patch of one pixel and one channel has no variance; choose none or image"),
    (["--model.norm_pix_loss", "pach"], "model.norm_pix_loss: pach is none of none, patch, image"),
    (["--model.picture_epochs", "-1"], "model.picture_epochs: -1 is negative; 0 logs no pictures"),
    (["--init_from", "absent"], "--init_from: there is no run folder or file absent"),
])  # fmt: skip
def test_what_is_refused_in_one_line(mae: Callable, tmp_path: Path, arguments: list[str], line: str) -> None:
    said = mae("fit", "--run_name", "a", *arguments)
    assert (said.code, said.err.splitlines()[-1]) == (2, f"error: {line}")
    assert "Traceback" not in said.err and not (tmp_path / "runs/mae/a").exists()


def test_a_prediction_s_ratio_is_refused_for_a_trained_run(mae: Callable, done: Callable, pictures: Path) -> None:
    done("fit", "--run_name", "a")
    for ratio, line in [("1", f"1.0 {SHARE}"), ("0.99", "0.99 leaves 0 of 16 tokens visible")]:
        said = mae("predict", "--run_name", "a", "--data.images", "pictures", "--model.predict.mask_ratio", ratio)
        assert said.code == 2 and said.err.splitlines()[-1].startswith(f"error: model.predict.mask_ratio: {line}")


def test_targets_without_brightness_are_warned_of(done: Callable, recwarn: pytest.WarningsRecorder) -> None:
    def warned(*options: str) -> bool:
        recwarn.clear()
        done("check", "--data.source.train", "8", *options, config="shapes")
        return any("its brightness is lost" in str(warning.message) for warning in recwarn)

    assert warned("--model.patch_size", "1", "--model.norm_pix_loss", "patch")
    assert not warned("--model.patch_size", "2", "--model.norm_pix_loss", "patch")
    assert not warned("--model.patch_size", "1", "--model.norm_pix_loss", "image")


def test_a_config_of_another_study_is_refused(mae: Callable, command: Callable) -> None:
    supervised = Path(__file__).parents[2] / "supervised" / "configs" / "digits.yaml"
    outcome = command("fit", config=supervised, study="mae")
    assert outcome.code == 2 and "is a config of another study; run it with python -m supervised" in outcome.err


def test_a_run_that_is_named_knows_its_source(done: Callable) -> None:
    done("fit", "--run_name", "source")
    done("fit", "--run_name", "a", "--init_from", "runs/mae/source", config="digits_finetune")
    assert "runs/mae/a after 18 steps on digits, val: 300 images" in done("validate", "--run_name", "a",
                                                                         config="digits_finetune")  # fmt: skip

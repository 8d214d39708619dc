"""The life of a run as its user sees it: check, fit, fit again, validate, test, predict."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import archives
import numpy as np
import pytest
from PIL import Image

CONFIGS = Path(__file__).parent.parent / "supervised" / "configs"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def table(out: str) -> dict[str, list[float]]:
    """The printed rows: name -> values of the columns."""
    rows = (line.split() for line in out.splitlines())
    return {row[0]: [float(value) for value in row[1:]] for row in rows
            if len(row) > 1 and all(re.fullmatch(r"-?\d+\.\d+", value) for value in row[1:])}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """PNGs of two classes with splits, and below `new` some without a label."""
    for number, name in enumerate(f"{split}/{kind}/{i}.png" for split in ("train", "val", "test") for kind in
                                  ("cat", "dog") for i in range(4)):  # fmt: skip
        archives.noise(tmp_path / "pictures" / name, (40, 36), number)
    archives.noise(tmp_path / "new" / "first.png", (90, 30), 1)
    archives.noise(tmp_path / "new" / "further" / "second.jpg", (20, 50), 2)
    return tmp_path / "pictures"


def test_the_life_of_a_classification(command: Callable, scalars: Callable, tmp_path: Path, pictures: Path) -> None:
    options = ["--data.source.path", pictures, "--data.workers", "0", "--model.optim.ema", "0.5", "--run_name", "a"]
    folder = tmp_path / "runs" / "supervised" / "a"

    def run(word: str, *more: str) -> str:
        outcome = command(word, *options, *more, config=CONFIGS / "image_folder.yaml")
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert "train: 8 images, 4 a class" in run("check") and not folder.exists()
    run("fit")
    trained, weights = results(folder), (folder / "checkpoints" / "last.ckpt").read_bytes()
    assert run("fit").startswith("finished: ")

    shown = run("validate")
    assert "after 2 steps on pictures, val: 8 images" in shown
    for name, row in table(shown).items():
        expected = [trained["metrics"][f"{stage}/{name}"] for stage in ("val", "val_raw")]
        assert row == pytest.approx(expected, abs=0.005)
    assert {"loss", "acc1", "acc5"} == table(shown).keys()
    assert results(folder) == trained  # the same weights on the same images

    assert "not all images" in run("test", "--data.eval_batch_size", "3", "--trainer.limit_test_batches", "1")
    assert results(folder) == trained
    shown = run("test")
    tested = results(folder)["metrics"]
    assert table(shown)["loss"] == pytest.approx([tested["test/loss"], tested["test_raw/loss"]], abs=1e-4)
    assert trained["metrics"].items() < tested.items()
    curves = scalars(folder)
    assert curves["test/loss"][-1] == (2, pytest.approx(tested["test/loss"]))  # at the steps trained, not at 0
    assert {step for step, _ in curves["val_raw/acc1"]} == {1, 2}

    assert "2 images -> " in run("predict", "--data.images", str(tmp_path / "new"))
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class1", "probability1", "class2", "probability2"]
    assert [Path(row["file"]).relative_to(tmp_path / "new").as_posix() for row in rows] == [
        "first.png", "further/second.jpg"]  # fmt: skip
    for row in rows:
        likely, other = float(row["probability1"]), float(row["probability2"])
        assert likely >= other and likely + other == pytest.approx(1, abs=2e-6)
        assert {row["class1"], row["class2"]} == {"cat", "dog"}
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == weights


def test_the_life_of_a_depth_estimation(command: Callable, tmp_path: Path, pictures: Path) -> None:
    options = ["--data.source.train", "16", "--data.source.val", "4", "--data.source.test", "5", "--run_name", "a",
               "--model.patch_size", "6"]  # fmt: skip
    folder = tmp_path / "runs" / "supervised" / "a"

    def run(word: str, *more: str) -> str:
        outcome = command(word, *options, *more, config=CONFIGS / "rooms.yaml")
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert "rooms train: 16 images of 48x64" in run("check") and not folder.exists()
    run("fit")
    trained = results(folder)
    assert table(run("validate"))["rmse"] == pytest.approx([trained["metrics"]["val/rmse"]], abs=1e-4)
    assert results(folder) == trained
    shown = run("test")
    assert "test: 5 images" in shown and table(shown)["rae"] == pytest.approx([results(folder)["metrics"]["test/rae"]],
                                                                              abs=1e-4)  # fmt: skip
    run("predict", "--data.images", str(tmp_path / "new"))
    for name, shape in [("first.png", (30, 90)), ("further/second.jpg", (50, 20))]:
        millimetres = np.array(Image.open(folder / "predictions" / f"{name}.depth.png"))
        assert millimetres.shape == shape and millimetres.dtype == np.uint16 and 1 <= millimetres.min()
        assert np.array(Image.open(folder / "predictions" / f"{name}.preview.png")).shape == (*shape, 3)


def test_a_prediction_without_images_says_what_to_give(command: Callable) -> None:
    assert command("fit", "--run_name", "a").code == 0
    outcome = command("predict", "--run_name", "a")
    assert outcome.code == 2 and "data.images: None is not a folder; name one" in outcome.err


@pytest.mark.parametrize("word", ["validate", "test", "predict"])
def test_what_was_not_trained_is_not_evaluated(command: Callable, word: str) -> None:
    outcome = command(word, "--run_name", "a", "--data.images", ".")
    assert outcome.code == 2 and f"there is no checkpoint to {word}" in outcome.err

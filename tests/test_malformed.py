"""Malformed input on the real command, each in a process of its own: one line, the exit code, and nothing lost."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import archives
import forked
import h5py
import numpy as np
import pytest
import torch
import yaml
from scipy.io import savemat
from small import SMALL

from common.training.checkpoints import read

CONFIGS = forked.ROOT / "supervised" / "configs"
RED = np.full((1, 3072), 200, np.uint8)


class Said(NamedTuple):
    """What a user sees of a command that stopped: the exit code and its last word."""

    code: int
    line: str


def start(folder: Path, module: str, *arguments: object) -> Said:
    """Runs `python -m MODULE ARGUMENTS` in `folder`."""
    process = forked.run(module, *arguments, cwd=folder)
    said = [line for line in process.stderr.splitlines() if line.startswith(("error: ", "failed: "))]
    assert "Traceback" not in process.stdout + process.stderr
    assert len(said) == (process.returncode > 0), process.stderr
    assert process.stderr.rstrip().endswith(said[0] if said else ""), process.stderr
    return Said(process.returncode, said[0] if said else "")


def supervised(folder: Path, subcommand: str, *arguments: object, config: str | Path = "digits.yaml") -> Said:
    return start(folder, "supervised", subcommand, "--config", CONFIGS / config, *SMALL, *arguments)


def assert_refused(said: Said, *parts: object) -> None:
    assert said.code == 2 and all(str(part) in said.line for part in parts), said


# What the user types


@pytest.mark.parametrize("arguments, parts", [
    (["--model.patchsize", 1], ["model.patchsize", "the command line", "did you mean model.patch_size?"]),
    (["--run_nam", "x"], ["run_nam: unknown key", "did you mean run_name?"]),
    (["--model.pool", "max"], ["model.pool: max is none of cls, avg"]),
    (["--model.patch_size", 3], ["model.patch_size=3 does not divide image_size=8x8; nearest that do: 2 and 4"]),
    (["--model.optim.base_lr", 1e-3], ["model.optim: give one of lr", "and base_lr=0.001"]),
    (["--data.batch_size", 33, "--model.mixup", 0.8], ["data.batch_size", "33", "odd"]),
])  # fmt: skip
def test_the_command_line(tmp_path: Path, arguments: list, parts: list) -> None:
    assert_refused(supervised(tmp_path, "fit", *arguments), *parts)
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize("text, parts", [
    ("model: [1", ["mine.yaml: not readable as YAML", "line 1"]),
    ("model: {class_path: absent.Model}\ndata: {class_path: common.data.ImageData}",
     ["model.class_path: absent.Model in mine.yaml cannot be imported", "No module named 'absent'"]),
])  # fmt: skip
def test_the_config_file(tmp_path: Path, text: str, parts: list) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert_refused(start(tmp_path, "supervised", "fit", "--config", "mine.yaml"), *parts)


@pytest.mark.parametrize("module, arguments, parts", [
    ("common.compare", ["absent"], ["absent: no such folder", "runs/STUDY/RUN_NAME"]),
    ("common.compare", ["."], [".: not a run folder", "results.json"]),
    ("common.compare", [".", "--figure", "x.doc"], ["--figure x.doc", ".png"]),
    ("common.paper", ["run", "T3a", "--scale", "demo", "--slurm=--sbatch 'x"], ["--slurm=--sbatch 'x: no closing"]),
    ("common.submit", ["all", "--scale", "huge"], ["--scale huge: no table or figure has such a scale"]),
    ("common.paper", ["show", "T99"], ["T99: no such table or figure", "T3a"]),
    ("common.paper", ["run", "T3a", "--scale", "huge"], ["--scale huge", "demo, gpu, paper"]),
    ("common.paper", ["run", "T3a", "--scale", "demo", "--seeds", "0"], ["--seeds 0", "1 or more"]),
])  # fmt: skip
def test_comparisons(tmp_path: Path, module: str, arguments: list, parts: list) -> None:
    assert_refused(start(tmp_path, module, *arguments), *parts)
    assert not list(tmp_path.iterdir())


# What lies on the disk


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def code_in_a_pickle(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps({b"data": Harm()}))


def an_eleventh_class(root: Path) -> None:
    archives.cifar10(root, RED.repeat(6, 0), [11] * 6, 1)


def a_cut_archive(root: Path) -> None:
    archives.cifar10(root, RED.repeat(6, 0), [3] * 6, 1)
    cut(root / "cifar-10-binary.tar.gz", 0.6)


def a_flat_val(root: Path) -> None:
    archives.picture(root / "imagenet/train/n01440764/n01440764_1.JPEG")
    archives.picture(root / "imagenet/val/ILSVRC2012_val_00000001.JPEG")


def a_cut_mat_file(root: Path) -> None:
    (root / "nyu_depth_v2").mkdir()
    savemat(root / "nyu_depth_v2/splits.mat", {"trainNdxs": np.array([[1]]), "testNdxs": np.array([[2]])})
    with h5py.File(root / "nyu_depth_v2/nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((2, 3, 640, 480), np.uint8)
    cut(root / "nyu_depth_v2/nyu_depth_v2_labeled.mat", 0.5)


def an_empty_class(root: Path) -> None:
    archives.picture(root / "train/a/1.jpg")
    (root / "train/b").mkdir()


def a_cut_image(root: Path) -> None:
    for i in range(4):
        archives.noise(root / f"train/a/{i}.jpg", (64, 64), i)
    cut(root / "train/a/2.jpg", 0.5)
    archives.noise(root / "val/a/1.jpg", (64, 64), 1)


def cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("config, lay_out, arguments, parts", [
    ("cifar10", lambda root: None, [], [": holds no cifar10; lay it out as one of cifar-10-binary.tar.gz"]),
    ("cifar10", an_eleventh_class, [], ["cifar-10-batches-bin: label 11 is outside the classes"]),
    ("cifar10", a_cut_archive, [], ["cifar-10-binary.tar.gz: truncated"]),
    ("cifar10", code_in_a_pickle, [], ["data_batch_1: the pickle names", "mkdir, which is refused"]),
    ("imagenet28", a_flat_val, [], ["imagenet/val: the images lie flat", "LOC_val_solution.csv"]),
    ("image_folder", an_empty_class, [], ["train/b: holds no images"]),
    ("image_folder", a_cut_image, ["--data.workers", 0], ["train/a/2.jpg: not a readable", "max_unreadable: 0"]),
    ("image_folder", a_cut_image, ["--data.workers", 2], ["train/a/2.jpg: not a readable", "max_unreadable: 0"]),
    ("nyu_depth", a_cut_mat_file, [], ["nyu_depth_v2_labeled.mat: damaged or cut short", "download it again"]),
])  # fmt: skip
def test_data(tmp_path: Path, config: str, lay_out: Callable[[Path], None], arguments: list, parts: list) -> None:
    root = tmp_path / "set"
    root.mkdir()
    lay_out(root)
    place = "--data.source.path" if config == "image_folder" else "--data.root"
    workers = [] if "--data.workers" in arguments else ["--data.workers", 0]
    said = supervised(tmp_path, "fit", place, "set", *workers, *arguments, config=f"{config}.yaml")
    assert_refused(said, "set", *parts)
    assert not (tmp_path / "harm").exists() and not list(tmp_path.rglob("config.yaml"))


# A run folder: what was saved stays as it was


@pytest.fixture
def run(command: Callable, tmp_path: Path) -> Path:
    """The folder of a finished run, below the working directory of the test."""
    assert command("fit", "--run_name", "run").code == 0
    return tmp_path / "runs/supervised/run"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_readable(run: Path) -> None:
    assert read(run / "checkpoints/last.ckpt")["state_dict"]
    assert json.loads((run / "results.json").read_text())["config_hash"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]


@pytest.mark.parametrize("subcommand, arguments, parts", [
    ("fit", ["--run_name", "run", "--model.optim.lr", 1e-3],
     ["another config (model.optim.lr: ", " there, 0.001 here)", "--run_name", "--overwrite"]),
    ("fit", ["--run_name", "new", "--init_from", "runs/supervised/run", "--model.width", 32],
     ["--init_from: runs/supervised/run does not cover the encoder", "(1, 1, 32) (there (1, 1, 16))"]),
    ("predict", ["--run_name", "run", "--data.images", "empty"], ["data.images: empty holds no images", ".jpg"]),
    ("test", ["--run_name", "new"], ["runs/supervised/new: there is no checkpoint to test; run fit"]),
    ("fit", ["--runs", "file"], ["--runs: file/", "cannot be written, for file is a file"]),
])  # fmt: skip
def test_a_finished_run(run: Path, tmp_path: Path, subcommand: str, arguments: list, parts: list) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = content(run)
    assert_refused(supervised(tmp_path, subcommand, *arguments), *parts)
    assert content(run) == before
    assert_readable(run)


def test_checkpoints_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    """A foreign one, and all others cut short: refused, left as they are, and never a silent fresh start."""
    (run / "results.json").unlink()  # so that fit goes on
    checkpoints = list((run / "checkpoints").iterdir())
    for path in checkpoints:
        cut(path, 0.7)
    torch.save({"model": {"head.bias": torch.zeros(3)}}, run / "checkpoints/last.ckpt")
    before = content(run)
    said = supervised(tmp_path, "fit", "--run_name", "run")
    assert_refused(said, f"runs/supervised/run/checkpoints: no checkpoint of {len(checkpoints)} can be", "--overwrite")
    assert content(run) == before


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Not the user's to mend with certainty, so 1; the checkpoint before it stays sound."""
    said = supervised(tmp_path, "fit", "--run_name", "run", "--model.optim.lr", 1e30,
                      "--trainer.log_every_n_steps", 1, "--checkpoint.every_n_steps", 1)  # fmt: skip
    named = ("not finite at step", "train/loss is nan, for the first time at step")
    assert said.code == 1 and any(words in said.line for words in named), said
    assert "a lower model.optim.lr" in said.line
    run = tmp_path / "runs/supervised/run"
    assert_readable(run)
    assert all(weight.isfinite().all() for weight in read(run / "checkpoints/last.ckpt")["state_dict"].values())
    assert json.loads((run / "results.json").read_text())["status"] == "failed"


# The same in this process, which costs a tenth


@pytest.mark.parametrize("arguments, part", [
    (["--model.heads", 5], "model.heads=5 does not divide width=16; nearest that do: 4 and 8"),
    (["--model.class_token", "false"], "model.pool=cls needs a class token; set class_token=true or pool=avg"),
    (["--model.size", "huge"], "model.size='huge' is not known; choose one of nano"),
    (["--model.optim.lr", "nan"], "model.optim.lr: nan is not a finite number"),
    (["--model.optim", 3], "model.optim: 3 is not a mapping of keys to values"),
    (["--model.optim.betas", "[0.9]"], "model.optim.betas: [0.9] is not a tuple with 2 elements"),
    (["--model.optim.lr", "null"], "model.optim: give one of lr (absolute) and base_lr (per 256 images), got lr=None"),
    (["--model.class_path", "supervised.Rooms"], "model.class_path: supervised.Rooms is no Experiment"),
    (["--data.source", "digits"], "data.source: digits is not the import path of a class"),
    (["--data.batch_per_device", "many"], "data.batch_per_device: many is not an int, nor one of auto"),
    (["--data.augment.flip", 2], "data.augment.flip: 2.0 is not a probability"),
    (["--data.augment.jitter", "[0.4,0.4,0.4,0.1]"], "need RGB images; digits has 1 channel"),
    (["--trainer.limit_train_batches", 0], "trainer.limit_train_batches: 0 leaves no optimiser step"),
    (["--trainer.max_steps", 10], "trainer.max_steps: 10 is not used"),
    (["--trainer.devices", 0], "trainer: `Trainer(devices='0')`"),
    (["--trainer.accelerator", "abacus"], "abacus"),
    (["--seed_everything", -1], "seed_everything: -1 is not between 0 and"),
    (["--run_name", "../.."], "--run_name: ../.. is not the name of a folder"),
    (["--runs", "/proc/runs"], "/proc/runs: No such file or directory"),
    (["--init_from", "absent"], "--init_from: there is no run folder or file absent"),
])  # fmt: skip
def test_more_of_the_command_line(command: Callable, arguments: list, part: str) -> None:
    said = command("fit", *arguments)
    assert said.code == 2 and part in said.err.splitlines()[-1], said


@pytest.mark.parametrize("key, value, part", [
    ("trainer", 5, "trainer: 5 in mine.yaml is not a mapping"),
    ("model", None, "model: None in mine.yaml is not a mapping"),
    ("modle", {"size": "tiny"}, "modle: unknown key in mine.yaml; did you mean model?"),
    ("data", {"class_path": "common.data.ImageData", "init_args": {"batch_size": "many"}},
     "data.batch_size: many is not an int"),
])  # fmt: skip
def test_more_of_the_config_file(command: Callable, tmp_path: Path, key: str, value: object, part: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**yaml.safe_load((CONFIGS / "digits.yaml").read_text()),
                                                        key: value}))  # fmt: skip
    said = command("fit", config="mine.yaml")
    assert said.code == 2 and part in said.err.splitlines()[-1], said


def test_a_typed_null_takes_a_value_of_the_config_back(command: Callable, tmp_path: Path) -> None:
    rates = ["--model.optim.lr", "null", "--model.optim.base_lr", "1e-3"]
    assert command("fit", "--run_name", "run", *rates).code == 0
    results = json.loads((tmp_path / "runs/supervised/run/results.json").read_text())
    assert results["lr"] == pytest.approx(1e-3 * 128 / 256)

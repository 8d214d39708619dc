"""Every config: what it resolves to, what its comment promises, and two steps at its full model and image size."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import archives
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from common.identity import flatten
from common.model import VisionTransformer
from common.model.flops import forward_flops
from common.training.checkpoints import read
from common.training.cli import StudyCLI

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "supervised" / "configs").glob("*.yaml"))}
PAPER = ("cifar100", "imagenet28", "imagenet64", "imagenet224", "flowers102", "nyu_depth")


def resolved(name: str, *overrides: str) -> dict[str, Any]:
    """The flat config that `fit --config NAME` would train."""
    return flatten(StudyCLI("supervised", ["fit", "--config", str(CONFIGS[name]), *overrides], run=False).resolved)


def comment(name: str) -> str:
    """What stands above the config's first key, without the marks, its command lines kept apart."""
    lines = CONFIGS[name].read_text().splitlines()
    above = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in above)


# What they resolve to: the published recipes, and what the studies they cite leave off

SCRATCH = {
    "model.optim.base_lr": None, "model.optim.weight_decay": 0.3, "model.optim.betas": [0.9, 0.95],
    "model.optim.warmup_epochs": 20, "model.optim.schedule": "cosine", "model.optim.min_lr": 1e-6,
    "model.optim.layer_decay": 1.0, "model.drop_path": 0.1, "model.class_token": True, "model.pool": "cls",
    "model.position": "learned", "data.augment.crop_scale": [0.08, 1.0], "data.augment.crop_ratio": [3 / 4, 4 / 3],
    "data.augment.flip": 0.5, "trainer.precision": "bf16-mixed", "trainer.gradient_clip_val": None,
}  # fmt: skip
CIFAR = SCRATCH | {
    "model.optim.lr": 4e-3, "model.optim.ema": None, "model.mixup": 0.0, "model.cutmix": 0.0,
    "model.label_smoothing": 0.0, "data.image_size": 32, "data.batch_size": 1024, "trainer.max_epochs": 2400,
    "data.augment.interpolation": "bilinear", "data.augment.jitter": [0.4, 0.4, 0.4, 0.1],
    "data.augment.jitter_probability": 0.8, "data.augment.grayscale": 0.2, "data.augment.rand_augment": None,
    "data.mean": [0.4914, 0.4822, 0.4465], "data.std": [0.2023, 0.1994, 0.2010],
}  # fmt: skip
IMAGENET = SCRATCH | {
    "model.optim.lr": 1.6e-3, "model.optim.ema": 0.9999, "model.optim.ema_warmup": False, "model.mixup": 0.8,
    "model.cutmix": 1.0, "model.label_smoothing": 0.1, "data.source.class_path": "common.data.ImageNet",
    "data.batch_size": 4096, "trainer.max_epochs": 300, "data.augment.interpolation": "bicubic",
    "data.augment.jitter": [0.0] * 4, "data.augment.grayscale": 0.0,
    "data.augment.rand_augment": "rand-m9-mstd0.5-inc1", "data.eval_crop": 0.875,
    "data.eval_interpolation": "bicubic", "data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225],
}  # fmt: skip
NYU = {
    "model.size": "small", "model.bins": 256, "model.depth_range": [0.001, 10.0], "model.sig_warmup": 100,
    "model.gradient_loss": "spatial", "model.gradient_weight": 0.5, "model.flip_average": True,
    "model.optim.lr": 5e-4, "model.optim.weight_decay": 0.01, "model.optim.betas": [0.9, 0.999],
    "model.optim.schedule": "cosine", "model.optim.layer_decay": 1.0, "model.optim.ema": None,
    "data.source.class_path": "supervised.Nyu", "data.image_size": [48, 64], "data.batch_size": 16,
    "trainer.gradient_clip_val": 35, "trainer.precision": "bf16-mixed",
}  # fmt: skip
RECIPES = {
    "cifar100": CIFAR | {"model.size": "tiny", "model.patch_size": 1, "data.source.class_path": "common.data.Cifar100",
                         "data.eval_crop": 1.0},
    "cifar10": CIFAR | {"data.source.class_path": "common.data.Cifar10", "trainer.max_epochs": 200},
    "flowers102": CIFAR | {"model.size": "small", "model.patch_size": 1, "data.eval_crop": 0.875,
                           "data.source.class_path": "common.data.Flowers102"},
    "imagenet28": IMAGENET | {"model.size": "base", "model.patch_size": 1, "data.image_size": 28},
    "imagenet64": IMAGENET | {"model.size": "small", "model.patch_size": 1, "data.image_size": 64},
    "imagenet224": IMAGENET | {"model.size": "base", "model.patch_size": 16, "data.image_size": 224},
    "nyu_depth": NYU,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses_into_a_folder_of_its_name(name: str) -> None:
    config = resolved(name)
    assert config["run_name"] == f"{name}-{config['model.size']}-p{config['model.patch_size']}-s0"


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_published_recipe(name: str) -> None:
    config = resolved(name)
    assert {key: config[key] for key in RECIPES[name]} == RECIPES[name]


def test_depth_trains_for_as_many_steps_as_published() -> None:
    config = resolved("nyu_depth")
    steps = 795 // 16
    assert steps * config["trainer.max_epochs"] == pytest.approx(38_400, abs=steps)
    assert steps * config["model.optim.warmup_epochs"] == pytest.approx(12_800, abs=5)


# What the comment promises


@pytest.mark.parametrize("name", CONFIGS)
def test_its_comment_says_how_to_run_it_and_what_to_expect(name: str) -> None:
    text = comment(name)
    commands = re.findall(r"python -m supervised (fit --config (\S+).*)", text)
    assert commands and {file for _, file in commands} == {f"supervised/configs/{name}.yaml"}
    for command, file in commands:
        StudyCLI("supervised", shlex.split(command.replace(file, str(CONFIGS[name]))), run=False)
    assert "Expected:" in text and re.search(r"Sources?[:.]|Hyper-parameters:", text)
    if name in PAPER:
        assert re.search(r"(Table|Figure) \d[a-d]", text) and "Cost on one H200" in text


@pytest.mark.parametrize("name, size, patch, images, said", [
    ("cifar100", "tiny", 1, 50_000, "ViT-T/1 2.6 h"), ("cifar100", "small", 1, 50_000, "ViT-S/1 7.8 h"),
    ("cifar10", "tiny", 1, 50_000, "0.2 h"), ("flowers102", "small", 1, 1020, "ViT-S/1: 0.2 h"),
    ("imagenet28", "tiny", 1, 1_281_167, "T/1 6 h"), ("imagenet28", "small", 1, 1_281_167, "S/1 18 h"),
    ("imagenet28", "base", 1, 1_281_167, "B/1 63 h"), ("imagenet28", "large", 1, 1_281_167, "L/1 216 h"),
    ("imagenet64", "small", 1, 1_281_167, "195 h"), ("imagenet64", "small", 2, 1_281_167, "/2 25 h"),
    ("imagenet224", "base", 16, 1_281_167, "14 h"), ("nyu_depth", "small", 1, 795, "S/1 0.2 h"),
])  # fmt: skip
def test_the_hours_in_its_comment_are_the_formula_s(name: str, size: str, patch: int, images: int, said: str) -> None:
    assert said in " ".join(comment(name).split())
    config = resolved(name)
    side = config["data.image_size"]
    with torch.device("meta"):
        flops = forward_flops(VisionTransformer(side if isinstance(side, int) else tuple(side), patch, size=size))
    batch = min(config["data.batch_size"], images)
    seen = images // batch * batch * config["trainer.max_epochs"]
    number = re.search(r"([\d.]+) h", said).group(1)
    hours = 3 * flops * seen / 790e12 / 3600
    assert float(number) == pytest.approx(hours, rel=0.05, abs=0.05 if "." in number else 0.5)


# Two steps at the full model and image size

TWO_STEPS = [
    "--data.batch_size", "2", "--data.eval_batch_size", "2", "--data.workers", "0", "--trainer.max_epochs", "1",
    "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "1",
    "--model.optim.warmup_epochs", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets in their official layout, with four training images and two or more others."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (7, 3072), dtype=np.uint8)
    archives.cifar10(root, images, range(7), test=2)
    archives.cifar100(root, images, [3] * 7, range(93, 100))
    archives.flowers102(root, range(95, 103), train=[1, 2, 3, 4], val=[5, 6], test=[7, 8], size=(60, 45))
    archives.imagenet(root, ["n01440764", "n03995372"], size=(300, 240))
    for split in ("train", "val"):
        for i in range(4):
            archives.noise(root / "images" / split / "ab"[i % 2] / f"{i}.png", (50, 40), i)
    frames = np.broadcast_to(generator.integers(0, 256, (480, 640, 3, 1), dtype=np.uint8), (480, 640, 3, 6))
    depths = np.ones((480, 640, 6), np.float32) * np.linspace(1, 6, 6, dtype=np.float32)
    archives.nyu_depth_v2(root, frames, depths, train=[1, 2, 3, 4], test=[5, 6])
    return root


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder of runs whose checkpoints, up to 5 GB each, do not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def arm(name: str, tokens: int, *overrides: str, soak: bool = False) -> Any:
    mark = [pytest.mark.soak] if soak else []  # more than about 20 s of one core
    return pytest.param(name, tokens, overrides, marks=mark, id=" ".join((name, *overrides[1::2])))


def assert_two_steps(folder: Path, tokens: int) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert (results["status"], results["step"], results["images_seen"]) == ("finished", 2, 4)
    assert results["recipe"]["tokens"] == tokens
    assert math.isfinite(results["metrics"][results["headline"]])


@pytest.mark.parametrize("name, tokens, overrides", [
    arm("digits", 64),
    arm("shapes", 64, "--data.source.train", "8"),
    arm("rooms", 432, "--data.source.train", "4", "--data.source.val", "2"),
    arm("image_folder", 1024, "--data.source.path", "images"),
    arm("cifar10", 1024),
])  # fmt: skip
def test_it_trains_two_steps(name: str, tokens: int, overrides: tuple[str, ...], root: Path, runs: Path,
                             command: Callable) -> None:  # fmt: skip
    (runs / "images").symlink_to(root / "images")  # the working directory
    options = ["--run_name", "a", "--data.root", root, *TWO_STEPS, *overrides]
    outcome = command("fit", *options, config=CONFIGS[name], small=False)
    assert outcome.code == 0, outcome.err
    assert_two_steps(runs / "runs" / "supervised" / "a", tokens)


@pytest.mark.parametrize("name, tokens, overrides", [
    arm("cifar100", 1024),
    arm("cifar100", 1024, "--model.size", "small"),
    arm("flowers102", 1024),
    arm("imagenet28", 784, "--model.size", "tiny"),
    arm("imagenet28", 784, soak=True),
    arm("imagenet28", 784, "--model.size", "large", soak=True),
    arm("imagenet64", 16, "--model.patch_size", "16"),
    arm("imagenet64", 4096, soak=True),
    arm("imagenet224", 196),
    arm("imagenet224", 196, "--data.image_size", "14", "--model.patch_size", "1"),
    arm("nyu_depth", 768, "--model.patch_size", "2"),
    arm("nyu_depth", 3072, soak=True),
])  # fmt: skip
def test_it_trains_two_steps_within_24_gb(
    name: str, tokens: int, overrides: tuple[str, ...], root: Path, runs: Path
) -> None:
    places = ["--config", CONFIGS[name], "--runs", runs, "--run_name", "a", "--data.root", root]
    argv = [sys.executable, "-m", "supervised", "fit", *places, *TWO_STEPS, *overrides]
    with open(runs / "output", "w") as output:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this process alone
    assert status == 0, (runs / "output").read_text()
    assert usage.ru_maxrss * 1024 < 24e9
    assert_two_steps(runs / "supervised" / "a", tokens)


# config.yaml replays the run, and TensorBoard's file holds it

RANDOM = [  # everything that draws random numbers or has a state
    "--model.drop_path", "0.2", "--model.mixup", "0.8", "--model.cutmix", "1.0", "--model.label_smoothing", "0.1",
    "--model.optim.ema", "0.9", "--data.batch_per_device", "16", "--data.batch_size", "32", "--seed_everything", "3",
    "--data.augment.crop_scale", "[0.3,1.0]", "--data.augment.flip", "0.5",
]  # fmt: skip
COLOUR = [
    "--data.source.train", "96", "--trainer.limit_val_batches", "1", "--data.augment.jitter", "[0.4,0.4,0.4,0.1]",
    "--data.augment.grayscale", "0.2", "--data.augment.rand_augment", "rand-m9-mstd0.5-inc1",
]  # fmt: skip


@pytest.mark.parametrize("name, more", [("digits", []), ("shapes", COLOUR)])
def test_the_saved_config_replays_the_run(name: str, more: list[str], command: Callable, tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / "supervised" / run for run in ("first", "replay")]
    assert command("fit", "--run_name", "first", *RANDOM, *more, config=CONFIGS[name]).code == 0
    assert command("fit", "--run_name", "replay", config=folders[0] / "config.yaml", small=False).code == 0
    first, replay = (read(folder / "checkpoints" / "last.ckpt") for folder in folders)
    for part in (lambda c: c["state_dict"], lambda c: c["ema"]["state_dict"]):
        assert part(first).keys() == part(replay).keys()
        assert all(torch.equal(value, part(replay)[key]) for key, value in part(first).items())
    scores = [{tag: value for tag, value in json.loads((folder / "results.json").read_text())["metrics"].items()
               if "per_second" not in tag} for folder in folders]
    assert scores[0] == scores[1] and "val_raw/acc1" in scores[0]


def test_the_event_file_of_rooms_holds_curves_hparams_and_pictures(command: Callable, tmp_path: Path) -> None:
    rooms = ["--run_name", "a", "--data.source.train", "48", "--data.source.val", "4", "--data.source.test", "4",
             "--trainer.log_every_n_steps", "1", "--model.patch_size", "6", "--model.picture_epochs", "1"]  # fmt: skip
    assert command("fit", *rooms, config=CONFIGS["rooms"]).code == 0
    assert command("test", *rooms, config=CONFIGS["rooms"]).code == 0
    folder = tmp_path / "runs" / "supervised" / "a"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    measured = {tag: [e.step for e in events.Scalars(tag) if not math.isnan(e.value)]
                for tag in events.Tags()["scalars"]}  # HPARAMS writes a NaN of each headline
    for tag in ("train/loss", "train/lr", "train/images_per_second"):
        assert measured[tag] == [1, 2, 3, 4, 5, 6]
    for tag in ("val/rmse", "val/rae", "val/rmse_low", "val/delta1"):
        assert measured[tag] == [3, 6]
    assert measured["test/rmse"] == measured["test/rae"] == [6] and measured["val/acc1"] == []
    assert events.Tags()["images"] == ["val/depth"]
    pictures = events.Images("val/depth")
    assert [picture.step for picture in pictures] == [3, 6]
    assert all(picture.width > picture.height > 300 and picture.encoded_image_string[1:4] == b"PNG"
               for picture in pictures)  # fmt: skip
    parts = [HParamsPluginData.FromString(content) for content in events.PluginTagToContent("hparams").values()]
    values = {key: value for part in parts for key, value in part.session_start_info.hparams.items()}
    assert (values["dataset"].string_value, values["patch_size"].number_value) == ("rooms", 6)

"""Two steps of every config, at its full model and image size."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from shipped import CONFIGS, study_of
from small import TWO_STEPS

from common.training.checkpoints import read
from diffusion.autoencoder import Autoencoder


def arm(name: str, tokens: int, *overrides: str, soak: bool = False) -> Any:
    mark = [pytest.mark.soak] if soak else []  # more than about 20 s of one core
    return pytest.param(name, tokens, overrides, marks=mark, id=" ".join((name, *overrides[1::2])))


def assert_two_steps(folder: Path, tokens: int) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert (results["status"], results["step"], results["images_seen"]) == ("finished", 2, 4)
    assert results["recipe"]["tokens"] == tokens
    assert math.isfinite(results["metrics"][results["headline"]])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read(folder / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("name, tokens, overrides", [
    arm("supervised/digits", 64),
    arm("supervised/shapes", 64, "--data.source.train", "8"),
    arm("supervised/rooms", 432, "--data.source.train", "4", "--data.source.val", "2"),
    arm("supervised/image_folder", 1024, "--data.source.path", "images"),
    arm("supervised/cifar10", 1024),
    arm("mae/cifar100", 1024, "--model.decoder_width", "512", "--model.decoder_heads", "16"),
    arm("mae/cifar100", 1024, "--model.size", "small"),
    arm("mae/imagenet28", 784, "--model.size", "tiny"),
    arm("diffusion/digits", 64, "--data.autoencoder", "null", "--data.image_size", "8"),
    arm("diffusion/shapes", 64, "--data.autoencoder", "null", "--data.image_size", "8", "--data.source.train", "8"),
    arm("diffusion/cifar10", 1024, "--model.picture_epochs", "0"),  # whose samples would take minutes
    arm("locality_ablation/digits", 64, "--model.permutation.share", "1"),
    arm("locality_ablation/shapes", 16, "--data.source.train", "8", "--model.permutation.delta", "2",
        "--model.permutation.swaps", "100"),
    arm("locality_ablation/shapes", 16, "--data.source.train", "8", "--model.position", "none"),
    arm("locality_ablation/cifar10", 1024, "--model", "locality_ablation.DictionaryClassification"),
    arm("locality_ablation/imagenet28", 784, "--model", "locality_ablation.DictionaryClassification",
        "--model.size", "tiny"),
])  # fmt: skip
def test_it_trains_two_steps(name: str, tokens: int, overrides: tuple[str, ...], root: Path, runs: Path,
                             command: Callable) -> None:  # fmt: skip
    (runs / "images").symlink_to(root / "images")  # the working directory
    options = ["--run_name", "a", "--data.root", root, *TWO_STEPS, *overrides]
    outcome = command("fit", *options, config=CONFIGS[name], small=False, study=study_of(name))
    assert outcome.code == 0, outcome.err
    assert_two_steps(runs / "runs" / study_of(name) / "a", tokens)


@pytest.mark.parametrize("name, tokens, overrides", [
    arm("mae/digits", 64),
    arm("mae/shapes", 64, "--data.source.train", "8"),
    arm("mae/image_folder", 1024, "--data.source.path", "images"),
    arm("mae/cifar10", 1024),
    arm("mae/cifar100", 1024),
    arm("mae/imagenet28", 784, soak=True),
    arm("mae/imagenet224", 196, soak=True),
])  # fmt: skip
def test_fine_tuning_and_probing_go_on_from_its_two_steps(
    name: str, tokens: int, overrides: tuple[str, ...], root: Path, runs: Path
) -> None:
    """In processes of their own, with which their memory goes."""
    (runs / "images").symlink_to(root / "images")  # the working directory
    folders = [runs / "runs" / "mae" / name for name in ("trained", "tuned", "probed")]
    for folder, end in zip(folders, ("", "_finetune", "_probe"), strict=True):
        start = ["--init_from", folders[0]] if end else []
        options = ["--run_name", folder.name, "--data.root", root, *TWO_STEPS, *overrides, *start]
        done = run("mae", "fit", "--config", CONFIGS[name + end], *options, cwd=runs)
        assert done.returncode == 0, done.stderr
        assert_two_steps(folder, tokens)
    trained, tuned, probed = map(weights, folders)
    encoder = [key for key in trained if not key.startswith(("net.decoder", "net.mask_token"))]
    assert all(torch.equal(trained[key], probed[key]) for key in encoder)
    matrices = [key for key in encoder if trained[key].ndim > 1]
    alike = [torch.cosine_similarity(trained[key].flatten(), tuned[key].flatten(), dim=0) for key in matrices]
    assert min(alike) > 0.5 and not any(torch.equal(trained[key], tuned[key]) for key in matrices)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name, tokens, overrides", [
    arm("supervised/cifar100", 1024),
    arm("supervised/cifar100", 1024, "--model.size", "small"),
    arm("supervised/flowers102", 1024),
    arm("supervised/imagenet28", 784, "--model.size", "tiny"),
    arm("supervised/imagenet28", 784, soak=True),
    arm("supervised/imagenet28", 784, "--model.size", "large", soak=True),
    arm("supervised/imagenet64", 16, "--model.patch_size", "16"),
    arm("supervised/imagenet64", 4096, soak=True),
    arm("supervised/imagenet224", 196),
    arm("supervised/imagenet224", 196, "--data.image_size", "14", "--model.patch_size", "1"),
    arm("locality_ablation/imagenet28", 196, "--model.patch_size", "2", "--data.augment.interpolation", "nearest",
        "--data.eval_interpolation", "nearest"),
    arm("locality_ablation/imagenet28", 784, "--model", "locality_ablation.DictionaryClassification", soak=True),
    arm("locality_ablation/imagenet224", 196, "--model.permutation.swaps", "25000"),
    *(arm("locality_ablation/imagenet224", 225, "--model", "locality_ablation.SegmentClassification",
          "--data", "locality_ablation.SegmentedImages", "--data.segmentation", f"locality_ablation.{cut}")
      for cut in ("Slic", "Felzenszwalb")),
    arm("supervised/nyu_depth", 768, "--model.patch_size", "2"),
    arm("supervised/nyu_depth", 3072, soak=True),
    arm("diffusion/imagenet256", 256, "--model.patch_size", "2", "--data.autoencoder", "AUTOENCODER", soak=True),
    arm("diffusion/imagenet256", 1024, "--data.autoencoder", "AUTOENCODER", soak=True),
])  # fmt: skip
def test_it_trains_two_steps_within_24_gb(
    name: str, tokens: int, overrides: tuple[str, ...], root: Path, runs: Path
) -> None:
    places = ["--config", CONFIGS[name], "--runs", runs, "--run_name", "a", "--data.root", root]
    if "AUTOENCODER" in overrides:  # VQ f8 at its full size, with random weights
        net = Autoencoder()
        torch.save({"autoencoder": net.config, "state_dict": net.state_dict()}, runs / "vq-f8.ckpt")
        overrides = [str(runs / "vq-f8.ckpt") if option == "AUTOENCODER" else option for option in overrides]
        overrides += ["--model.picture_epochs", "0"]
    done = run(study_of(name), "fit", *places, *TWO_STEPS, *overrides, timeout=900)  # L takes 5 minutes without AVX-512
    assert done.returncode == 0, done.stderr
    assert done.peak < 24e9
    assert_two_steps(runs / study_of(name) / "a", tokens)

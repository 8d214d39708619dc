"""All that only a GPU shows: its tests, a step of every config of the paper, peers, sampling, and a short training.

Each part is a command of its own, and runs whatever became of the others. On one H200 they take about 20 minutes, by an
estimate, since none was at hand: tests 3, steps 6 (22 of 15 s, most of which is compiling), peers 5 (timm's nets, which
are compiled as a whole, take half a minute each for that), samples 2, trainings 4. Figures go to
runs/benchmark/gpu-*.json too.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from common.benchmark.report import table
from common.data import Cifar10
from common.errors import InputError

DATA = Path("data")  # as in the config that is trained
EPOCHS = 8  # of the training


class Steps(NamedTuple):
    """Configs that one command measures the step of.

    Args:
        name: of its file of results.
        batch: images of a step; enough to keep a GPU busy, and few enough for one of 80 GB.
        configs: STUDY/NAME of each.
        options: of `fit`.
    """

    name: str
    batch: int
    configs: tuple[str, ...]
    options: str = ""


STEPS = (
    Steps("tiny", 256, ("supervised/cifar100", "mae/cifar100", "mae/cifar100_finetune"),
          "--model.size tiny --model.patch_size 1"),
    Steps("small", 64, ("supervised/cifar100", "supervised/flowers102", "supervised/imagenet64",
                        "supervised/nyu_depth", "diffusion/cifar10"), "--model.size small --model.patch_size 1"),
    Steps("base", 64, ("supervised/cifar100", "supervised/imagenet28", "mae/imagenet28",
                       "locality_ablation/imagenet28"), "--model.size base --model.patch_size 1"),
    Steps("dictionary", 64, ("locality_ablation/imagenet28",),
          "--model.patch_size 1 --model locality_ablation.DictionaryClassification"),
    Steps("large", 64, ("diffusion/imagenet256",), "--model.patch_size 1"),
    Steps("patches", 128, ("supervised/cifar100", "supervised/imagenet28", "supervised/nyu_depth", "mae/cifar100",
                           "diffusion/imagenet256"), "--model.patch_size 2"),
    Steps("patches-of-16", 128, ("supervised/imagenet224", "locality_ablation/imagenet224")),
    # Without the perceptual loss, whose weights are a file from elsewhere; with the discriminator at once, which plays
    # in most steps of the training and is part of the FLOPs.
    Steps("autoencoder", 16, ("diffusion/autoencoder_imagenet256",),
          "--model.perceptual none --model.adversary.start 0 --model.adversary.warmup 0"),
)  # fmt: skip


def commands() -> dict[str, list[str]]:
    """What comes after `python -m`, by the name of the part."""
    found = {"tests": ["pytest", "-m", "gpu"]}
    for steps in STEPS:
        configs = [f"{study}/configs/{name}.yaml" for study, name in (config.split("/") for config in steps.configs)]
        found[f"step {steps.name}"] = [
            "common.benchmark", "step", "--rounds", "5", "--batch", str(steps.batch), *_json(f"step-{steps.name}"),
            "--config", *configs, "--", *shlex.split(steps.options),
        ]  # fmt: skip
    for mode in ("peers", "sample", "data"):
        found[mode] = ["common.benchmark", mode, "--device", "cuda", "--rounds", "7", *_json(mode)]
    runs = {patch: f"gpu-cifar10-p{patch}" for patch in (1, 2)}
    for patch, run in runs.items():
        found[f"training /{patch}"] = [
            "supervised", "fit", "--config", "supervised/configs/cifar10.yaml", "--model.size", "tiny",
            "--model.patch_size", str(patch), "--trainer.max_epochs", str(EPOCHS), "--model.optim.warmup_epochs", "1",
            "--trainer.check_val_every_n_epoch", str(EPOCHS), "--run_name", run, "--overwrite",
        ]  # fmt: skip
    return {**found, "comparison": ["common.compare", *(f"runs/supervised/{run}" for run in runs.values())]}


def _json(name: str) -> list[str]:
    return ["--json", f"runs/benchmark/gpu-{name}.json"]


def check() -> None:
    """That there is all that the commands need, before minutes are spent.

    Raises:
        InputError: no GPU, or no CIFAR-10.
    """
    if not torch.cuda.is_available():
        raise InputError("gpu: there is no GPU that torch can use")
    for split in ("train", "test"):
        Cifar10().read(DATA, split)


def run() -> int:
    """Runs all commands and says what became of each; the exit code is 1 where one has failed."""
    check()
    outcomes, failed = [], 0
    for name, words in commands().items():
        print(f"\n{name}: {shlex.join(['python', '-m', *words])}", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", *words]).returncode
        failed += code != 0
        outcomes.append((name, f"{(time.perf_counter() - start) / 60:.1f}", f"failed, {code}" if code else "done"))
    print("", *table(("part", "minutes", "outcome"), outcomes), sep="\n")
    return int(failed > 0)

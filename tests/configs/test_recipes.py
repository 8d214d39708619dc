"""Every config: what it resolves to, and what its comment promises."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ROOT
from shipped import CONFIGS, study_of

from common.identity import flatten
from common.model import VisionTransformer
from common.model.flops import forward_flops
from common.training.cli import StudyCLI, run_folder
from diffusion import DiT
from diffusion.cost import forward_flops as denoising_flops
from mae import MaskedAutoencoder
from mae.cost import forward_flops as masked_forward_flops

DOWNSTREAM = re.compile("_(finetune|probe)$")  # the ends of the names of those that start from a pre-training
STARTED = (*filter(DOWNSTREAM.search, CONFIGS), "diffusion/imagenet256_recovery")  # from trained weights
PAPER = ("supervised/cifar100", "supervised/imagenet28", "supervised/imagenet64", "supervised/imagenet224",
         "supervised/flowers102", "supervised/nyu_depth", "mae/cifar100", "mae/cifar100_finetune",
         "diffusion/imagenet256", "locality_ablation/imagenet28", "locality_ablation/imagenet224")  # fmt: skip


@cache
def resolved(name: str, *overrides: str) -> dict[str, Any]:
    """The flat config that `fit --config NAME` would train."""
    return flatten(StudyCLI(study_of(name), ["fit", "--config", str(CONFIGS[name]), *overrides], run=False).resolved)


def comment(name: str) -> str:
    """What stands above the config's first key, without the marks, each command in one line of its own."""
    lines = CONFIGS[name].read_text().splitlines()
    above = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in above).replace("\\\n", " ")


def commands(name: str) -> list[list[str]]:
    """The commands in the comment that name this very file, without `python -m STUDY`; one trains. Others name what
    must be there before.
    """
    study, stem = study_of(name), CONFIGS[name].stem
    found = re.findall(rf"python -m {study} (\w+) --config {study}/configs/{stem}\.yaml(.*)", comment(name))
    assert "fit" in {word for word, _ in found}
    assert all((ROOT / path).is_file() for path in re.findall(r"\w+/configs/\w+\.yaml", comment(name)))
    return [[word, "--config", str(CONFIGS[name]), *shlex.split(options)] for word, options in found]


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
# What MAE pre-trains with, and the paper follows.
MASKED = {
    "model.class_path": "mae.Pretraining", "model.mask_ratio": 0.75, "model.norm_pix_loss": "none",
    "model.position": "learned", "model.decoder_depth": 8, "model.optim.weight_decay": 0.05,
    "model.optim.betas": [0.9, 0.95], "model.optim.warmup_epochs": 40, "model.optim.schedule": "cosine",
    "model.optim.min_lr": 0.0, "model.optim.ema": None, "data.batch_size": 4096, "data.augment.crop_scale": [0.2, 1.0],
    "data.augment.crop_ratio": [3 / 4, 4 / 3], "data.augment.interpolation": "bicubic", "data.augment.flip": 0.5,
    "data.augment.jitter": [0.0] * 4, "data.augment.grayscale": 0.0, "data.augment.rand_augment": None,
    "data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225], "trainer.precision": "bf16-mixed",
    "trainer.gradient_clip_val": None,
}  # fmt: skip
MASKED_CIFAR = MASKED | {
    "model.size": "tiny", "model.patch_size": 1, "model.decoder_width": 256, "model.decoder_heads": 8,
    "model.optim.lr": 4e-3, "model.optim.base_lr": None, "model.optim.layer_decay": 0.85, "data.image_size": 32,
    "data.eval_crop": 1.0, "trainer.max_epochs": 1600,
}  # fmt: skip
MASKED_IMAGENET = MASKED | {
    "model.size": "base", "model.decoder_width": 512, "model.decoder_heads": 16, "model.optim.lr": None,
    "model.optim.base_lr": 1.5e-4, "model.optim.layer_decay": 1.0, "data.source.class_path": "common.data.ImageNet",
    "data.eval_crop": 0.875, "trainer.max_epochs": 800,
}  # fmt: skip
# Table 4: from scratch's batch, warm-up, minimum rate and augmentation, without mixup and smoothing.
TUNED_CIFAR = CIFAR | {
    "model.class_path": "supervised.Classification", "model.probe": False, "model.pool": "avg",
    "model.head_std": 2e-5, "model.drop_path": 0.3, "model.optim.lr": 2.4e-2, "model.optim.layer_decay": 0.65,
    "model.optim.weight_decay": 0.02, "model.optim.betas": [0.9, 0.999], "trainer.max_epochs": 800,
}  # fmt: skip
# MAE's own, of Base.
TUNED_IMAGENET = IMAGENET | {
    "model.class_path": "supervised.Classification", "model.probe": False, "model.size": "base", "model.pool": "avg",
    "model.head_std": 2e-5, "model.optim.lr": None, "model.optim.base_lr": 5e-4, "model.optim.layer_decay": 0.65,
    "model.optim.weight_decay": 0.05, "model.optim.betas": [0.9, 0.999], "model.optim.warmup_epochs": 5,
    "model.optim.ema": None, "data.batch_size": 1024, "trainer.max_epochs": 100,
}  # fmt: skip
# A frozen encoder under crops and flips alone: whatever regularises a training is off, in every data set.
PROBED = {
    "model.class_path": "supervised.Classification", "model.probe": True, "model.class_token": True,
    "model.pool": "cls", "model.drop_path": 0.0, "model.mixup": 0.0, "model.cutmix": 0.0, "model.label_smoothing": 0.0,
    "model.optim.weight_decay": 0.0, "model.optim.layer_decay": 1.0, "model.optim.schedule": "cosine",
    "model.optim.min_lr": 0.0, "model.optim.ema": None, "data.augment.jitter": [0.0] * 4,
    "data.augment.grayscale": 0.0, "data.augment.rand_augment": None,
}  # fmt: skip
PROBED_PHOTOGRAPHS = PROBED | {
    "model.optim.lr": 1e-3, "model.optim.base_lr": None, "model.optim.betas": [0.9, 0.95],
    "model.optim.warmup_epochs": 10, "data.augment.crop_scale": [0.08, 1.0],
    "data.augment.crop_ratio": [3 / 4, 4 / 3], "data.augment.interpolation": "bicubic", "data.augment.flip": 0.5,
    "data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225], "trainer.max_epochs": 90,
}  # fmt: skip
# DiT's, at eight times its batch and rate; latents of an autoencoder that the paper cites, positions that it learns.
DIT = {
    "model.class_path": "diffusion.Generation", "model.size": "large", "model.patch_size": 1,
    "model.position": "learned", "model.label_dropout": 0.1, "model.learn_variance": True, "model.conditional": True,
    "model.optim.lr": 8e-4, "model.optim.base_lr": None, "model.optim.weight_decay": 0.0,
    "model.optim.betas": [0.9, 0.999], "model.optim.warmup_epochs": 100, "model.optim.schedule": "constant",
    "model.optim.ema": 0.9999, "model.predict.samples": 50_000, "model.predict.solver": "ddpm",
    "model.predict.steps": 250, "model.predict.guidance": 1.5, "model.predict.guidance_channels": 3,
    "model.evaluation.extractor": "inception", "data.source.class_path": "common.data.ImageNet",
    "data.image_size": 256, "data.batch_size": 2048, "data.augment.interpolation": "adm",
    "data.eval_interpolation": "adm", "data.augment.flip": 0.5, "data.augment.crop_scale": None,
    "trainer.max_epochs": 400, "trainer.precision": "bf16-mixed", "trainer.gradient_clip_val": None,
}  # fmt: skip
UNPERMUTED = {"model.class_path": "locality_ablation.PermutedClassification", "model.permutation.swaps": 0,
              "model.permutation.share": None, "model.permutation.seed": None}  # fmt: skip
RECIPES = {
    "diffusion/imagenet256": DIT,
    "diffusion/imagenet256_recovery": DIT | {"model.optim.warmup_epochs": 2, "trainer.gradient_clip_val": 1.0},
    "supervised/cifar100": CIFAR | {"model.size": "tiny", "model.patch_size": 1, "data.eval_crop": 1.0,
                                    "data.source.class_path": "common.data.Cifar100"},
    "supervised/cifar10": CIFAR | {"data.source.class_path": "common.data.Cifar10", "trainer.max_epochs": 200},
    "supervised/flowers102": CIFAR | {"model.size": "small", "model.patch_size": 1, "data.eval_crop": 0.875,
                                      "data.source.class_path": "common.data.Flowers102"},
    "supervised/imagenet28": IMAGENET | {"model.size": "base", "model.patch_size": 1, "data.image_size": 28},
    "supervised/imagenet64": IMAGENET | {"model.size": "small", "model.patch_size": 1, "data.image_size": 64},
    "supervised/imagenet224": IMAGENET | {"model.size": "base", "model.patch_size": 16, "data.image_size": 224},
    "supervised/nyu_depth": NYU,
    "locality_ablation/cifar10": CIFAR | UNPERMUTED | {"data.source.class_path": "common.data.Cifar10",
                                                       "trainer.max_epochs": 200},
    "locality_ablation/imagenet28": IMAGENET | UNPERMUTED | {"model.size": "base", "model.patch_size": 1,
                                                             "data.image_size": 28},
    "locality_ablation/imagenet224": IMAGENET | UNPERMUTED | {"model.size": "base", "model.patch_size": 16,
                                                              "data.image_size": 224},
    "mae/cifar100": MASKED_CIFAR | {"data.source.class_path": "common.data.Cifar100"},
    "mae/cifar10": MASKED_CIFAR | {"data.source.class_path": "common.data.Cifar10", "data.batch_size": 1024,
                                   "model.optim.warmup_epochs": 10, "trainer.max_epochs": 200},
    "mae/image_folder": MASKED_CIFAR | {"data.source.class_path": "common.data.ImageFolder", "data.batch_size": 256,
                                        "data.eval_crop": 0.875, "model.optim.lr": None, "model.optim.base_lr": 1e-3,
                                        "model.optim.warmup_epochs": 10, "trainer.max_epochs": 200},
    "mae/imagenet28": MASKED_IMAGENET | {"model.patch_size": 1, "data.image_size": 28},
    "mae/imagenet224": MASKED_IMAGENET | {"model.patch_size": 16, "data.image_size": 224, "model.position": "sincos",
                                          "model.norm_pix_loss": "patch"},
    "mae/cifar100_finetune": TUNED_CIFAR | {"model.size": "tiny", "model.patch_size": 1,
                                            "data.source.class_path": "common.data.Cifar100"},
    "mae/imagenet28_finetune": TUNED_IMAGENET | {"model.patch_size": 1, "data.image_size": 28},
    "mae/imagenet224_finetune": TUNED_IMAGENET | {"model.patch_size": 16, "data.image_size": 224},
    "mae/digits_probe": PROBED,
    "mae/shapes_probe": PROBED,
    "mae/image_folder_probe": PROBED_PHOTOGRAPHS | {"data.source.class_path": "common.data.ImageFolder"},
    "mae/cifar100_probe": PROBED_PHOTOGRAPHS | {"model.size": "tiny", "model.patch_size": 1, "data.image_size": 32,
                                                "data.batch_size": 1024,
                                                "data.source.class_path": "common.data.Cifar100"},
    "mae/imagenet28_probe": PROBED_PHOTOGRAPHS | {"model.size": "base", "model.patch_size": 1, "data.image_size": 28,
                                                  "data.batch_size": 1024,
                                                  "data.source.class_path": "common.data.ImageNet"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_it_parses_into_a_folder_of_its_name(name: str) -> None:
    config = resolved(name)
    stem = CONFIGS[name].stem
    assert config["run_name"] == f"{stem}-{config['model.size']}-p{config['model.patch_size']}-s0"
    assert config["init_from"] == ("required" if name in STARTED else None)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_published_recipe(name: str) -> None:
    config = resolved(name)
    assert {key: config[key] for key in RECIPES[name]} == RECIPES[name]


def test_depth_trains_for_as_many_steps_as_published() -> None:
    config = resolved("supervised/nyu_depth")
    steps = 795 // 16
    assert steps * config["trainer.max_epochs"] == pytest.approx(38_400, abs=steps)
    assert steps * config["model.optim.warmup_epochs"] == pytest.approx(12_800, abs=5)


# What the comment promises


@pytest.mark.parametrize("name", CONFIGS)
def test_its_comment_says_how_to_run_it_and_what_to_expect(name: str) -> None:
    for command in commands(name):
        StudyCLI(study_of(name), command, run=False)
    text = comment(name)
    assert "Expected:" in text and re.search(r"Sources?[:.]|Hyper-parameters:", text)
    if name in PAPER:
        assert re.search(r"(Table|Figure|Tables) \d([a-d]|\b)", text) and "Cost on one H200" in text


@pytest.mark.parametrize("name", [
    name for name in CONFIGS if DOWNSTREAM.search(name) and "imagenet224" not in name  # whose weights are published
])  # fmt: skip
def test_its_command_starts_from_the_folder_that_the_pre_training_s_command_makes(name: str) -> None:
    (command,), (before,) = commands(name), commands(DOWNSTREAM.sub("", name))
    config = flatten(StudyCLI("mae", command, run=False).resolved)
    same = ["--model.size", config["model.size"], "--model.patch_size", str(config["model.patch_size"])]
    assert Path(config["init_from"]) == run_folder("mae", [*before[1:], *same])


def dit_flops(config: dict[str, Any]) -> int:
    """Of one latent's forward: 32x32x4 with an autoencoder, or the pixels of CIFAR-10."""
    channels, classes = (4, 1000) if config["data.autoencoder"] else (3, 10)
    with torch.device("meta"):
        return denoising_flops(DiT(32, config["model.patch_size"], channels, classes, config["model.size"]))


def training_flops(config: dict[str, Any]) -> int:
    """Of one image: the backward costs twice the forward, and nothing where the encoder is frozen."""
    if config["model.class_path"] == "diffusion.Generation":
        return 3 * dit_flops(config)
    side = config["data.image_size"]
    vit = {"image_size": side if isinstance(side, int) else tuple(side), "patch_size": config["model.patch_size"],
           "size": config["model.size"]}  # fmt: skip
    with torch.device("meta"):
        if config["model.class_path"] == "mae.Pretraining":
            decoder = {key: config[f"model.{key}"] for key in ("decoder_width", "decoder_depth", "decoder_heads")}
            return 3 * masked_forward_flops(MaskedAutoencoder(**vit, **decoder), 0.75)
        return (1 if config.get("model.probe") else 3) * forward_flops(VisionTransformer(**vit))


@pytest.mark.parametrize("name, size, patch, images, said", [
    ("supervised/cifar100", "tiny", 1, 50_000, "ViT-T/1 2.6 h"),
    ("supervised/cifar100", "small", 1, 50_000, "ViT-S/1 7.8 h"),
    ("supervised/cifar10", "tiny", 1, 50_000, "0.2 h"),
    ("supervised/flowers102", "small", 1, 1020, "ViT-S/1: 0.2 h"),
    ("supervised/imagenet28", "tiny", 1, 1_281_167, "T/1 6 h"),
    ("supervised/imagenet28", "small", 1, 1_281_167, "S/1 18 h"),
    ("supervised/imagenet28", "base", 1, 1_281_167, "B/1 63 h"),
    ("supervised/imagenet28", "large", 1, 1_281_167, "L/1 216 h"),
    ("supervised/imagenet64", "small", 1, 1_281_167, "195 h"),
    ("supervised/imagenet64", "small", 2, 1_281_167, "/2 25 h"),
    ("supervised/imagenet224", "base", 16, 1_281_167, "14 h"),
    ("supervised/nyu_depth", "small", 1, 795, "S/1 0.2 h"),
    ("locality_ablation/cifar10", "tiny", 1, 50_000, "0.2 h"),
    ("locality_ablation/imagenet28", "base", 1, 1_281_167, "B/1 63 h"),
    ("locality_ablation/imagenet224", "base", 16, 1_281_167, "14 h"),
    ("mae/cifar100", "tiny", 1, 50_000, "T/1 2.1 h"), ("mae/cifar100", "tiny", 2, 50_000, "T/2 0.4 h"),
    ("mae/cifar100", "small", 1, 50_000, "S/1 2.8 h"), ("mae/cifar100", "small", 2, 50_000, "S/2 0.5 h"),
    ("mae/cifar100_finetune", "tiny", 1, 50_000, "T/1 0.9 h"),
    ("mae/cifar100_finetune", "small", 1, 50_000, "S/1 2.6 h"),
    ("mae/cifar100_probe", "tiny", 1, 50_000, "T/1 0.03 h"),
    ("mae/cifar10", "tiny", 1, 50_000, "0.3 h for T/1"), ("mae/cifar10_finetune", "tiny", 1, 50_000, "0.1 h for T/1"),
    ("mae/imagenet28", "base", 1, 1_281_167, "B/1 91 h"), ("mae/imagenet28", "base", 2, 1_281_167, "B/2 21 h"),
    ("mae/imagenet28_finetune", "base", 1, 1_281_167, "B/1 21 h"),
    ("mae/imagenet28_probe", "base", 1, 1_281_167, "B/1 6.3 h"),
    ("mae/imagenet224", "base", 16, 1_281_167, "B/16 21 h"),
    ("diffusion/cifar10", "small", 1, 50_000, "DiT-S/1 3.3 h"),
    ("diffusion/imagenet256", "large", 1, 1_281_167, "L/1 390 h"),
    ("diffusion/imagenet256", "large", 2, 1_281_167, "L/2 87 h"),
])  # fmt: skip
def test_the_hours_in_its_comment_are_the_formula_s(name: str, size: str, patch: int, images: int, said: str) -> None:
    assert said in " ".join(comment(name).split())
    config = resolved(name, "--model.size", size, "--model.patch_size", str(patch))
    batch = min(config["data.batch_size"], images)
    seen = images // batch * batch * config["trainer.max_epochs"]
    number = re.search(r"([\d.]+) h", said).group(1)
    hours = training_flops(config) * seen / 790e12 / 3600
    assert float(number) == pytest.approx(hours, abs=0.5 * 0.1 ** len(number.partition(".")[2]))


@pytest.mark.parametrize("name, patch, said", [
    ("diffusion/imagenet256", 1, "L/1 6.3 h"), ("diffusion/imagenet256", 2, "L/2 1.4 h"),
    ("diffusion/cifar10", 1, "without guidance 0.28 h"),
])  # fmt: skip
def test_the_hours_of_sampling_are_the_formula_s(name: str, patch: int, said: str) -> None:
    assert said in " ".join(comment(name).split())
    config = resolved(name, "--model.patch_size", str(patch))
    forwards = config["model.predict.samples"] * config["model.predict.steps"]
    forwards *= 2 if config["model.predict.guidance"] > 1 else 1
    number = re.search(r"([\d.]+) h", said).group(1)
    hours = dit_flops(config) * forwards / 790e12 / 3600
    assert float(number) == pytest.approx(hours, abs=0.5 * 0.1 ** len(number.partition(".")[2]))

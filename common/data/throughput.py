"""How fast small images are augmented: the batched recipe against torchvision's per-sample PIL pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.data.augment import Augment

MOCO_CIFAR = Augment(
    crop_scale=(0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, grayscale=0.2
)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BATCH = 1024


def augmentation_throughput(images: Tensor, rounds: int = 5) -> dict[str, float]:
    """Images per second of both pipelines on `images`, uint8 (N, 3, H, W), with the recipe for CIFAR on one thread.

    The rounds are interleaved, so that a busy machine slows both; `ratio` is the median of the rounds' ratios. The
    draws of the parameters count for both. PIL's images exist beforehand.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {"batched": _batched(images), "pil": _pil(images)}
        for run in runs.values():
            run(0)  # warms up
        seconds = {name: [] for name in runs}
        for epoch in range(rounds):
            for name, run in runs.items():
                seconds[name].append(_seconds(run, epoch))
    finally:
        torch.set_num_threads(threads)
    speed = {name: len(images) / statistics.median(values) for name, values in seconds.items()}
    ratios = [pil / batched for pil, batched in zip(seconds["pil"], seconds["batched"], strict=True)]
    return {**speed, "ratio": statistics.median(ratios)}


def _seconds(run: Callable[[int], None], epoch: int) -> float:
    start = time.perf_counter()
    run(epoch)
    return time.perf_counter() - start


def _batched(images: Tensor) -> Callable[[int], None]:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    size = tuple(images.shape[-2:])
    chunks = torch.arange(len(images)).split(BATCH)

    def run(epoch: int) -> None:
        for index in chunks:
            MOCO_CIFAR.batch(images.index_select(0, index), MOCO_CIFAR.draws(0, epoch, index), size, mean, std)

    return run


def _pil(images: Tensor) -> Callable[[int], None]:
    from torchvision import transforms

    recipe = transforms.Compose([
        transforms.RandomResizedCrop(tuple(images.shape[-2:]), MOCO_CIFAR.crop_scale, MOCO_CIFAR.crop_ratio),
        transforms.RandomHorizontalFlip(MOCO_CIFAR.flip),
        transforms.RandomApply([transforms.ColorJitter(*MOCO_CIFAR.jitter)], MOCO_CIFAR.jitter_probability),
        transforms.RandomGrayscale(MOCO_CIFAR.grayscale),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
    pictures = [transforms.functional.to_pil_image(image) for image in images]

    def run(_: int) -> None:
        for start in range(0, len(pictures), BATCH):
            torch.stack([recipe(picture) for picture in pictures[start : start + BATCH]])

    return run

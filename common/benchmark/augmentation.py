"""Images augmented per second and core: in batches on the training device, and one by one in PIL."""

from __future__ import annotations

from pathlib import Path

from common.data import Shapes
from common.data.throughput import augmentation_throughput

COLUMNS = ("pipeline", "images/s per core", "times as fast")


def measure(images: int, rounds: int) -> list[tuple[str, ...]]:
    """The rows of the table, for embedded pictures of CIFAR's size, 32x32 pixels, with the recipe for CIFAR."""
    pictures = Shapes(size=32, train=images).read(Path(), "train").images
    speed = augmentation_throughput(pictures, rounds)
    return [("PIL, image by image", f"{speed['pil']:,.0f}", ""),
            ("the suite's, in batches", f"{speed['batched']:,.0f}", f"{speed['ratio']:.2f}")]

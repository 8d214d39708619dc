"""Data sets and a place for what is trained on them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import archives
import numpy as np
import pytest


@pytest.fixture(scope="session")
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

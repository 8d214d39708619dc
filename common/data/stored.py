"""Training images that were shrunk once and for all (common.data.store), read from memory-mapped shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.sources import Source
from common.errors import InputError
from common.files import read_json

AGAIN = "remove it, and python -m common.data.store writes it anew"
SHARD = 4096  # images, 113 MB at 96x96: ImageNet has 313 shards, and each keeps a file open


class Store:
    """A finished store.

    Attributes:
        shapes: int64 (N, 2), height and width of each image before it was shrunk.
        labels: int64 (N,).

    Raises:
        InputError: none there, an unfinished or damaged one, or one of other images.
    """

    def __init__(self, folder: Path, files: list[str], labels: Tensor) -> None:
        self.folder = folder
        index = folder / "index.json"
        again = "python -m common.data.store writes it, or goes on with it"
        if not index.is_file():
            raise InputError(f"data.store: {folder} is no finished store; {again}")
        self.index = read_json(index, AGAIN, "files", "size", "shard", "images", "checksums")
        if self.index["files"] != fingerprint(files, labels):
            raise InputError(f"data.store: {folder} was made of other images than those that lie there now; remove it, "
                             "and make it anew")
        self.labels, self.shapes = labels, np.concatenate([np.array(mapped(shapes_of(path))) for path in self._paths()])
        self.shards = [mapped(path) for path in self._paths()]
        size, shard = self.index["size"], self.index["shard"]
        for number, (path, images) in enumerate(zip(self._paths(), self.shards, strict=True)):
            rows = min(shard, len(self) - number * shard)
            if images.dtype != np.uint8 or images.ndim != 4 or (len(images), *images.shape[2:]) != (rows, size, size):
                raise InputError(f"{path}: damaged, {images.dtype} of {images.shape}; {AGAIN}")

    def _paths(self) -> list[Path]:
        return [shard_file(self.folder, number) for number in range(-(-self.index["images"] // self.index["shard"]))]

    def __len__(self) -> int:
        return self.index["images"]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def images(self, device: torch.device) -> Tensor:
        """All of them on a device, uint8 (N, C, size, size), copied there shard by shard."""
        images = torch.empty((len(self), *self.shards[0].shape[1:]), dtype=torch.uint8, device=device)
        for part, shard in zip(images.split(self.index["shard"]), self.shards, strict=True):
            part.copy_(torch.from_numpy(np.array(shard)))
        return images

    def take(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """uint8 images (B, C, size, size) and their shapes (B, 2)."""
        indices, shard = list(indices), self.index["shard"]
        images = np.stack([self.shards[i // shard][i % shard] for i in indices])
        return torch.from_numpy(images), torch.from_numpy(self.shapes[indices])


def location(source: Source, root: Path, size: int) -> Path:
    return root / f"{source.title(root).replace(' ', '-')}-{size}"


def fingerprint(files: list[str], labels: Tensor) -> str:
    """Of which images a store is made, wherever they lie: class folders, names and labels."""
    told = "\n".join(f"{'/'.join(Path(file).parts[-2:])} {label}"
                     for file, label in zip(files, labels.tolist(), strict=True))
    return hashlib.sha256(told.encode()).hexdigest()


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def shapes_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}-shapes.npy")


def checksum_of(shard: Path) -> Path:
    """The checksum of what was written, beside the shard until it stands in the index of the finished store."""
    return shard.with_name(f"{shard.stem}-checksum.npy")


def mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; python -m common.data.store writes it anew") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); {AGAIN}") from error

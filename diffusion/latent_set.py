"""A data set of cached latents."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.augment import FLIP, Augment
from common.data.loader import Draw
from common.errors import InputError
from common.files import read_json

SPLITS = ("train", "val")
AGAIN = "remove it and run python -m diffusion.latents again, which writes what is missing"


class LatentSet(Dataset):
    """Moments of a split in memory-mapped shards.

    Args:
        folder: that the command wrote.
        split: train or val.
        fingerprint: of the autoencoder that is to decode what is generated.
        shape: of an image's moments (channels, h, w).
        augment: its flip decides between an image and its mirror image, exactly as where images are encoded as they
            come; none takes the images.
        seed: of that decision.

    Raises:
        InputError: no such cache, an unfinished or damaged one, or one of another autoencoder. Of damage to shards no
            more is noticed than costs nothing; python -m diffusion.latents, run again, reads them all.
    """

    def __init__(
        self, folder: str | Path, split: str, fingerprint: str, shape: tuple[int, int, int], augment: Augment | None,
        seed: int,
    ) -> None:  # fmt: skip
        self.folder, self.augment, self.seed = Path(folder) / split, augment, seed
        index = read_index(Path(folder), split)
        if index["fingerprint"] != fingerprint:
            raise InputError(f"data.latents: {folder} was encoded by another autoencoder than data.autoencoder (or "
                             "before its training went on); encode anew with python -m diffusion.latents")
        if augment is not None and augment.flip and not index["flips"]:
            raise InputError(f"data.latents: {folder} holds no mirror images, and data.augment.flip is {augment.flip}")
        self.images, self.shard = index["images"], index["shard"]
        check(self.folder / "labels.npy")
        self.labels = torch.from_numpy(_load(self.folder / "labels.npy", self.images).copy())
        files, views = shard_files(self.folder, self.images, self.shard), 2 if index["flips"] else 1
        self.shards = [_load(path, min(self.shard, self.images - number * self.shard), views, *shape)
                       for number, path in enumerate(files)]

    def __len__(self) -> int:
        return self.images

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        keys = {name: torch.tensor([getattr(draw, name) for draw in draws]) for name in Draw._fields}
        index = keys["index"]
        mirrored = torch.zeros(len(draws), dtype=torch.long)
        if self.augment is not None and self.augment.flip:
            mirrored = (self.augment.draws(self.seed, keys["epoch"], index)[:, FLIP] < self.augment.flip).long()
        rows = [self.shards[i // self.shard][i % self.shard, m] for i, m in
                zip(index.tolist(), mirrored.tolist(), strict=True)]  # fmt: skip
        return {"moments": torch.from_numpy(np.stack(rows)).float(), "label": self.labels[index], **keys}


def read_index(folder: Path, split: str) -> dict[str, Any]:
    path = folder / split / "index.json"
    if not path.is_file():
        raise InputError(f"data.latents: {folder} holds no finished {split} split; python -m diffusion.latents "
                         f"{folder} writes it, or goes on with it")
    return read_json(path, AGAIN, "fingerprint", "images", "shard", "flips")


def _load(path: Path, *shape: int) -> np.ndarray:
    """An array of this shape, mapped into memory."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); {AGAIN}") from error
    if array.shape != shape:
        raise InputError(f"{path}: damaged, an array of shape {array.shape} in place of {shape}; {AGAIN}")
    return array


def check(path: Path) -> None:
    """Refuses an array that is not as it was written: a power loss may leave zeros in its place."""
    beside = checksum_file(path)
    if not beside.is_file() or beside.read_bytes() != checksum(path.read_bytes()):
        raise InputError(f"{path}: damaged, or its checksum {beside.name} is; {AGAIN}")


def checksum(content: bytes | memoryview) -> bytes:
    return b"%08x" % zlib.crc32(content)


def checksum_file(path: Path) -> Path:
    return path.with_suffix(".crc32")


def shard_files(folder: Path, images: int, shard: int) -> list[Path]:
    return [folder / f"{number:05d}.npy" for number in range(-(-images // shard))]

"""Data sets that answer the draws of a batch with the batch: from memory, or from files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.folders import decode
from common.data.loader import Draw
from common.data.preparation import TrainingPreparation
from common.data.stored import Store
from common.errors import InputError

# What a loader's process does to images (C, h, w) of any sizes, each for its draw: uint8 (B, C, H, W) of one size.
Prepare = Callable[[Sequence[Tensor], Sequence[Draw]], Tensor]
AT_ONCE = 32  # images that are held decoded, since whole photographs are large


def _keys(draws: list[Draw]) -> dict[str, Tensor]:
    """All that a batch's randomness depends on, int64 (B,) each."""
    epoch, index, place = torch.tensor(list(zip(*draws, strict=True)))
    return {"epoch": epoch, "index": index, "place": place}


class ResidentSet(Dataset):
    """Images uint8 (N, C, h, w) and labels int64 (N,) in memory: a batch costs one gather.

    Without `prepare` the images go to the device as they are, and all work on them is done there.
    """

    def __init__(self, images: Tensor, labels: Tensor, prepare: Prepare | None = None) -> None:
        self.images, self.labels, self.prepare = images, labels, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        keys = _keys(draws)
        images = self.images.index_select(0, keys["index"])  # six times as fast as indexing
        if self.prepare is not None:
            images = self.prepare(images, draws)
        return {"image": images, "label": self.labels[keys["index"]], **keys}


class HeldSet(Dataset):
    """The labels of a set whose images the device holds, which takes them by `index`."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        keys = _keys(draws)
        return {"label": self.labels[keys["index"]], **keys}


class StoredSet(Dataset):
    """Squares of a store as they are, with the `shape` (B, 2) that each image had; or prepared in the loader's process.

    Args:
        prepare: crops and randomises a batch where that is no work for the device.
    """

    def __init__(self, store: Store, prepare: TrainingPreparation | None = None) -> None:
        self.store, self.labels, self.prepare = store, store.labels, prepare

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        keys = _keys(draws)
        images, shapes = self.store.take([draw.index for draw in draws])
        batch = {"image": images, "label": self.labels[keys["index"]], **keys}
        if self.prepare is None:
            return {**batch, "shape": shapes}
        return {**batch, "image": self.prepare.squares(images, shapes, draws)}


class FileSet(Dataset):
    """Images decoded when a batch asks for them, in the loader's processes.

    An unreadable image is named and counted once. In training, as long as there are at most `max_unreadable`, the
    next readable image of the set stands in for it, with its own label and the draw of the one it replaces: which one
    that is depends on the files alone. An evaluation (`exact`) refuses, since it counts every image.

    Args:
        labels: int64 (N,); None for images without labels, whose batches hold the names of the `file`s instead.
        max_unreadable: per training process; its loader's processes count together.
    """

    def __init__(
        self, files: list[str], labels: Tensor | None, channels: int, prepare: Prepare,
        exact: bool = True, max_unreadable: int = 0,
    ) -> None:  # fmt: skip
        self.files, self.labels, self.channels, self.prepare = files, labels, channels, prepare
        self.exact, self.max_unreadable = exact, max_unreadable
        self.unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        parts, taken = [], []
        for start in range(0, len(draws), AT_ONCE):
            some = draws[start : start + AT_ONCE]
            images, indices = zip(*(self._decoded(draw.index) for draw in some), strict=True)
            parts.append(self.prepare(images, some))
            taken += indices
        batch = {"image": torch.cat(parts), **_keys(draws)}
        if self.labels is None:
            return {**batch, "file": [self.files[index] for index in taken]}
        return {**batch, "label": self.labels[taken]}

    def _decoded(self, index: int) -> tuple[Tensor, int]:
        """The image of an index, or the next readable one, and its index."""
        while True:
            if not self.unreadable[index]:
                try:
                    return decode(self.files[index], self.channels), index
                except InputError as error:
                    self._count(index, error)
            index = (index + 1) % len(self.files)

    def _count(self, index: int, error: InputError) -> None:
        self.unreadable[index] = True
        count = int(self.unreadable.sum())
        if self.exact:
            raise InputError(f"{error}; an evaluation needs every image") from error
        if count > self.max_unreadable or count == len(self.files):
            raise InputError(f"{error}; {count} so far, data.max_unreadable: {self.max_unreadable}") from error
        warnings.warn(f"{error}; the next readable one stands in for it ({count} so far)", stacklevel=2)

"""Where images come from: a source is swapped by its class_path (`source: common.data.Digits`)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.randomness import permutation

SPLITS = ("train", "val", "test")


class Pictures(NamedTuple):
    """The images of a split, in a fixed order."""

    images: Tensor | list[str]  # uint8 (N, C, H, W), or the files to decode
    labels: Tensor  # int64 (N,)


class Source:
    """Images with one label each, in the splits train, val and test.

    `read` neither decodes nor fetches anything: what it cannot return as pixels at once it returns as files. Where
    something is missing or malformed it raises an InputError that says how to lay it out.
    """

    name: str
    channels = 3
    resident = False  # small enough to be held decoded in memory
    layout = "embedded, nothing to lay out"  # below the root
    note = ""  # what a reader of results must know of the splits
    published: tuple[int, int] | None = None  # training images and classes, for what a run costs without the files

    def class_names(self, root: Path) -> list[str]:
        """The classes in the order of the labels, known without reading pixels."""
        raise NotImplementedError

    def read(self, root: Path, split: str) -> Pictures:
        raise NotImplementedError

    def labels(self, root: Path, split: str) -> Tensor:
        """The labels alone, for counting."""
        return self.read(root, split).labels

    def title(self, root: Path) -> str:
        """What results are reported on: the name, and the form of the files where it changes the pixels."""
        return self.name


class Digits(Source):
    """scikit-learn's 1797 handwritten digits, 8x8 pixels, one channel, of 17 grey levels.

    There is no official split. Ours never changes: 1197 train, 300 val and 300 test images, stratified by class.
    """

    name, channels, resident = "digits", 1, True

    def class_names(self, root: Path) -> list[str]:
        return [str(digit) for digit in range(10)]

    def read(self, root: Path, split: str) -> Pictures:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images * 255 / 16).round().byte()[:, None]
        labels = torch.from_numpy(digits.target).long()
        chosen = _stratified(labels, {"test": 300, "val": 300, "train": 1197})[split]
        return Pictures(images[chosen], labels[chosen])


def _stratified(labels: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Indices of each split, where every class has its share to within one image."""
    order = permutation("split", 0, n=len(labels))
    quantile = torch.empty(len(labels))  # the place of an image among its class
    for label in labels.unique():
        members = order[labels[order] == label]
        quantile[members] = (torch.arange(len(members)) + 0.5) / len(members)
    parts = quantile.argsort(stable=True).split(list(sizes.values()))
    return {split: part.sort().values for split, part in zip(sizes, parts, strict=True)}

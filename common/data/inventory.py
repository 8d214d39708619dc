"""What there is of each data set below a root: counts per split, or how to lay out what is missing."""

from __future__ import annotations

from pathlib import Path

from common.data.cifar import Cifar10, Cifar100
from common.data.folders import Flowers102, ImageNet
from common.data.shapes import Shapes
from common.data.sources import SPLITS, Digits, Source
from common.errors import InputError


def describe(source: Source, root: Path) -> list[str]:
    """A line per split: images, classes, images per class. Lists files, but decodes none."""
    names = source.class_names(root)
    lines = [f"{source.title(root)}: {len(names)} classes, {source.channels} channel(s)"]
    expected = getattr(source, "expected", len(names))
    if len(names) != expected:
        lines[0] += f"; {expected} expected"
    if source.note:
        lines[0] += f"; {source.note}"
    for split in SPLITS:
        counts = source.labels(root, split).bincount(minlength=len(names))
        least, most = counts.min().item(), counts.max().item()
        each = f"{least}" if least == most else f"{least} to {most}"
        lines.append(f"  {split}: {counts.sum().item()} images, {each} a class")
    return lines


def inventory(root: Path) -> list[str]:
    """`describe` of every source that has its place below the root; for a missing one, what was looked for."""
    lines = []
    for source in (Digits(), Shapes(), Cifar10(), Cifar100(), Flowers102(), ImageNet()):
        try:
            lines += describe(source, root)
        except InputError as error:
            lines.append(f"{source.name}: {error}")
    return lines

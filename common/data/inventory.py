"""What there is of each data set below a root: counts per split, or how to lay out what is missing."""

from __future__ import annotations

from pathlib import Path

from common.data.sources import SPLITS, Source


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

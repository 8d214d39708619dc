"""What a benchmark prints: Markdown with command, hardware and versions, ready for RESULTS.md."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import InputError
from common.files import write_atomically

# That figures depend on, or are beside.
PACKAGES = ("torch", "torchvision", "pillow", "timm", "lightning", "diffusers", "torch-fidelity")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown whose columns are aligned in the source as well."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for cells in (columns, ["-" * width for width in widths], *rows):
        yield f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"


def circumstances(module: str, arguments: Sequence[str], rounds: int) -> Iterator[str]:
    """Command (`python -m module arguments`), hardware, versions: what a figure means nothing without."""
    # Lightning costs seconds, which a command that was mistyped need not wait for.
    from common.training.run import commit, hardware
    from common.training.trainer import Trainer

    cpu = hardware(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False))
    if torch.cuda.is_available():
        cpu += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield f"`{shlex.join(['python', '-m', module, *arguments])}`  "
    yield f"{cpu}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, {versions}; " \
          f"commit {commit()}; medians over {rounds} rounds"


class Section(NamedTuple):
    """A table with its caption."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def publish(
    module: str, arguments: Sequence[str], rounds: int, sections: Iterable[Section], file: str | None = None
) -> None:
    """Prints the tables of `python -m module arguments`, each as soon as it is there, and what they mean nothing
    without; writes the same as JSON to a file where one is named.
    """
    head = list(circumstances(module, arguments, rounds))
    print(*head, sep="\n", flush=True)
    tables = []
    for caption, columns, rows in sections:
        print("", caption, "", *table(columns, rows), sep="\n", flush=True)
        values = [dict(zip(columns, map(_number, row), strict=True)) for row in rows]
        tables.append({"caption": caption, "rows": values})
        if file:  # after each, since the next may take long
            told = {"command": head[0].strip("` "), "circumstances": head[1], "tables": tables}
            write_atomically(Path(file), json.dumps(told, indent=1) + "\n")


def _number(cell: str) -> float | str:
    """A cell that is a number and nothing else as one."""
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return cell


def check_counts(options: argparse.Namespace, **least: int) -> None:
    """That each named option is at least so much, or was left out.

    Raises:
        InputError: one that is less.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise InputError(f"--{name} {value}: give a whole number, {bound} or more")

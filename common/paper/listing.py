"""What there is: the ids with the state of their runs, and the exact commands of one."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.errors import InputError
from common.paper.exhibits import RUNS, Exhibit, Scale
from common.paper.state import state


def list_exhibits(exhibits: Mapping[str, Exhibit]) -> None:
    table = Table("id", "shows", "scale", "arms", "seeds", "runs", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for exhibit in exhibits.values():
        for position, (name, scale) in enumerate(exhibit.scales.items()):
            first = [exhibit.id, exhibit.shows] if position == 0 else ["", ""]
            table.add_row(*first, name, str(len(scale.arms)), str(scale.seeds), _states(scale))
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)


def _states(scale: Scale) -> str:
    # A default folder begins with the config's name; where there is none, no parser is needed to know.
    states = Counter(state(start) if any((RUNS / start.arm.study).glob(f"{start.arm.config.stem}-*")) else "missing"
                     for start in scale.starts())
    return ", ".join(f"{count} {name}" for name, count in sorted(states.items()))


def show(exhibit: Exhibit, scales: Mapping[str, Scale]) -> Iterator[str]:
    """What an exhibit claims, and for each scale the source of its hyper-parameters and its commands."""
    yield f"{exhibit.id}: {exhibit.shows}" + (f"; judged by {exhibit.metric}" if exhibit.metric else "")
    yield from (f"  paper: {statement}" for statement in exhibit.statements)
    for name, scale in scales.items():
        starts = scale.starts()
        yield ""
        yield f"{name}: {scale.shows or 'as published'}; arms: {len(scale.arms)}, seeds: {scale.seeds}"
        if scale.metric != exhibit.metric:
            yield f"  judged by {scale.metric}"
        for config in dict.fromkeys(arm.config for arm in scale.arms):
            yield f"  hyper-parameters: {os.path.relpath(config)}, whose first lines name their sources:"
            yield from (f"    {line}" for line in _leading_comment(config))
        yield f"  overrides on the command line: {exhibit.study}/paper.yaml"
        for start in starts:
            yield f"  # {start.arm.name}, seed {start.seed}"
            yield from (f"  {start.shown(stage)}" for stage in start.stages)
        if scale.draws:
            yield "  # the figure"
            yield f"  {shlex.join(['python', *scale.drawing(exhibit.id)[1:]])}"


def commands(exhibit: Exhibit, scale: Scale, seeds: int | None, number: int | None) -> Iterator[str]:
    """A line a stage, STUDY STAGE ARGUMENTS, of one run by its number, or of all, each behind its number."""
    starts = scale.starts(seeds)
    if number is not None and not 0 <= number < len(starts):
        raise InputError(f"--number {number}: {exhibit.id} has the runs 0 to {len(starts) - 1} at scale {scale.name}")
    for place, start in enumerate(starts):
        if number in (None, place):
            front = "" if number is not None else f"{place}\t"
            yield from (front + shlex.join(start.command(stage)[2:]) for stage in start.stages)


def _leading_comment(config: Path) -> Iterator[str]:
    for line in config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").removeprefix(" ")

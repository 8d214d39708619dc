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
from common.paper.cost import duration, price, with_extended
from common.paper.exhibits import Exhibit, Scale, Start
from common.paper.state import own_seconds, state


def list_exhibits(exhibits: Mapping[str, Exhibit]) -> None:
    columns = ("id", "shows", "scale", "arms", "seeds", "cost (at least)", "runs")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for exhibit in exhibits.values():
        for position, (name, scale) in enumerate(exhibit.scales.items()):
            first = [exhibit.id, exhibit.shows] if position == 0 else ["", ""]
            table.add_row(*first, name, str(len(scale.arms)), str(scale.seeds), _cost(scale), _states(scale))
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)


def _cost(scale: Scale) -> str:
    starts = scale.starts()
    return duration(sum(price(start).flops for start in starts), scale.name) if starts else "-"


def _states(scale: Scale) -> str:
    states = Counter(state(start) for start in scale.starts())
    return ", ".join(f"{count} {name}" for name, count in sorted(states.items()))


def show(exhibit: Exhibit, scales: Mapping[str, Scale]) -> Iterator[str]:
    """What an exhibit claims, and for each scale the source of its hyper-parameters and its commands."""
    yield f"{exhibit.id}: {exhibit.shows}" + (f"; judged by {exhibit.metric}" if exhibit.metric else "")
    yield from (f"  paper: {statement}" for statement in exhibit.statements)
    for name, scale in scales.items():
        starts = scale.starts()
        yield ""
        yield f"{name}: {scale.shows or 'as published'}; arms: {len(scale.arms)}, seeds: {scale.seeds}"
        if starts:
            yield f"  cost by formula: {_cost(scale)}" + _measured(starts)
        if scale.metric != exhibit.metric:
            yield f"  judged by {scale.metric}"
        for config in dict.fromkeys(arm.config for arm in scale.arms):
            for file in with_extended(config):
                verb = "hyper-parameters" if file == config else "which extends"
                yield f"  {verb}: {os.path.relpath(file)}, whose first lines name their sources:"
                yield from (f"    {line}" for line in _leading_comment(file))
        yield f"  overrides on the command line: {exhibit.study}/paper.yaml"
        for start in starts:
            yield f"  # {start.arm.name}, seed {start.seed}: {price(start).text()}"
            yield from (f"  {start.shown(stage)}" for stage in start.stages)
        if scale.prints:
            yield "  # the table"
            yield f"  {shlex.join(['python', '-m', *scale.prints])}"
        if scale.draws:
            yield "  # the figure"
            yield f"  {shlex.join(['python', *scale.drawing(exhibit.id)[1:]])}"


def _measured(starts: list[Start]) -> str:
    """What the finished ones of these runs took, where there are any."""
    done = [start for start in starts if state(start) == "finished"]
    if not done:
        return ""
    seconds = sum(map(own_seconds, done))
    rate = sum(price(start).images * price(start).training_flops for start in done) / max(seconds, 1e-9)
    return f"; measured: {len(done)} of {len(starts)} trained in {seconds / 60:,.1f} min, {rate / 1e9:,.0f} GFLOP/s"


def commands(id: str, starts: list[Start], number: int | None) -> Iterator[str]:
    """A line a stage, STUDY STAGE ARGUMENTS, of one run by its number, or of all, each behind its number.

    What prepares a training is a line MODULE ARGUMENTS before it.
    """
    if number is not None and not 0 <= number < len(starts):
        raise InputError(f"--number {number}: {id} has the runs 0 to {len(starts) - 1}")
    for place, start in enumerate(starts):
        if number in (None, place):
            front = "" if number is not None else f"{place}\t"
            yield from (front + shlex.join(start.command(stage)[2:]) for stage in start.stages)


def _leading_comment(config: Path) -> Iterator[str]:
    for line in config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").removeprefix(" ")

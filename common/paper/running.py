"""Training the arms one after another, and each after the arms whose runs it uses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable

from common.compare import write
from common.errors import InputError
from common.paper.cost import duration, price
from common.paper.exhibits import Exhibit, Scale, Start
from common.paper.section import DRAWN, TABLE, Section
from common.paper.state import state
from common.runs import read_run, trained

STOPPED = (75, 130, 143)  # a training was asked to stop: no other one is to start in its place


class Pace:
    """How long the runs that are left take, at the speed of those that were trained so far.

    Until the first one is, by formula. Speed is FLOPs by formula a second: exact among models of one size, and of one
    order among all.
    """

    def __init__(self, starts: Iterable[Start], scale: str) -> None:
        self._left = {start.identity: price(start).flops for start in starts}
        self._scale, self._flops, self._seconds = scale, 0.0, 0.0

    def done(self, start: Start, seconds: float = 0.0) -> None:
        """Of a run that was trained in so many seconds, or was there."""
        self._left.pop(start.identity, None)
        if seconds:
            self._flops, self._seconds = self._flops + price(start).flops, self._seconds + seconds

    def left(self) -> str:
        flops = sum(self._left.values())
        if not self._flops:
            return f"{duration(flops, self._scale)} by formula"
        minutes = flops * self._seconds / self._flops / 60
        return f"about {minutes:.0f} min left" if minutes < 120 else f"about {minutes / 60:.1f} h left"


def run_all(exhibits: Iterable[Exhibit], scale: str, seeds: int | None) -> int:
    """Runs every exhibit that has the scale. One that fails is told at the end, and keeps no other from running."""
    failed: dict[str, str] = {}
    exhibits = list(exhibits)
    having = [exhibit.scales[scale] for exhibit in exhibits if scale in exhibit.scales]
    pace = Pace((start for each in having for start in each.starts(seeds)), scale)
    for number, exhibit in enumerate(exhibits, 1):
        print(f"{exhibit.id}: {number} of {len(exhibits)} tables and figures", flush=True)
        if scale not in exhibit.scales:
            print(f"{exhibit.id}: has no scale {scale}", flush=True)
            continue
        try:
            code = run(exhibit, exhibit.scales[scale], seeds, pace)
        except InputError as error:
            code, failed[exhibit.id] = 2, str(error)
        if code in STOPPED:
            return code
        if code:
            failed.setdefault(exhibit.id, f"exit code {code}")
    for name, reason in failed.items():
        print(f"{name}: not done: {reason}", file=sys.stderr)
    return 1 if failed else 0


def run(exhibit: Exhibit, scale: Scale, seeds: int | None, pace: Pace | None = None) -> int:
    """Trains and tests what is not finished, then compares. Returns the exit code of what stopped it, or 0.

    Args:
        pace: of all that is to run, where this exhibit is not all.
    """
    starts = scale.starts(seeds)
    pace = pace or Pace(starts, scale.name)
    for number, start in enumerate(starts, 1):
        place = f"{exhibit.id} {scale.name}, {number} of {len(starts)}: {start.arm.name}, seed {start.seed}"
        if state(start) == "finished":
            print(f"{place}: finished, in {start.located[0]}", flush=True)
            pace.done(start)
            continue
        for source in start.sources.values():
            # Whatever the reason: other weights than the last are not to be used.
            if (there := state(source)) != "finished":
                print(f"{place}: not started, since it is to use {source.located[0]}, which is {there}; the same "
                      "command goes on there", file=sys.stderr)
                return 1
        print(f"{place}: {price(start).flops:.2g} FLOP; {pace.left()}", flush=True)
        fresh, began = state(start) == "missing", time.perf_counter()
        for stage in start.stages:
            if _due(start, stage):
                print(start.shown(stage), flush=True)
                if code := _called(start.command(stage), place):
                    return code
            if stage == "prepare":
                began = time.perf_counter()
        if state(start) == "not tested":
            folder = start.located[0]
            tags = [tag for tag in sorted(read_run(folder).results["metrics"]) if tag.startswith("test/")]
            raise InputError(f"{exhibit.study}/paper.yaml: {exhibit.id}, scale {scale.name}: metric {start.judged_by}: "
                             f"the test of {folder} did not measure it; there is {', '.join(tags) or 'none of test/'}")
        whole = fresh and state(start) == "finished"  # not what is left of a run that went on
        pace.done(start, time.perf_counter() - began if whole else 0.0)
    code = 0
    if scale.draws:
        scale.figure(exhibit.id).unlink(missing_ok=True)  # drawn of fewer runs
        code = _called(scale.drawing(exhibit.id, seeds), f"{exhibit.id} {scale.name}, its figure")
        if code == 0:
            of = {str(start.located[0]): trained(start.located[0]) for start in scale.compared(seeds)}
            write(scale.folder(exhibit.id) / DRAWN, json.dumps(of))
    if scale.prints:
        code = _printed(scale, exhibit.id) or code
    section = Section(exhibit, scale, starts)
    if starts:
        section.print()
    section.write()
    return code


def _due(start: Start, stage: str) -> bool:
    there = state(start)
    if stage == "prepare":  # else there is nothing to train, or its training will say why not
        return there in ("missing", "unfinished")
    return (there == "not tested") == (stage == "test")


def _printed(scale: Scale, exhibit: str) -> int:
    """Keeps what the command of a generated table prints, and shows it."""
    outcome = subprocess.run([sys.executable, "-m", *scale.prints], stdout=subprocess.PIPE, text=True)
    if outcome.returncode == 0:
        print(outcome.stdout)
        write(scale.folder(exhibit) / TABLE, outcome.stdout)
    return outcome.returncode


def _called(command: list[str], place: str) -> int:
    """The exit code of a command, of which `place` speaks where it is not 0."""
    code = subprocess.run(command).returncode
    if code:
        mended = "once that is mended, " if code == 2 else ""
        print(f"{place}: stopped with exit code {code}; {mended}the same command goes on there", file=sys.stderr)
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell reports it

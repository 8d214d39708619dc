"""Training the arms one after another, and each after the arms whose runs it uses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

from common.errors import InputError
from common.paper.exhibits import Exhibit, Scale
from common.paper.report import report
from common.paper.state import state
from common.runs import read_run

STOPPED = (75, 130, 143)  # a training was asked to stop: no other one is to start in its place


def run_all(exhibits: Iterable[Exhibit], scale: str, seeds: int | None) -> int:
    """Runs every exhibit that has the scale. One that fails is told at the end, and keeps no other from running."""
    failed: dict[str, str] = {}
    for exhibit in exhibits:
        if scale not in exhibit.scales:
            print(f"{exhibit.id}: has no scale {scale}", flush=True)
            continue
        try:
            code = run(exhibit, exhibit.scales[scale], seeds)
        except InputError as error:
            code, failed[exhibit.id] = 2, str(error)
        if code in STOPPED:
            return code
        if code:
            failed.setdefault(exhibit.id, f"exit code {code}")
    for name, reason in failed.items():
        print(f"{name}: not done: {reason}", file=sys.stderr)
    return 1 if failed else 0


def run(exhibit: Exhibit, scale: Scale, seeds: int | None) -> int:
    """Trains and tests what is not finished, then compares. Returns the exit code of what stopped it, or 0."""
    starts = scale.starts(seeds)
    for number, start in enumerate(starts, 1):
        place = f"{exhibit.id} {scale.name}, {number} of {len(starts)}: {start.arm.name}, seed {start.seed}"
        if state(start) == "finished":
            print(f"{place}: finished, in {start.located[0]}", flush=True)
            continue
        for source in start.sources.values():
            # A training may stop early and leave with 0, as with trainer.max_time.
            if (there := state(source)) != "finished":
                print(f"{place}: not started, since it is to use {source.located[0]}, which is {there}; the same "
                      "command goes on there", file=sys.stderr)
                return 1
        for stage in start.stages:
            if (state(start) == "not tested") == (stage == "test"):
                print(f"{place}\n{start.shown(stage)}", flush=True)
                if code := _called(start.command(stage), place):
                    return code
        if state(start) == "not tested":
            folder = start.located[0]
            tags = [tag for tag in sorted(read_run(folder).results["metrics"]) if tag.startswith("test/")]
            raise InputError(f"{exhibit.study}/paper.yaml: {exhibit.id}, scale {scale.name}: metric {start.judged_by}: "
                             f"the test of {folder} did not measure it; there is {', '.join(tags) or 'none of test/'}")
    code = _called(scale.drawing(exhibit.id, seeds), f"{exhibit.id} {scale.name}, its figure") if scale.draws else 0
    if not starts:
        return code
    folders = {start.located[0]: start.arm.name for start in scale.compared(seeds)}
    report(exhibit, scale, folders, drawn=bool(scale.draws) and code == 0)
    return code


def _called(command: list[str], place: str) -> int:
    """The exit code of a command, of which `place` speaks where it is not 0."""
    code = subprocess.run(command).returncode
    if code:
        mended = "once that is mended, " if code == 2 else ""
        print(f"{place}: stopped with exit code {code}; {mended}the same command goes on there", file=sys.stderr)
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell reports it

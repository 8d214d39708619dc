"""python -m common.paper list | show ID | run ID --scale demo | commands ID --scale demo: the paper's tables and
figures, arm by arm.

`run` trains the arms one after another, and each after the arms whose runs it uses; samples of generative models are
then judged by `test`. The same command goes on where it stopped: finished arms are skipped, since their run folders say
so. At the end it compares them, in runs/paper/ID-SCALE/.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.command import run_command
from common.compare import draw_figure, markdown, print_table, write
from common.comparison import Comparison
from common.errors import InputError
from common.exhibits import RUNS, Exhibit, Scale, Start, read_exhibits
from common.runs import changed_source, find_runs, read_run


def state(start: Start) -> str:
    """finished, not tested (or by other samples than this arm's), unfinished, failed, unreadable, missing, or what a
    changed YAML leaves behind: another config, and weights other than those that its source has now.
    """
    folder, expected_hash = start.located
    if not (folder / "results.json").is_file():
        return "missing"
    run = read_run(folder)
    if run.results.get("config_hash", expected_hash) != expected_hash:
        return "another config"
    if changed_source(run.results):
        return "of other weights"
    if run.status != "finished" or not start.judged_by:
        return run.status
    record = run.results.get("evaluation", {})
    otherwise = "solver" in record and any(record.get(key) != value for key, value in start.sampling.items())
    return "not tested" if otherwise or start.judged_by not in run.results["metrics"] else run.status


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


def report(exhibit: Exhibit, scale: Scale, folders: Mapping[Path, str], drawn: bool) -> None:
    """Prints the comparison, and writes its figure and Markdown below runs/paper/."""
    comparison = Comparison(find_runs(folders), scale.columns, labels=folders)
    title = f"{exhibit.id}: {scale.shows or exhibit.shows}"
    measured = measured_differences(exhibit, scale.metric, comparison)
    lines = [*(f"paper: {statement}" for statement in exhibit.statements), *measured]
    print(f"\n{title}")
    print_table(comparison)
    print("\n".join(lines))
    folder = scale.folder(exhibit.id)
    text = f"# {title}\n\n{markdown(comparison)}\n" + "".join(f"- {line}\n" for line in lines)
    figures = ["![curves](comparison.png)", *["![figure](figure.png)"] * drawn]
    write(folder / "comparison.md", "\n".join([text, *figures]) + "\n")
    curve = None if scale.metric.startswith("test/") else scale.metric  # a test has one value and no curve
    draw_figure(comparison, folder / "comparison.png", title, curve)


def measured_differences(exhibit: Exhibit, metric: str, comparison: Comparison) -> Iterator[str]:
    """The differences that the paper states, as measured here, for the arms that ran."""
    values = {group.label: group.statistic(metric) for group in comparison.groups}
    for pair in exhibit.differences:
        one, other = (values.get(arm) for arm in pair.split(" - "))
        if one and other:
            yield f"here: {metric}: {pair} = {one.mean - other.mean:+.2f} (n = {min(one.n, other.n)})"


def _parser(exhibits: Mapping[str, Exhibit]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m common.paper", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="ids, what they show, their arms, and how far their runs are", allow_abbrev=False)
    for name, text in [("show", "the exact commands, and where hyper-parameters come from"),
                       ("run", "train what is not finished, then compare"),
                       ("commands", "a line for each run and stage, as common.submit's arrays take them")]:
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("id", help=", ".join(exhibits))
        command.add_argument("--scale", required=name != "show", help="demo (minutes on two cores), gpu or paper")
        if name != "show":
            command.add_argument("--seeds", type=int, help="seeds 0 to N-1; default: the scale's own number")
        if name == "commands":
            command.add_argument("--number", type=int, help="of the one run that is wanted, from 0; default: all")
    return parser


def main(arguments: list[str]) -> int:
    exhibits = read_exhibits()
    options = _parser(exhibits).parse_args(arguments)
    if options.command == "list":
        list_exhibits(exhibits)
        return 0
    if options.id not in exhibits:
        raise InputError(f"{options.id}: no such table or figure; there is {', '.join(exhibits)}")
    exhibit = exhibits[options.id]
    if options.command == "show":
        scales = {options.scale: exhibit.scale(options.scale)} if options.scale else exhibit.scales
        print("\n".join(show(exhibit, scales)))
        return 0
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: give a number of seeds, 1 or more")
    if options.command == "commands":
        print("\n".join(commands(exhibit, exhibit.scale(options.scale), options.seeds, options.number)))
        return 0
    return run(exhibit, exhibit.scale(options.scale), options.seeds)


if __name__ == "__main__":
    run_command(main)

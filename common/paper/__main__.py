"""python -m common.paper list | show ID | run ID --scale demo | report [ID]: the paper's tables and figures.

`run` trains the arms one after another, and each after the arms whose runs it uses; samples of generative models are
then judged by `test`. The same command goes on where it stopped: finished arms are skipped, since their run folders say
so. At the end it compares them, in runs/paper/ID-SCALE/. `run all` runs every table and figure; arms that several of
them have are trained once. With --slurm the runs become arrays of Slurm's jobs. `report` writes runs/paper/report.html:
what all runs so far came to, beside what the paper states.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping

from common.command import Parser, run_command
from common.errors import InputError
from common.paper.exhibits import Exhibit, read_exhibits, runs_of
from common.paper.listing import commands, list_exhibits, show
from common.paper.report import report
from common.paper.running import run, run_all

ALL = "all"


def _parser(exhibits: Mapping[str, Exhibit]) -> Parser:
    parser = Parser("python -m common.paper", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="ids, what they show, cost, and how far their runs are")
    command = commands.add_parser("report", help="what the runs so far came to, as one page")
    command.add_argument("id", nargs="?", default=ALL, help=f"{', '.join(exhibits)}; default: all of them")
    command.add_argument("--scale", help="demo, gpu or paper; default: all that have runs")
    for name, text in [("show", "the exact commands, and where hyper-parameters come from"),
                       ("run", "train what is not finished, then compare"),
                       ("commands", "a line for each run and stage, as common.submit's arrays take them")]:
        command = commands.add_parser(name, help=text)
        command.add_argument("id", help=", ".join([*exhibits, *[ALL] * (name != "show")]))
        command.add_argument("--scale", required=name != "show", help="demo (minutes on two cores), gpu or paper")
        if name != "show":
            command.add_argument("--seeds", type=int, help="seeds 0 to N-1; default: the scale's own number")
        if name == "run":
            command.add_argument("--slurm", nargs="?", const="", metavar="OPTIONS",
                                 help="submit the runs as arrays of jobs, with options of common.submit, as in "
                                      "--slurm='--nodes 2 --gpus 8'")
        if name == "commands":
            command.add_argument("--number", type=int, help="of the one run that is wanted, from 0; default: all")
    return parser


def main(arguments: list[str]) -> int:
    exhibits = read_exhibits()
    options = _parser(exhibits).parse_args(arguments)
    if options.command == "list":
        list_exhibits(exhibits)
        return 0
    if options.id != ALL and options.id not in exhibits or options.id == ALL and options.command == "show":
        raise InputError(f"{options.id}: no such table or figure; there is {', '.join(exhibits)}")
    _check(options, exhibits)
    chosen = list(exhibits.values()) if options.id == ALL else [exhibits[options.id]]
    if options.command == "report":
        report(chosen, options.scale)
        return 0
    if options.command == "run" and options.slurm is not None:
        from common.submit import main as submit

        seeds = ["--seeds", str(options.seeds)] if options.seeds else []
        try:
            words = shlex.split(options.slurm)
        except ValueError as error:
            raise InputError(f"--slurm={options.slurm}: {str(error).lower()}") from error
        return submit([*words, "--go", options.id, "--scale", options.scale, *seeds])
    if options.command == "run" and options.id == ALL:
        return run_all(chosen, options.scale, options.seeds)
    if options.command == "commands":
        print("\n".join(commands(options.id, runs_of(chosen, options.scale, options.seeds), options.number)))
        return 0
    exhibit = exhibits[options.id]
    if options.command == "show":
        scales = {options.scale: exhibit.scale(options.scale)} if options.scale else exhibit.scales
        print("\n".join(show(exhibit, scales)))
        return 0
    return run(exhibit, exhibit.scale(options.scale), options.seeds)


def _check(options: argparse.Namespace, exhibits: Mapping[str, Exhibit]) -> None:
    seeds = getattr(options, "seeds", None)
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds}: give a number of seeds, 1 or more")
    scales = exhibits[options.id].scales if options.id != ALL else dict.fromkeys(
        name for exhibit in exhibits.values() for name in exhibit.scales)
    if options.scale is not None and options.scale not in scales:
        raise InputError(f"--scale {options.scale}: {options.id} has no such scale; it has {', '.join(scales)}")


if __name__ == "__main__":
    run_command(main)

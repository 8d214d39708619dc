"""python -m common.paper list | show ID | run ID --scale demo | commands ID --scale demo: the paper's tables and
figures, arm by arm.

`run` trains the arms one after another, and each after the arms whose runs it uses; samples of generative models are
then judged by `test`. The same command goes on where it stopped: finished arms are skipped, since their run folders say
so. At the end it compares them, in runs/paper/ID-SCALE/.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from common.command import run_command
from common.errors import InputError
from common.paper.exhibits import Exhibit, read_exhibits
from common.paper.listing import commands, list_exhibits, show
from common.paper.running import run, run_all

ALL = "all"


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
    if options.id == ALL and options.command == "run":
        _check_seeds(options.seeds)
        _check_scale(options.scale, exhibits)
        return run_all(exhibits.values(), options.scale, options.seeds)
    if options.id not in exhibits:
        raise InputError(f"{options.id}: no such table or figure; there is {', '.join(exhibits)}")
    exhibit = exhibits[options.id]
    if options.command == "show":
        scales = {options.scale: exhibit.scale(options.scale)} if options.scale else exhibit.scales
        print("\n".join(show(exhibit, scales)))
        return 0
    _check_seeds(options.seeds)
    if options.command == "commands":
        print("\n".join(commands(exhibit, exhibit.scale(options.scale), options.seeds, options.number)))
        return 0
    return run(exhibit, exhibit.scale(options.scale), options.seeds)


def _check_seeds(seeds: int | None) -> None:
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds}: give a number of seeds, 1 or more")


def _check_scale(scale: str, exhibits: Mapping[str, Exhibit]) -> None:
    known = dict.fromkeys(name for exhibit in exhibits.values() for name in exhibit.scales)
    if scale not in known:
        raise InputError(f"--scale {scale}: no such scale; there is {', '.join(known)}")


if __name__ == "__main__":
    run_command(main)

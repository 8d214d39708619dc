"""python -m common.submit STUDY fit --config FILE ... | ID --scale SCALE: a job of Slurm, printed; with --go submitted.

A study's command becomes one job (common/slurm/train.sbatch), a table or figure of the paper an array of one task a run
(common/slurm/arms.sbatch): runs that start from others' weights are a second array that waits for the first, and what
is finished is left out. Whatever is not named here is passed on: to the study, or to `python -m common.paper commands`.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from common.advice import quieten
from common.command import Parser, run_command
from common.errors import InputError
from common.paper.exhibits import STUDIES, Start, read_exhibits, runs_of
from common.paper.state import state

SCRIPTS = Path("common/slurm")


def resources(options: argparse.Namespace) -> list[str]:
    """What sbatch is asked for: a task for each GPU, or one a node where there are none."""
    words = ["--nodes", str(options.nodes), "--ntasks-per-node", str(max(options.gpus, 1))]
    if options.gpus:
        words += ["--gpus-per-node", str(options.gpus)]
    words += ["--cpus-per-task", str(options.cpus)] + ["--time", options.time] * (options.time is not None)
    try:
        return [*words, *shlex.split(options.sbatch)]
    except ValueError as error:
        raise InputError(f"--sbatch {options.sbatch}: {str(error).lower()}") from error


def training(study: str, words: list[str], options: argparse.Namespace) -> Iterator[tuple[list[str], str]]:
    """The one job of a study's command, checked before it waits in a queue: sbatch's words, and what they are for."""
    from common.training.cli import StudyCLI  # Lightning takes seconds

    quieten()
    if not words:
        raise InputError(f"{study}: name what to do, as in `python -m common.submit {study} fit --config ...`")
    folder = StudyCLI(study, words, run=False).folder
    yield ["sbatch", *resources(options), str(SCRIPTS / "train.sbatch"), study, *words], f"run folder: {folder}"


def arrays(id: str, words: list[str], options: argparse.Namespace) -> Iterator[tuple[list[str], str]]:
    """An array of the runs that start from nothing, one of those that start from them, and so on."""
    exhibits = read_exhibits()
    if id not in (*exhibits, "all"):
        raise InputError(f"{id}: neither a study ({', '.join(STUDIES)}) nor a table or figure ({', '.join(exhibits)})")
    parser = Parser("python -m common.submit")
    parser.add_argument("--scale", required=True)
    parser.add_argument("--seeds", type=int)
    chosen = parser.parse_args(words)
    if chosen.seeds is not None and chosen.seeds < 1:
        raise InputError(f"--seeds {chosen.seeds}: give a number of seeds, 1 or more")
    if id != "all":
        exhibits[id].scale(chosen.scale)  # which it must have
    elif not any(chosen.scale in exhibit.scales for exhibit in exhibits.values()):
        raise InputError(f"--scale {chosen.scale}: no table or figure has such a scale")
    starts = runs_of(exhibits.values() if id == "all" else [exhibits[id]], chosen.scale, chosen.seeds)
    levels: dict[int, list[int]] = {}
    folders: set[Path] = set()
    for number, start in enumerate(starts):
        folder = start.located[0]
        if folder not in folders and state(start) != "finished":  # two arms may be one run by other words
            folders.add(folder)
            levels.setdefault(_level(start), []).append(number)
    if not levels:
        print(f"{id}, {chosen.scale}: all {len(starts)} runs are finished")
    for position, (_, numbers) in enumerate(sorted(levels.items())):
        after = ["--dependency", "afterok:JOB"] if position else []
        names = "; ".join(f"{number}: {starts[number].arm.name}, seed {starts[number].seed}" for number in numbers)
        yield ["sbatch", "--array", ",".join(map(str, numbers)), *after, *resources(options),
               str(SCRIPTS / "arms.sbatch"), id, *words], names  # fmt: skip


def _level(start: Start) -> int:
    return 1 + max((_level(source) for source in start.sources.values()), default=-1)


def submit(jobs: Iterator[tuple[list[str], str]], go: bool) -> None:
    """Prints each job's command, and what it is for; submits it where `go` says so, after the one before it."""
    if go and shutil.which("sbatch") is None:
        raise InputError("--go: sbatch is not found; without --go the commands are printed, to be submitted elsewhere")
    job = "JOB"
    for words, purpose in jobs:
        words = [word.replace("afterok:JOB", f"afterok:{job}") for word in words]
        print(f"# {purpose}\n{shlex.join(words)}", flush=True)
        if go:
            outcome = subprocess.run([*words[:1], "--parsable", *words[1:]], capture_output=True, text=True)
            if outcome.returncode:
                raise InputError(f"sbatch: {outcome.stderr.strip()}")
            job = outcome.stdout.strip().split(";")[0]  # behind it the cluster's name, where there are several
            print(f"job {job}", flush=True)


def main(arguments: list[str]) -> int:
    parser = Parser("python -m common.submit", __doc__)
    parser.add_argument("what", help="a study, followed by its command, or the id of a table or figure")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of a job (1)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a node, 0 for a job on CPUs (1)")
    parser.add_argument("--cpus", type=int, default=8, help="cores of a GPU's process; all but one load data (8)")
    parser.add_argument("--time", help="limit of a start, as sbatch takes it; the job is requeued until it is finished")
    parser.add_argument("--sbatch", default="", help="further options, as in --sbatch '--partition gpu --account me'")
    parser.add_argument("--go", action="store_true", help="submit, and do not only print")
    if "--sbatch" in arguments[:-1]:  # argparse takes its value for an option where that has a dash and no space
        at = arguments.index("--sbatch")
        arguments = [*arguments[:at], f"--sbatch={arguments[at + 1]}", *arguments[at + 2 :]]
    options, words = parser.parse_known_args(arguments)
    for name in ("nodes", "cpus"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.gpus < 0:
        raise InputError(f"--gpus {options.gpus}: give 0 or more")
    jobs = training if options.what in STUDIES else arrays
    submit(jobs(options.what, words, options), options.go)
    return 0


if __name__ == "__main__":
    run_command(main)

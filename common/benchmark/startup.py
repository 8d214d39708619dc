"""Seconds from pressing enter until a command has ended, beside what `import lightning` alone takes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from common.benchmark.interleaving import Spread, interleaved, ratios

FLOOR = "python -c 'import lightning'"
# With the exit code of each; that of a mistake is 2.
COMMANDS = {
    FLOOR: 0,
    "python -m supervised --help": 0,
    "python -m supervised fit --config supervised/configs/digits.yaml --model.size gigantic": 2,
    "python -m common.compare --help": 0,
    "python -m common.paper list": 0,
}
ROOT = Path(__file__).parent.parent.parent
COLUMNS = ("command", "seconds (quartiles)", "times import lightning (quartiles)")


def seconds(command: str) -> float:
    """Of one run, by this Python, from the repository's root."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    taken = time.perf_counter() - start
    assert done.returncode == COMMANDS[command], f"{command}: {done.stderr}"
    return taken


def measure(rounds: int) -> list[tuple[str, ...]]:
    """The rows of the table."""
    for command in COMMANDS:
        seconds(command)  # its files are in memory
    times = interleaved({command: partial(seconds, command) for command in COMMANDS}, rounds)
    return [(command, f"{Spread.of(taken):.2f}", "" if command == FLOOR else f"{ratios(times[FLOOR], taken):.2f}")
            for command, taken in times.items()]

"""What tests do to a training in a process of its own, and how they judge what it leaves."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forked import Command


def until(process: Command, event: Callable[[], object], seconds: float = 120) -> None:
    """Waits for an event in the life of a process."""
    deadline = time.monotonic() + seconds
    while not event():
        assert process.poll() is None, f"over before it: {process.stdout}{process.stderr}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)  # a checkpoint is written in some milliseconds


def freeze(process: Command) -> None:
    """Stops a process, and waits until each of its threads has: one may be in the middle of a rename."""

    def frozen() -> bool:
        try:
            states = [(thread / "stat").read_text().rpartition(") ")[2][0] for thread in threads.iterdir()]
        except FileNotFoundError:  # one that ended meanwhile
            return False
        return set(states) == {"T"}

    threads = Path(f"/proc/{process.pid}/task")
    os.kill(process.pid, signal.SIGSTOP)
    until(process, frozen)


def written(path: Path) -> int:
    """When a file was written; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Weights, their average and the optimiser's state of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    states = {f"{k}.{name}": v for k, s in checkpoint["optimizer_states"][0]["state"].items() for name, v in s.items()}
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}, **states}


def assert_identical(one: Path, other: Path) -> None:
    """The last checkpoints of two folders of checkpoints and the ones before, which were written in mid-epoch."""
    for name in ("last.ckpt", "previous.ckpt"):
        ours, theirs = tensors(one / name), tensors(other / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not different, (name, different)


def leftovers(folder: Path) -> list[Path]:
    """What no command may leave behind, however it ended."""
    return [*folder.rglob("*.tmp"), *folder.rglob("lock*")]

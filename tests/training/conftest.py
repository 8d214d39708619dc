"""Trainings that are disturbed: from outside, in processes of their own, and from within, at a chosen step."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import SMALL
from tensorboard.summary.writer import event_file_writer

from supervised import Classification

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts of one second in one process have names that end in a count, which are read as text: .10 before .9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100_000))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `python -m supervised SUBCOMMAND --config CONFIG ARGS`, as `command`, in a session of its own."""
    started: list[subprocess.Popen] = []

    def run(
        subcommand: str, *args: object, front: list[str] | None = None, variables: dict[str, str] | None = None,
        **options: Any
    ) -> subprocess.Popen:
        config = ROOT / "supervised" / "configs" / "digits.yaml"
        words = [*(front or [sys.executable, "-m", "supervised"]), subcommand, "--config", config, *SMALL, *args]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
        process = subprocess.Popen([str(word) for word in words], cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options)
        started.append(process)
        return process

    yield run
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., None]], None]:
    """Has `act(module, *arguments of the hook)` done in a hook of the module, without a trace in the config."""

    def do(hook: str, act: Callable[..., None]) -> None:
        monkeypatch.setattr(Classification, hook, act, raising=False)

    return do

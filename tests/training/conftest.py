"""Trainings that are disturbed: from outside, in processes of their own, and from within, at a chosen step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import ROOT, Command
from small import SMALL
from tensorboard.summary.writer import event_file_writer

from supervised import Classification


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts of one second in one process have names that end in a count, which are read as text: .10 before .9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100_000))


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Command]:
    """Starts `python -m supervised SUBCOMMAND --config CONFIG ARGS`, as `command`."""

    def run(subcommand: str, *args: object, module: str = "supervised", **options: Any) -> Command:
        config = ROOT / "supervised" / "configs" / "digits.yaml"
        return Command(module, subcommand, "--config", config, *SMALL, *args, cwd=tmp_path, **options)

    return run


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., None]], None]:
    """Has `act(module, *arguments of the hook)` done in a hook of the module, without a trace in the config."""

    def do(hook: str, act: Callable[..., None]) -> None:
        monkeypatch.setattr(Classification, hook, act, raising=False)

    return do

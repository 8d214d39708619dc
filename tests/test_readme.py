"""The README's worked example does what it says: one file and one YAML are an ablation; its other commands parse."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from common import submit
from common.command import Parser
from common.paper.exhibits import STUDIES, read_exhibits
from common.training.cli import StudyCLI

ROOT = Path(__file__).parent.parent


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)


def test_the_example_of_an_ablation_runs(tmp_path: Path) -> None:
    for name in ("supervised", "common"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "missing_pixels.py").write_text(block("python"))
    (tmp_path / "missing_pixels.yaml").write_text(block("yaml"))
    command = [sys.executable, "-m", "supervised", "fit", "--config", "missing_pixels.yaml", "--model.missing", "0.75",
               "--model.patch_size", "2", "--trainer.max_epochs", "1", "--model.optim.warmup_epochs", "0"]  # fmt: skip
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "runs" / "supervised").iterdir()
    assert folder.name.startswith("missing_pixels-nano-p2-s0-")
    assert "missing: 0.75" in (folder / "config.yaml").read_text()


def test_the_configs_it_names_exist() -> None:
    named = set(re.findall(r"\w+/configs/\w+\.yaml", (ROOT / "README.md").read_text()))
    assert {name.partition("/")[0] for name in named} == {"supervised", "mae", "diffusion", "locality_ablation"}
    assert all((ROOT / name).is_file() for name in named)


def test_the_commands_of_the_studies_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(rf"python -m ({'|'.join(STUDIES)}) +(\w+ +--config \w+/configs/[^`#\n]+)", text)
    assert {study for study, _ in commands} == set(STUDIES)
    for study, command in commands:
        if "--help" not in command:
            StudyCLI(study, shlex.split(command), run=False)


class Accepted(Exception):
    """A command's own parser has taken its words: the options, and what it passes on to another one."""


def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_and_stop(parser: Parser, words: list[str], *more: Any) -> Any:
        parsed = parse(parser, words, *more)
        if more:  # argparse's own call, for a command's command or within parse_args: it names a namespace too
            return parsed
        raise Accepted(*(parsed if isinstance(parsed, tuple) else (parsed, [])))

    return parse_and_stop


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Namespace, list[str]]]:
    """Calls a function, which goes no further than to parse a command line; its options, and the words passed on."""
    monkeypatch.chdir(ROOT)
    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(Parser, name, stopping(getattr(Parser, name)))

    def call(function: Callable[..., Any], *arguments: Any) -> tuple[Namespace, list[str]]:
        with pytest.raises(Accepted) as caught:
            function(*arguments)
        return caught.value.args

    return call


def commands_beside_the_studies() -> list[str]:
    """What follows `python -m` where that is a module of a package; `...` alone is left out there, and here.

    Names in capitals that a user replaces, such as RUN_FOLDER, are words like any other: parsers read no file.
    """
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = [command.strip() for command in re.findall(r"python -m (\w+\.[^`#\n]+)", text)]
    return [command for command in dict.fromkeys(found) if command.split()[1:] != ["..."]]


@pytest.mark.parametrize("command", commands_beside_the_studies())
def test_a_command_beside_the_studies_parses(command: str, accepted: Callable[..., tuple]) -> None:
    module, *words = shlex.split(command)
    package = find_spec(module).submodule_search_locations
    options, passed_on = accepted(importlib.import_module(f"{module}.__main__" if package else module).main, words)
    match module:
        case "common.paper":
            if "id" in options:
                assert_has_scale(options.id, options.scale)
            if getattr(options, "slurm", None):
                assert accepted(submit.main, [*shlex.split(options.slurm), options.id])[1] == []
        case "common.submit" if options.what in STUDIES:
            StudyCLI(options.what, passed_on, run=False)
        case "common.submit":
            chosen, _ = accepted(next, submit.arrays(options.what, passed_on, options))
            assert_has_scale(options.what, chosen.scale)
        case _:
            passed_on += words[words.index("--") + 1 :] if "--" in words else []
            configs = getattr(options, "config", [])
            for config in [configs] if isinstance(configs, str) else configs:
                StudyCLI(Path(config).parts[0], ["fit", "--config", config, *passed_on], run=False)
            assert configs or not passed_on


def assert_has_scale(id: str, scale: str | None) -> None:
    assert id == "all" or scale in (None, *read_exhibits()[id].scales)

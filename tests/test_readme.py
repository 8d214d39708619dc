"""The README's worked example does what it says: one file and one YAML are an ablation."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_its_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    studies = ("supervised", "mae", "diffusion", "locality_ablation")
    commands = re.findall(rf"python -m ({'|'.join(studies)}) +(\w+ +--config \w+/configs/[^`#\n]+)", text)
    assert {study for study, _ in commands} == set(studies)
    for study, command in commands:
        if "--help" not in command:
            StudyCLI(study, shlex.split(command), run=False)

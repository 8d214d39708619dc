"""`make gpu`, as far as it goes without a GPU: it leaves out no config of the paper, and goes on after a failure."""

import shlex
import subprocess
from types import SimpleNamespace

import pytest
import torch

from common.benchmark import gpu, step
from common.benchmark.__main__ import main
from common.data import Cifar10
from common.errors import InputError
from common.paper.exhibits import read_exhibits
from common.training.cli import StudyCLI


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Exit codes of parts that fail, by the first words after `python -m`; nothing is run."""
    codes: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Cifar10, "read", lambda *_: None)
    monkeypatch.setattr(subprocess, "run", lambda words: SimpleNamespace(
        returncode=next((code for start, code in codes.items() if " ".join(words[2:]).startswith(start)), 0)))
    return codes


def test_every_config_of_the_paper_takes_a_step() -> None:
    measured = {config for steps in gpu.STEPS for config in steps.configs}
    starts = (start for exhibit in read_exhibits().values() if "paper" in exhibit.scales
              for start in exhibit.scale("paper").starts(1))  # fmt: skip
    trained = {f"{start.arm.study}/{start.arm.config.stem}" for start in starts}
    assert trained <= measured and "diffusion/autoencoder_imagenet256" in measured


def test_the_trainings_that_are_measured_parse() -> None:
    for words in gpu.commands().values():
        if words[:2] == ["common.benchmark", "step"]:
            end = words.index("--")
            for config in words[words.index("--config") + 1 : end]:
                StudyCLI(config.split("/")[0], ["fit", "--config", config, *words[end + 1 :]], run=False)
        elif words[1] == "fit":
            StudyCLI(words[0], words[1:], run=False)


def test_the_discriminator_plays_in_the_step_of_an_autoencoder() -> None:
    """Its FLOPs are counted; here in the demo's autoencoder, which otherwise begins without it."""
    [steps] = [steps for steps in gpu.STEPS if "diffusion/autoencoder_imagenet256" in steps.configs]
    played = []
    for options in (shlex.split(steps.options), []):
        module, data = step.experiment("diffusion/configs/autoencoder_digits.yaml", options, 2, compiled=False)
        played.append({"discriminator", "adversarial"} & module.training_step(data.random_batch(2), 0).keys())
    assert played == [{"discriminator", "adversarial"}, set()]


def test_a_part_that_fails_leaves_the_others_alone(outcomes: dict[str, int], capsys: pytest.CaptureFixture) -> None:
    assert main(["gpu"]) == 0
    assert "failed" not in capsys.readouterr().out
    outcomes.update({"pytest": 1, "common.benchmark peers": 2})
    assert main(["gpu"]) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")]  # fmt: skip
    assert [row[0] for row in rows[2:]] == list(gpu.commands())
    assert {row[0]: row[2] for row in rows[2:] if row[2] != "done"} == {"tests": "failed, 1", "peers": "failed, 2"}


def test_what_is_missing_is_told_first(outcomes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="gpu: there is no GPU that torch can use"):
        main(["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="data: holds no cifar10; lay it out as one of cifar-10-binary.tar.gz"):
        main(["gpu"])

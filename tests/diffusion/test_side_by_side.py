"""python -m diffusion.side_by_side: samples of several runs below each other."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.command import run_command
from diffusion.dit import DiT
from diffusion.side_by_side import main

DIGITS = Path(__file__).parents[2] / "diffusion" / "configs" / "digits.yaml"
FEW = ["--samples", "3", "--model.predict.steps", "2", "--model.predict.guidance", "4", "--model.predict.seed", "7"]


@pytest.fixture
def fit(command: Callable) -> Callable:
    """Trains a small net on the pixels of digits for an epoch."""
    pixels = ["--data.autoencoder", "null", "--data.image_size", "8", "--model.picture_epochs", "0",
              "--trainer.max_epochs", "1"]  # fmt: skip

    def run(name: str, *options: str) -> str:
        outcome = command("fit", *pixels, "--run_name", name, *options, config=DIGITS, study="diffusion")
        assert outcome.code == 0, outcome.err
        return f"runs/diffusion/{name}"

    return run


def error(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setattr("sys.argv", ["side_by_side", *arguments])
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == 2
    return capsys.readouterr().err


def test_rows_are_the_runs_samples_of_the_same_classes(fit: Callable, monkeypatch, capsys) -> None:
    runs = [fit("a"), fit("b", "--model.patch_size", "2")]
    drawn = {}
    monkeypatch.setattr("diffusion.pictures.grid", lambda *arguments: drawn.update(arguments=arguments) or Figure())

    class Figure:
        def savefig(self, path: Path) -> None:
            path.write_bytes(b"")

    noise, forward = {}, DiT.forward

    def watched(net: DiT, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        noise.setdefault(net.patch_size, x.clone())
        return forward(net, x, *more)

    monkeypatch.setattr(DiT, "forward", watched)
    assert main([*runs, "--figure", "new/figure.png", *FEW]) == 0
    one, other = noise.values()
    assert one.equal(other) and one.std() > 0.5
    assert Path("new/figure.png").exists()
    images, names, title, columns, rows = drawn["arguments"]
    assert rows == ["a", "b"] and columns == 3 and len(names) == 3 and "guidance 4" in title
    folders = [Path(run) / "samples" / "step9-ddim2-g4-s7" for run in runs]
    for row, folder in zip(images.split(3), folders, strict=True):
        there = np.stack([np.array(Image.open(folder / f"{number:06d}.png")) for number in range(3)])
        np.testing.assert_array_equal(row[:, 0], there)
    labels, others = (json.loads((folder / "record.json").read_text())["labels"] for folder in folders)
    assert labels == others and len(set(labels)) > 1


def test_what_cannot_stand_side_by_side_is_refused(fit: Callable, monkeypatch, capsys) -> None:
    a, small = fit("a"), fit("small", "--data.image_size", "4")
    figure = ["--figure", "f.png", *FEW]
    said = error([a, small, *figure], monkeypatch, capsys)
    assert "runs/diffusion/small: generates latents of 4x4x1 for images of 4x4x1, and runs/diffusion/a of 8x8x1" in said
    assert not Path(a, "samples").exists()  # nothing was sampled for it
    said = error(["nowhere", *figure], monkeypatch, capsys)
    assert "nowhere: not the run folder of a trained model that generates images" in said
    assert "name a file that ends in .png" in error([a, "--figure", "f.jpg"], monkeypatch, capsys)


def test_the_figure_is_drawn(fit: Callable) -> None:
    assert main([fit("a"), "--figure", "f.png", *FEW]) == 0
    assert min(Image.open("f.png").size) > 100

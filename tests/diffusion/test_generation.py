"""Training a diffusion Transformer and sampling from it, as a user sees it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.randomness import normal, uniform
from common.training.checkpoints import read
from common.training.optim import Recipe
from diffusion import DiT, Generation

DIGITS = Path(__file__).parents[2] / "diffusion" / "configs" / "digits.yaml"


@pytest.fixture
def generation(command: Callable) -> Callable:
    """Runs `python -m diffusion SUBCOMMAND` on digits with a small net, without pictures."""
    return lambda word, *args: command(word, "--model.picture_epochs", "0", "--model.optim.ema", "0.5", "--run_name",
                                       "a", *args, config=DIGITS, study="diffusion")  # fmt: skip


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "runs/diffusion/a/results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read(folder / "checkpoints" / "last.ckpt")
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}}


def test_micro_batches_are_the_whole_batch(generation: Callable, tmp_path: Path) -> None:
    for size in ("128", "32"):
        outcome = generation("fit", "--run_name", size, "--data.batch_per_device", size)
        assert outcome.code == 0, outcome.err
    whole, micro = (weights(tmp_path / "runs/diffusion" / size) for size in ("128", "32"))
    for name, value in whole.items():
        torch.testing.assert_close(micro[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_the_life_of_a_generation(generation: Callable, tmp_path: Path) -> None:
    assert "train: 1197 images" in generation("check").out
    outcome = generation("fit")
    assert outcome.code == 0, outcome.err
    assert "forwards" in outcome.out
    trained = results(tmp_path)
    assert trained["status"] == "finished" and trained["headline"] == "val/loss"
    names = {"loss", "mse", "mse_q1", "mse_q2", "mse_q3", "mse_q4"}
    assert names == {tag.split("/")[1] for tag in trained["metrics"] if tag.startswith("val/")}
    quarters = [trained["metrics"][f"val/mse_q{quarter}"] for quarter in range(1, 5)]
    assert trained["metrics"]["val/mse"] == pytest.approx(sum(quarters) / 4)  # 300 images, 75 in each
    assert generation("validate").code == 0
    assert results(tmp_path) == trained

    options = ["--model.predict.samples", "5", "--model.predict.steps", "4"]
    folder = tmp_path / "runs/diffusion/a/samples/ddpm4-g1.5-s0"
    assert "5 of 5 samples" in generation("predict", *options).out
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"00000{number}.png" for number in range(5)]
    pictures = [np.array(Image.open(path)).astype(int) for path in files]
    assert pictures[0].shape == (8, 8)
    files[1].unlink()
    files[3].unlink()
    others = files[0].stat().st_mtime_ns
    assert generation("predict", *options, "--data.eval_batch_size", "1").code == 0
    again = [np.array(Image.open(path)).astype(int) for path in files]
    assert all(abs(one - other).max() <= 1 for one, other in zip(pictures, again, strict=True))
    assert files[0].stat().st_mtime_ns == others  # what is there is not generated again

    outcome = generation("predict", *options, "--model.predict.classes", "[3,10]")
    assert outcome.code == 2 and "model.predict.classes: [3, 10]" in outcome.err
    outcome = generation("predict", "--model.predict.samples", "0")
    assert outcome.code == 2 and "model.predict.samples: 0" in outcome.err


def test_pictures_are_drawn_from_the_average(generation: Callable, tmp_path: Path) -> None:
    outcome = generation("fit", "--model.picture_epochs", "1", "--model.picture_steps", "2",
                         "--trainer.max_epochs", "1")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert Image.open(tmp_path / "runs/diffusion/a/figures/samples.png").size[0] > 400


def test_without_classes(generation: Callable, tmp_path: Path) -> None:
    options = ["--model.conditional", "false", "--trainer.max_epochs", "1"]
    assert generation("fit", *options, "--model.picture_epochs", "1", "--model.picture_steps", "2").code == 0
    assert not [name for name in weights(tmp_path / "runs/diffusion/a") if "y_embedder" in name]
    more = ["--model.predict.samples", "2", "--model.predict.steps", "2", "--model.predict.solver", "ddim",
            "--model.picture_epochs", "1", "--model.picture_steps", "2"]  # fmt: skip
    outcome = generation("predict", *options, *more)
    assert outcome.code == 0, outcome.err


def test_validation_uses_fixed_noise_and_steps() -> None:
    """Against plain loops, for a net that answers with its input."""
    module = Generation(Recipe(lr=0.1))
    seen = []

    class Echo(torch.nn.Module):
        classes = 0

        def forward(self, x, t, y, drops):
            seen.append((x, t))
            return torch.cat([x, torch.zeros_like(x)], dim=1)

    images, index = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 3, 7, 100])
    scores = module.metrics(None)
    module.evaluate(Echo(), {"image": images, "index": index, "label": index}, scores)
    values = scores.compute()
    [(x, t)] = seen
    errors = []
    for row, i in enumerate(index.tolist()):
        step = int(250 * (i % 4) + 250 * uniform("evaluation timestep", i, n=1))
        assert int(t[row]) == step
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step]
        noise = normal("evaluation noise", i, n=16).view(1, 4, 4)
        noisy = kept.sqrt().float() * images[row] + (1 - kept).sqrt().float() * noise
        torch.testing.assert_close(x[row], noisy, atol=1e-5, rtol=1e-5)
        errors.append((noisy - noise).square().mean())
    assert values["mse"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert values["mse_q1"].item() == pytest.approx(((errors[0] + errors[5]) / 2).item(), rel=1e-5)
    assert values["mse_q4"].item() == pytest.approx(((errors[3] + errors[4]) / 2).item(), rel=1e-5)


def test_it_learns_to_tell_noise_from_points(generation: Callable, tmp_path: Path) -> None:
    """The error of predicting no noise at all is 1."""
    outcome = generation("fit", "--model.patch_size", "2", "--trainer.max_epochs", "8", "--model.optim.lr", "5e-3")
    assert outcome.code == 0, outcome.err
    assert results(tmp_path)["metrics"]["val_raw/mse"] < 0.6


def test_the_net_s_names_are_those_of_dit(generation: Callable, tmp_path: Path) -> None:
    assert generation("fit", "--trainer.max_epochs", "1").code == 0
    saved = read(tmp_path / "runs/diffusion/a/checkpoints/last.ckpt")["state_dict"]
    net = DiT(8, patch_size=4, channels=1, classes=10, width=16, depth=1, heads=2)
    assert {name.removeprefix("net.") for name in saved} == net.state_dict().keys()

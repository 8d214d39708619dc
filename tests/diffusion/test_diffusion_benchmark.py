"""That both sides do the same work, and that the tables hold what their columns say. Nothing here is timed."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from common.data import Augment
from common.errors import InputError
from common.randomness import permutation, seeded
from common.training.checkpoints import Checkpoints
from common.training.curves import Curves
from common.training.ema import EMA
from common.training.progress import Progress
from common.training.run import RunFolder
from diffusion import benchmark, generation
from diffusion.autoencoder import Autoencoder
from diffusion.benchmark import LATENTS_COLUMNS, SAMPLING_COLUMNS, STEP_COLUMNS, TimedGeneration, main
from diffusion.dit import DiT
from diffusion.latent_set import LatentSet
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler

STEPS = 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 8)


@pytest.fixture
def fake_seconds(monkeypatch: pytest.MonkeyPatch):
    """Lets the sides take the given seconds of each round, in the order in which they are named."""

    def fake(*seconds: list[float]) -> None:
        monkeypatch.setattr(benchmark, "interleaved", lambda sides, rounds: dict(zip(sides, seconds, strict=True)))

    return fake


# The training step


def test_the_trainer_is_that_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cli = benchmark.trained(2, STEPS)
    assert not list(tmp_path.iterdir()), "the run folder was left behind"
    trainer = cli.trainer
    assert trainer.global_step == STEPS and cli.model.seconds > 0 and trainer.precision == "bf16-mixed"
    for callback in (Curves, Progress, RunFolder, Checkpoints, EMA):
        assert any(isinstance(one, callback) for one in trainer.callbacks), callback
    assert trainer.logger is not None and cli.model.average is not None
    assert (cli.model.net.tokens, cli.model.net.channels, cli.model.net.classes) == (16, 4, 10)


def test_the_plain_loop_takes_the_trainers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draws of one side given to both, both end at the same weights after the same work."""
    shape = benchmark.BATCH, 4, 8, 8
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    dropped = torch.linspace(0.02, 0.98, benchmark.BATCH)  # one label is
    lerps, optimizers = [], []
    lerp = torch._foreach_lerp_

    def counted_lerp(average, weights, share):
        lerps.append(share)
        return lerp(average, weights, share)

    def remembered(*args, **options):
        optimizers.append(AdamW(*args, **options))
        return optimizers[-1]

    monkeypatch.setattr(torch, "_foreach_lerp_", counted_lerp)
    with monkeypatch.context() as suite:
        suite.setattr(generation, "normal", lambda *_, n: noise.view(-1, n))
        suite.setattr(TimedGeneration, "draws", lambda *_: dropped[:, None])
        with FlopCounterMode(display=False) as flops_of_trainer:
            cli = benchmark.trained(2, STEPS)
    assert lerps == pytest.approx([0.01] * (STEPS - 1))  # the first update copies

    lerps.clear()
    with monkeypatch.context() as plain, seeded("init", 0), FlopCounterMode(display=False) as flops_of_loop:
        plain.setattr(torch, "randn_like", lambda x: noise)
        plain.setattr(torch, "rand", lambda _: dropped)
        plain.setattr(torch, "randint", lambda most, _: (dropped * most).long())
        plain.setattr(torch, "randperm", lambda n: permutation("order", 0, 0, n=n))
        plain.setattr(benchmark, "AdamW", remembered)
        assert benchmark.plain_loop(cli.model, cli.datamodule) > 0
    assert lerps == pytest.approx([0.01] * STEPS)

    assert flops_of_trainer.get_total_flops() == flops_of_loop.get_total_flops() > 0
    [optimizer], [theirs] = optimizers, cli.trainer.optimizers
    for option in ("lr", "betas", "weight_decay", "fused"):
        assert {group[option] for group in theirs.param_groups} == {optimizer.defaults[option]}, option
    assert optimizer.defaults["fused"]
    for own, other in zip(optimizer.param_groups[0]["params"], cli.model.net.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_the_plain_loop_is_under_bf16_and_timed_after_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cli = benchmark.trained(2, STEPS)
    seen, build = [], cli.model.build

    def watched(data):
        net = build(data)
        net.blocks[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        return net

    monkeypatch.setattr(cli.model, "build", watched)
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0 * len(seen))  # a forward takes 5 s, and nothing else does
    assert benchmark.plain_loop(cli.model, cli.datamodule) == 5.0
    assert seen == [torch.bfloat16] * STEPS


def test_row_of_the_step(fake_seconds) -> None:
    fake_seconds([0.1, 0.3, 0.4], [0.2, 0.3, 0.6])
    row = dict(zip(STEP_COLUMNS, benchmark.measure_step(2, 2, rounds=3), strict=True))
    assert (row["model"], row["latents"], row["batch"]) == ("nano/2", "8x8x4", "8")
    assert (row["plain loop ms"], row["Trainer ms"]) == ("300.0", "300.0")
    # Pairs 2, 1, 3/2; the ratio of the medians would be 1.
    assert row["Trainer / plain loop (quartiles)"] == "1.500 (1.250 to 1.750)"


# Reading latents


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_both_sides_read_the_same_latents(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = benchmark.latent_data(kind, tmp_path)
    assert isinstance(data["cached"].sets["train"], LatentSet)
    assert data["cached"].autoencoder.kind == kind and data["cached"].autoencoder.scale != 1
    encoded, augmented = [], []
    moments, augment = Autoencoder.moments, Augment.batch
    monkeypatch.setattr(Autoencoder, "moments", lambda net, images: encoded.append(len(images)) or moments(net, images))
    monkeypatch.setattr(Augment, "batch", lambda *given: augmented.append(len(given[1])) or augment(*given))
    cached = list(benchmark.batches(data["cached"]))
    assert not encoded and not augmented
    fresh = list(benchmark.batches(data["encoded"]))
    assert encoded == augmented == [128] * 9 == [len(batch["image"]) for batch in fresh]
    for one, other in zip(cached, fresh, strict=True):
        assert one.keys() == other.keys() and one["image"].shape[2:] == (8, 8)
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, atol=1e-4, rtol=1e-4)
    assert benchmark.images_read(data["cached"]) == 9 * 128


def test_row_of_the_latents(fake_seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_seconds([4.0, 8.0, 6.0], [1.0, 1.0, 2.0])
    data = SimpleNamespace(input_size=(8, 4), input_channels=3)
    monkeypatch.setattr(benchmark, "latent_data", lambda kind, folder: dict.fromkeys(("encoded", "cached"), data))
    monkeypatch.setattr(benchmark, "images_read", lambda data: 1200)
    row = dict(zip(LATENTS_COLUMNS, benchmark.measure_latents("kl", rounds=3), strict=True))
    assert (row["autoencoder"], row["latents"]) == ("kl", "8x4x3")
    assert (row["encoded images/s"], row["cached images/s"]) == ("200", "1,200")
    assert row["times as fast (quartiles)"] == "4.0 (3.5 to 6.0)"


# Sampling


def test_both_sides_draw_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SAMPLED_AT_ONCE", 3)
    torch.manual_seed(1)
    net = DiT(4, patch_size=2, channels=4, classes=3, width=16, depth=2, heads=2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sampler = Sampler(GaussianDiffusion(), "ddim", 6, guidance=1.5, guidance_channels=4)
    forwards = []
    net.register_forward_pre_hook(lambda _, arguments: forwards.append(len(arguments[0])))
    numbers = torch.arange(7)
    together = benchmark.in_batches(net, sampler, numbers, numbers % 3)
    assert forwards == [6] * 6 + [6] * 6 + [2] * 6  # both predictions of three, three and one sample
    forwards.clear()
    alone = benchmark.one_by_one(net, sampler, numbers, numbers % 3)
    assert forwards == [1] * (7 * 6 * 2)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    free = Sampler(GaussianDiffusion(), "ddim", 6)(net, numbers, numbers % 3)
    assert (free - together).abs().max() > 0.01  # guidance is felt


def test_row_of_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def side(name: str):
        return lambda net, sampler, numbers, labels: calls.append(
            (name, net.tokens, sampler.solver, sampler.steps, sampler.guidance, len(numbers), labels.tolist()))

    for name in ("one_by_one", "in_batches"):
        monkeypatch.setattr(benchmark, name, side(name))
    seconds = {benchmark.one_by_one: [6.0, 8.0, 9.0], benchmark.in_batches: [2.0, 1.0, 4.0]}
    monkeypatch.setattr(benchmark, "interleaved", lambda sides, rounds: {name: seconds[name] for name in sides})
    row = benchmark.measure_sampling(2, samples=12, steps=5, rounds=3)
    assert calls == [(name, 16, "ddim", 5, 1.5, 12, [*range(10), 0, 1]) for name in ("one_by_one", "in_batches")]
    # Pairs 3, 8, 9/4; the ratio of the medians would be 4.
    assert row == ("nano/2", "1.5", "6.0", "3.00 (2.62 to 5.50)")


# The command


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_mode_reports_with_its_circumstances(capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    arguments = ["all", "--rounds", "1", "--steps", "2", "--samples", "2", "--solver_steps", "3"]
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    head = output.split("|")[0]
    assert f"`python -m diffusion.benchmark {' '.join(arguments)}`" in head and "medians over 1 rounds" in head
    assert "under bf16, 2 steps" in head and "2 samples of 8x8x4 in batches of 64, 3 steps of DDIM" in output
    rows = [cells(line) for line in output.splitlines() if line.startswith("|")]
    assert len(rows) == 12 and [rows[i] for i in (0, 4, 8)] == [
        list(columns) for columns in (STEP_COLUMNS, LATENTS_COLUMNS, SAMPLING_COLUMNS)
    ]
    assert [rows[i][0] for i in (2, 3, 6, 7, 10, 11)] == ["nano/1", "nano/2", "vq", "kl", "nano/1", "nano/2"]


@pytest.mark.parametrize("option, least", [("rounds", 1), ("threads", 1), ("steps", 2), ("samples", 1),
                                           ("solver_steps", 2)])  # fmt: skip
def test_numbers_that_make_no_sense(option: str, least: int) -> None:
    with pytest.raises(InputError, match=f"--{option} {least - 1}: give a whole number, {least} or more"):
        main(["sampling", f"--{option}", str(least - 1)])


def test_a_mistyped_option_leaves_with_2() -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["step", "--round", "2"])
    assert leaving.value.code == 2


def test_the_command_leaves_with_2_and_one_line() -> None:
    command = [sys.executable, "-m", "diffusion.benchmark", "step", "--rounds", "0"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert process.returncode == 2
    assert process.stderr == "error: --rounds 0: give a whole number, 1 or more\n"

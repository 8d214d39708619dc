"""The benchmark's arithmetic, that its sides do the same work, and that each mode runs. Nothing here is timed."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import run
from lightning.pytorch.loggers import TensorBoardLogger
from small import SMALL

from common.benchmark import __main__ as benchmark
from common.benchmark import (
    augmentation,
    building,
    interleaving,
    peers,
    pipelines,
    scaling,
    startup,
    step,
    trainer_cost,
)
from common.benchmark.__main__ import main
from common.benchmark.interleaving import Spread, differences, interleaved, ratios
from common.benchmark.peers import Case
from common.benchmark.report import Section, circumstances, table
from common.data.folders import ImageFolder
from common.data.store import make
from common.data.stored import Store
from common.errors import InputError
from common.randomness import seeded
from common.training.checkpoints import Checkpoints
from common.training.curves import Curves
from common.training.progress import Progress
from common.training.run import RunFolder
from supervised import Classification

CONFIG = str(Path(__file__).parents[1] / "supervised" / "configs" / "digits.yaml")


def small(patch_size: int, precision: str) -> Case:
    return Case("nano", 1, patch_size, side=4, channels=3, classes=5, batch=8, precision=precision)


def test_sides_take_turns_and_each_begins_as_often() -> None:
    calls = []

    def side(name: str):
        return lambda: calls.append(name) or float(len(calls))

    times = interleaved({"a": side("a"), "b": side("b")}, rounds=4)
    assert "".join(calls) == "abbaabba"
    assert times == {"a": [1, 4, 5, 8], "b": [2, 3, 6, 7]}


def test_ratios_and_differences_are_medians_over_pairs() -> None:
    times, reference = [1.0, 2.0, 9.0], [2.0, 6.0, 3.0]
    # Pairs 2, 3, 1/3; the ratio of the medians would be 1.5.
    assert ratios(times, reference) == pytest.approx((2.0, 7 / 6, 2.5))
    # Pairs -1, -4, 6; an unpaired difference would not have these quartiles.
    assert differences(times, reference) == (-1.0, -2.5, 2.5)
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0)
    assert f"{Spread(1.0, 0.5, 1.25):.2f}" == "1.00 (0.50 to 1.25)"
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_both_models_take_the_same_steps(patch_size: int, precision: str, tolerance: float) -> None:
    case = small(patch_size, precision)
    nets = peers.models(case)
    losses = {}
    for name, net in nets.items():
        step = peers.training_step(net, *peers.batch_of(case), precision)
        losses[name] = [step().item() for _ in range(5)]
    assert losses["ours"] == pytest.approx(losses["timm"], rel=tolerance)
    assert all(later < earlier for earlier, later in pairwise(losses["ours"]))
    weights = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert weights[0] == weights[1]


def test_bf16_is_autocast() -> None:
    images, labels = peers.batch_of(small(1, "bf16"))
    seen = set()
    for precision in ("fp32", "bf16"):
        net = peers.models(small(1, precision))["ours"]
        net.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        peers.training_step(net, images, labels, precision)()
    assert seen == {torch.float32, torch.bfloat16}


def test_a_timed_step_is_the_whole_step() -> None:
    assert interleaving.timed(lambda: time.sleep(0.02) or 0.0)() >= 0.02


def test_a_gpu_is_waited_for_once_around_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0.1 s each, which a GPU is given until 0.3 s are over; a CPU takes one."""
    now, did = [0.0], []

    def step() -> None:
        now[0] += 0.1
        did.append("step")

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("wait"))
    assert interleaving.timed(step, torch.device("cuda"))() == pytest.approx(0.1)
    assert did == ["wait", "step", "step", "step", "wait"]
    did.clear()
    assert interleaving.timed(step)() == pytest.approx(0.1) and did == ["step"]


def test_row_of_the_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ours": [0.1, 0.2, 0.4], "theirs": [0.4, 0.4, 0.4]}
    monkeypatch.setattr(interleaving, "interleaved", lambda sides, rounds: times)
    row = dict(zip(peers.COLUMNS, peers.measure(small(2, "fp32"), rounds=3), strict=True))
    assert row["model"] == "nano/2, 1 blocks" and row["image"] == "4x4x3"
    assert (row["ours ms"], row["timm ms"]) == ("200.0", "400.0")
    assert (row["ours images/s"], row["timm images/s"]) == ("40", "20")
    assert row["times as fast (quartiles)"] == "2.000 (1.500 to 3.000)"
    assert 0 < float(row["ours MB"]) <= float(row["timm MB"])


@pytest.mark.parametrize("bf16", [False, True])
def test_cases_are_those_of_the_acceptance(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_bf16", lambda: bf16)
    covered = {(case.size, case.side, case.patch_size, case.precisions) for case in peers.cases(depth=3)}
    fp32, numerics = ("fp32", "fp32"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
    cifar = {(size, 32, patch, precisions) for size in ("tiny", "small") for patch in (1, 2)
             for precisions in numerics[: 3 if bf16 else 1]}  # fmt: skip
    assert covered == {("nano", side, patch, fp32) for side in (8, 16) for patch in (1, 2)} | cifar
    assert len(peers.cases(depth=3)) == len(covered)
    assert {case.depth for case in peers.cases(depth=3) if case.side == 32} == {3}
    assert {case.batch for case in peers.cases(depth=3, batch=5)} == {5}


def test_ours_in_bf16_is_raced_against_timm_s_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_bf16", lambda: True)
    case = next(case for case in peers.cases(depth=1, batch=1) if case.against and case.patch_size == 2)
    seen, training_step = {}, peers.training_step

    def watched(net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str):
        dtypes = seen.setdefault((type(net).__module__.split(".")[0], precision), set())
        net.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
        return training_step(net, images, labels, precision)

    monkeypatch.setattr(peers, "training_step", watched)
    row = dict(zip(peers.COLUMNS, peers.measure(case, rounds=1), strict=True))
    assert seen == {("common", "bf16"): {torch.bfloat16}, ("timm", "fp32"): {torch.float32}}
    assert row["precision"] == "bf16 / fp32" and float(row["ours MB"]) < float(row["timm MB"])


def test_cases_of_a_gpu_are_the_paper_s_sizes_compiled() -> None:
    cases = peers.cases(None, device=torch.device("cuda"))
    assert [(case.size, case.depth, case.patch_size, case.side, case.precision) for case in cases] == [
        (size, 12, 1, 32, "bf16, compiled") for size in ("tiny", "small", "base")]


def test_what_is_compiled_computes_the_same_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that compiles nothing: ours block by block, timm's as a whole."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda net, backend="", **options: compile(net, backend="eager", **options))
    case = small(1, "bf16, compiled")
    nets, losses, seen = peers.models(case), [], set()
    assert [net._compiled_call_impl is not None for net in nets.values()] == [False, True]
    assert nets["ours"].blocks[0]._compiled_call_impl is not None
    for net in nets.values():
        net.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        losses.append(peers.training_step(net, *peers.batch_of(case), case.precision)().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and seen == {torch.bfloat16}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        cli = trainer_cost.fitted(steps=7)
    assert not list(folder.iterdir()), "the run folder was left behind"
    return cli


def test_the_null_model_runs_through_the_full_stack(fitted) -> None:
    trainer = fitted.trainer
    assert trainer.global_step == 7 and fitted.model.seconds > 0
    for callback in (Curves, Progress, RunFolder, Checkpoints):
        assert any(isinstance(one, callback) for one in trainer.callbacks), callback
    assert isinstance(trainer.logger, TensorBoardLogger) and trainer.log_every_n_steps == 50


def test_plain_loop_takes_the_same_steps(fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = fitted.datamodule.train_dataloader()
    assert len(loader) == 7
    net = fitted.model.net = trainer_cost.NullModel()
    clock = iter([10.0, 22.0])  # after the first step, after the seventh
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    batches = [{"image": torch.ones(2, 1)}] * 7
    assert trainer_cost.plain_loop(fitted.model, batches) == 2.0
    # AdamW moves a constant gradient by lr a step; the one parameter is not decayed.
    assert net.weight.item() == pytest.approx(1 - sum(lr_of(step) for step in range(7)), abs=1e-6)


def lr_of(step: int) -> float:
    return 1e-3 * 0.5 * (1 + torch.cos(torch.tensor(step / 7 * torch.pi)).item())


def test_the_trainer_is_timed_after_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    clocked, module = trainer_cost.Clock(), trainer_cost.NullExperiment(peers.RECIPE)
    for i in range(3):
        clocked.on_train_batch_end(SimpleNamespace(), module, {}, {}, i)
    assert module.seconds == 2.0


def test_rows_of_the_trainer(fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = SimpleNamespace(model=None, datamodule=SimpleNamespace(random_batch=lambda images: {}))
    monkeypatch.setattr(trainer_cost, "fitted", lambda steps: fitted)
    monkeypatch.setattr(trainer_cost, "fitted_vit", lambda: vit)
    times = iter([[[0.001, 0.003], [0.002, 0.003], [0.002, 0.006]], [[0.1, 0.1], [0.1, 0.104]]])
    monkeypatch.setattr(trainer_cost, "interleaved", lambda sides, rounds: dict(zip(sides, next(times), strict=True)))
    rows = trainer_cost.measure(7, 2)
    assert [row[0] for row in rows] == ["null model, 7 steps"] * 3 + ["tiny/2 at 32x32, batch 1, 50 steps"] * 2
    assert [row[1].split(",")[0] for row in rows] == ["plain", "plain", "Trainer", "plain", "Trainer"]
    assert [row[2] for row in rows] == ["2.000", "2.500", "4.000", "100.000", "102.000"]
    assert [row[3] for row in rows] == ["", "0.500 (0.250 to 0.750)", "2.000 (1.500 to 2.500)", "",
                                        "2.000 (1.000 to 3.000)"]  # fmt: skip
    # Pairs 2 and 1, 2 and 2, 1 and 1.04.
    assert [row[4] for row in rows] == ["", "1.500 (1.250 to 1.750)", "2.000 (2.000 to 2.000)", "",
                                        "1.020 (1.010 to 1.030)"]  # fmt: skip


def test_vit_s_plain_loop_takes_the_trainer_s_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the Trainer's batches, it ends at the Trainer's weights."""
    monkeypatch.setattr(trainer_cost, "SIDE", 8)
    batches, training_step = [], Classification.training_step

    def remembered(module, batch, number):
        batches.append(batch)
        return training_step(module, batch, number)

    with monkeypatch.context() as trainer:
        trainer.setattr(Classification, "training_step", remembered)
        cli = trainer_cost.fitted_vit()
    assert len(batches) == cli.trainer.global_step == trainer_cost.VIT_STEPS and cli.model.seconds > 0
    assert cli.trainer.precision == "32-true" and (cli.model.net.depth, cli.model.net.width) == (12, 192)
    noise = cli.datamodule.random_batch(trainer_cost.VIT_BATCH)
    for name in ("image", "label"):
        assert (noise[name].shape, noise[name].dtype) == (batches[0][name].shape, batches[0][name].dtype)

    trained = cli.model.net
    with seeded("init", 0):
        cli.model.net = cli.model.build(cli.datamodule)
    assert trainer_cost.plain_loop(cli.model, batches) > 0
    for own, other in zip(cli.model.net.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_plain_loop_is_spared_what_lightning_sets(fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trainer_cost.NVML_CHECK, "1")
    seen = []

    def batches():
        for _ in range(2):
            seen.append(os.environ.get(trainer_cost.NVML_CHECK))
            yield {"image": torch.ones(2, 1)}

    trainer_cost.plain_loop(fitted.model, batches())
    assert seen == [None, None] and os.environ[trainer_cost.NVML_CHECK] == "1"


def test_rows_of_the_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    def throughput(images: torch.Tensor, rounds: int) -> dict[str, float]:
        assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8 and rounds == 2
        return {"batched": 16000.4, "pil": 2000.0, "ratio": 8.125}

    monkeypatch.setattr(augmentation, "augmentation_throughput", throughput)
    pil, batched = augmentation.measure(6, 2)
    assert pil[1:] == ("2,000", "") and batched[1:] == ("16,000", "8.12")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What comes after `python` in each command, of which `import lightning` takes 2 s and any other one 3; none is
    run.
    """
    words, now = [], [0.0]

    def pretended(command: list[str], cwd: Path, **_: bool) -> SimpleNamespace:
        assert command[0] == sys.executable and (cwd / "supervised").is_dir()
        words.append(command[1:])
        now[0] += 2 if command[1] == "-c" else 3
        return SimpleNamespace(returncode=2 * ("gigantic" in command), stderr="it fell over")

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(subprocess, "run", pretended)
    return words


def test_rows_of_the_start_up(started: list[list[str]]) -> None:
    rows = startup.measure(rounds=2)
    assert [row[0] for row in rows] == list(startup.COMMANDS) and len(started) == (1 + 2) * len(rows)
    assert started[0] == ["-c", "import lightning"] and started[1] == ["-m", "supervised", "--help"]
    assert rows[0][1:] == ("2.00 (2.00 to 2.00)", "")
    assert {row[1:] for row in rows[1:]} == {("3.00 (3.00 to 3.00)", "1.50 (1.50 to 1.50)")}


def test_a_command_that_ends_otherwise_is_no_measurement(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(startup.COMMANDS, "python -m supervised --help", 1)
    with pytest.raises(AssertionError, match="python -m supervised --help: it fell over"):
        startup.measure(rounds=1)


@pytest.mark.parametrize("command", [command for command in startup.COMMANDS if command != startup.FLOOR])
def test_the_commands_end_as_they_are_said_to(command: str) -> None:
    assert run(*shlex.split(command)[2:]).returncode == startup.COMMANDS[command]


def test_start_up_is_a_mode_of_its_own(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "measure", lambda rounds: [("a command", f"{rounds}.00", "")])
    threads = torch.get_num_threads()
    try:
        assert main(["startup", "--rounds", "3"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == list(startup.COLUMNS) and rows[2] == ["a command", "3.00", ""]
    assert "startup" not in benchmark.MODES  # which are those of `all`


def test_a_step_on_many_devices_by_hand() -> None:
    """790 TFLOP at half the peak take 2 s, of which 4/3 s are backward; 8 devices send 7/4 of the gradients."""
    quick = scaling.step_on(8, 790e12, 100 * 2**20, 175 * 2**20, mfu=0.5)
    # The ring takes 1 s, the last quarter of it (25 MiB) after the backward.
    assert quick[:4] == pytest.approx((2.0, 1.0, 1 / 3, 2 / 2.25))
    assert quick.least == pytest.approx(0.25 * 9)  # of which a ninth, 0.25 s, is exposed: 2.25 / 2.5 is 0.9
    slow = scaling.step_on(8, 790e12, 100 * 2**20, 175 * 2**20 / 3, mfu=0.5)
    # Of 3 s the backward hides 4/3: more is left than the last bucket.
    assert slow[:4] == pytest.approx((2.0, 3.0, 0.6, 2 / (2 + 5 / 3)))
    assert slow.least == pytest.approx(6.75)
    one_bucket = scaling.step_on(2, 790e12, 2**20, 2**20, mfu=1.0)  # smaller than a bucket: nothing of it is hidden
    assert one_bucket[:4] == pytest.approx((1.0, 1.0, 0.5, 0.5))


@pytest.mark.parametrize("gradients", [4e6, 1e9])
@pytest.mark.parametrize("devices", [8, 64])
def test_the_least_step_is_as_efficient_as_it_says(devices: int, gradients: float) -> None:
    least = scaling.step_on(devices, 1e12, gradients, 50e9, mfu=0.6).least
    assert scaling.step_on(devices, least * 0.6 * 790e12, gradients, 50e9, mfu=0.6).efficiency == pytest.approx(0.9)


def test_the_paper_on_8_and_64_gpus() -> None:
    rows = [dict(zip(scaling.COMPUTED_COLUMNS, row, strict=True)) for row in scaling.computed(mfu=0.6)]
    assert [row["GPUs"] for row in rows] == ["8", "64"] * len(scaling.PAPER)
    found = {(row["config"], row["size"], row["GPUs"]): row for row in rows}
    base = found["supervised/imagenet224", "base/16", "64"]
    # 86.57 M parameters; 64 images of 3 x 35.13 GFLOP (197 tokens) at 474 TFLOP/s; 126/64 x 346 MB at 50 GB/s.
    assert (base["parameters M"], base["gradients MB"], base["images per GPU"]) == ("86.6", "346", "64")
    assert float(base["step ms"]) == pytest.approx(64 * 3 * 35.13e9 / 474e12 * 1e3, rel=1e-3)
    assert float(base["all-reduce ms"]) == pytest.approx(126 / 64 * 4 * 86.57e6 / 50e9 * 1e3, rel=1e-3)
    assert "too little per GPU: all-reduce" in base["remark"]
    assert found["supervised/nyu_depth", "small/1", "64"]["remark"] == "**16 images: 16 GPUs at the most**"
    assert found["supervised/flowers102", "small/1", "8"]["global batch"] == "1,016"
    assert found["supervised/imagenet28", "large/1", "8"]["remark"] == ""
    assert float(found["diffusion/imagenet256", "large/1", "8"]["parameters M"]) == pytest.approx(457.8, abs=1.5)


def test_rows_of_measured_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {(1, 8): [100.0, 200.0], (2, 8): [150.0, 300.0], (2, 16): [180.0, 400.0]}
    left = {side: iter(values) for side, values in speeds.items()}
    monkeypatch.setattr(scaling, "images_per_second",
                        lambda config, options, batch, processes, threads: next(left[processes, batch]))
    rows = scaling.measured("a config", [], 8, 2, threads=1, rounds=2)
    assert rows == [("1", "8", "8", "150", "", ""),
                    ("2", "8", "4", "225", "1.50 (1.50 to 1.50)", "75% (75% to 75%)"),
                    ("2", "16", "8", "290", "1.90 (1.85 to 1.95)", "95% (92% to 98%)")]  # fmt: skip


def test_scaling_reports_what_fit_measures(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process in the place of two, whose start takes as long again."""
    measured = scaling.measured
    monkeypatch.setattr(scaling, "measured", lambda config, options, batch, processes, threads, rounds: measured(
        config, options, batch, 1, threads, rounds))
    monkeypatch.setattr(scaling, "PAPER", scaling.PAPER[:1])
    threads = torch.get_num_threads()
    try:
        assert main(["scaling", "--rounds", "1", "--batch", "64", "--config", CONFIG, "--", *SMALL]) == 0
        output = capsys.readouterr().out
        with pytest.raises(InputError, match=r"supervised fit with 1 process\(es\): error: .*widht"):
            main(["scaling", "--config", CONFIG, "--", "--model.widht", "16"])
        with pytest.raises(InputError, match="--mfu 1.5: give a share above 0, up to 1"):
            main(["scaling", "--mfu", "1.5"])
    finally:
        torch.set_num_threads(threads)
    assert f"`python -m common.benchmark scaling --rounds 1 --batch 64 --config {CONFIG} -- --model" in output
    assert "**Computed, not measured.** A step is 3 x forward FLOPs at 0.6 of 790 TFLOP/s" in output
    rows = [cells(line) for line in output.splitlines() if line.startswith("|")]
    assert rows[0] == list(scaling.MEASURED_COLUMNS) and rows[2][:3] == ["1", "64", "64"]
    assert float(rows[2][3].replace(",", "")) > 1


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_is_markdown() -> None:
    lines = list(table(["a", "bb"], [["1", "2"], ["100", "20"]]))
    assert len({len(line) for line in lines}) == 1
    assert [cells(line) for line in lines] == [["a", "bb"], ["---", "--"], ["1", "2"], ["100", "20"]]


def test_circumstances_name_what_figures_depend_on() -> None:
    _, told = circumstances("common.benchmark", ["peers"], rounds=3)
    for package in ("torch", "torchvision", "pillow", "timm", "lightning", "diffusers", "torch-fidelity"):
        assert f"{package} {version(package)}" in told
    assert "medians over 3 rounds" in told


def test_every_mode_reports_with_its_circumstances(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "of_study", lambda study, mode, options: [
        Section(f"{mode} of {study}", ["rounds"], [[str(options.rounds)]])])
    monkeypatch.setattr(trainer_cost, "SIDE", 8)
    try:
        small = ["--rounds", "1", "--depth", "1", "--batch", "1", "--steps", "3", "--images", "8", "--crops", "4"]
        assert main(["all", *small, "--json", str(tmp_path / "all.json"), "--config", CONFIG]) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    head = output.split("|")[0]
    assert f"`python -m common.benchmark all {' '.join(small)} --json" in head
    assert f"torch {torch.__version__.split('+')[0]}" in head and "1 thread(s)" in head and "commit " in head
    rows = [cells(line) for line in output.splitlines() if line.startswith("|")]
    assert [len(row) for row in rows].count(len(peers.COLUMNS)) == 2 + len(peers.cases(1))
    assert rows.count(list(trainer_cost.COLUMNS)) == rows.count(list(augmentation.COLUMNS)) == 1
    assert [row[0] for row in rows if len(row) == len(pipelines.COLUMNS)][-4:] == [
        "PIL, image by image", "the suite's, image by image", "the suite's, from a store of 96x96",
        "the suite's, from that store, and RandAugment"]
    assert [len(row) for row in rows].count(3) == 2 + 2  # heading, rule and rows of the augmentation
    assert sum(row[:2] == ["tiny/2 at 8x8, batch 1, 50 steps", loop] for row in rows
               for loop in (trainer_cost.MEMORY, trainer_cost.TRAINER)) == 2
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["command"].startswith("python -m common.benchmark all") and "torch" in written["circumstances"]
    tables = {table["caption"]: table["rows"] for table in written["tables"]}
    [row] = tables["Training step of a config, on noise:"]
    assert row["config"] == "supervised/digits" and row["tokens"] == 64 and row["compiled"] == "no"
    for of_study in ("peers of mae", "peers of diffusion", "sampling of diffusion"):
        assert tables.pop(of_study) == [{"rounds": 1}]
    assert sum(map(len, tables.values())) == sum(len(row) > 1 for row in rows) - 2 * len(tables)


def test_a_store_is_written_beside_pil_and_decoding_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same files, by as many processes, anew in each round; in threads here, whose start takes no time."""
    files = tmp_path / "pictures"
    pipelines.photographs(files)
    monkeypatch.setattr(building, "processes", ThreadPoolExecutor)
    opened, shrunk, decoded, written = [], [], [], []
    monkeypatch.setattr("PIL.Image.Image.convert", lambda image, mode: opened.append(image.filename) or image)
    monkeypatch.setattr("PIL.Image.Image.resize", lambda image, size, how: shrunk.append((image.filename, size)))
    monkeypatch.setattr(building, "decode", lambda file, channels: decoded.append(file))
    monkeypatch.setattr(building, "write_shard", lambda folder, number, part, channels, side: (
        written.append((number, side, *part)), (number, True))[1])
    seconds = iter([[6.0, 8.0, 4.0], [4.0, 4.0, 4.0], [2.0, 4.0, 2.0], [4.0, 5.0, 2.0]])
    monkeypatch.setattr(building, "interleaved", lambda sides, rounds: {
        name: run() and None or next(seconds) for name, run in sides.items()})
    rows = building.measure(str(files), 32, images=10, workers=2, rounds=3)
    assert len(decoded) == 20 and sorted(decoded[:10]) == sorted(f for _, _, *part in written[:4] for f in part)
    assert sorted(opened) == sorted(decoded * 2) and sorted(shrunk) == sorted((file, (32, 32)) for file in decoded)
    assert sorted(number for number, _, *_ in written) == list(range(8)) and {side for _, side, *_ in written} == {32}
    assert rows == [
        ("PIL's decoding and shrinking", "2", "", "", ""),
        ("PIL's decoding alone", "2", "1.50 (1.25 to 1.75)", "", ""),
        ("the suite's decoding alone", "5", "2.00 (2.00 to 2.50)", "2.00 (1.50 to 2.00)", ""),
        ("a store of 32x32", "2", "1.60 (1.55 to 1.80)", "1.00 (0.90 to 1.50)", "0.80 (0.65 to 0.90)"),
    ]


def test_a_device_crops_what_it_holds_of_a_store_alike(tmp_path: Path) -> None:
    source = ImageFolder(pipelines.photographs(tmp_path / "photographs"))
    files, labels = source.read(tmp_path, "train")
    store = Store(make(source, tmp_path, 48, workers=1), files, labels)
    chosen = torch.arange(300) % len(files)
    taken, held = pipelines._stored(store, chosen)(), pipelines._held(store, chosen, torch.device("cpu"))()
    assert len(held) == 300 - pipelines.BATCH and held.std() > 0.1 and torch.equal(taken, held)


@pytest.mark.parametrize("config", [
    "supervised/configs/digits.yaml", "supervised/configs/rooms.yaml", "supervised/configs/imagenet28.yaml",
    "mae/configs/digits.yaml", "mae/configs/digits_finetune.yaml", "mae/configs/digits_probe.yaml",
    "diffusion/configs/digits.yaml", "diffusion/configs/imagenet256.yaml", "diffusion/configs/autoencoder_digits.yaml",
    "locality_ablation/configs/shapes.yaml",
])
def test_a_step_of_any_study_trains_its_net(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data, and with the loss of its own `training_step`."""
    monkeypatch.chdir(tmp_path)
    path = Path(CONFIG).parents[2] / config
    narrow = [] if "autoencoder" in config else ["--model.width", "16", "--model.heads", "2", "--model.depth", "2"]
    torch.set_float32_matmul_precision("highest")
    module, data = step.experiment(str(path), narrow, 4, compiled=None)
    assert torch.get_float32_matmul_precision() == "high"  # as `fit` has it, for GPUs
    assert not module.compiled and module.net.training
    taken = step.Step(module, data.random_batch(4))
    before = [parameter.detach().clone() for parameter in module.net.parameters()]
    assert all(taken().isfinite() for _ in range(2))
    assert any(not now.equal(then) for now, then in zip(module.net.parameters(), before, strict=True))
    if taken.average is not None:
        changed = next(i for i, p in enumerate(module.net.parameters()) if not p.equal(before[i]))
        assert not taken.average[changed].equal(before[changed])


def test_row_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 images of three times the forward's FLOPs in 10 ms, of a peak that is known."""
    monkeypatch.setattr(step, "seconds_of", lambda taken, device: taken() is None or 0.01)
    monkeypatch.setattr(step, "peak", lambda device, precision: step.Peak(1e12, "a guess"))
    options = ["--model.patch_size", "2", "--model.width", "32", "--model.heads", "2", "--model.depth", "1"]
    row = dict(zip(step.COLUMNS, step.measure(CONFIG, options, 8, None, rounds=3), strict=True))
    assert row["model"] == "/2, 1 x 32" and row["tokens"] == "16" and row["batch"] == "8"
    flops = 3 * (2 * 16 * 4 * 32 + 24 * 17 * 32**2 + 4 * 17**2 * 32 + 2 * 32 * 10)
    assert row["GFLOP an image"] == f"{flops / 1e9:.3f}" and row["ms (quartiles)"] == "10.0 (10.0 to 10.0)"
    assert row["images/s"] == "800.0" and row["share of the peak"] == f"{800 * flops / 1e12:.1%} of a guess"


@pytest.mark.parametrize("config, model, tokens", step.TARGETS)
def test_targets_follow_from_what_an_h200_multiplies_and_moves(config: str, model: str, tokens: int) -> None:
    """By hand: a block's products are 24 d^2 a token, its attention 4 N d, and 36 d numbers of 2 bytes are moved, DiT's
    12 d more; what is beside the blocks is small.
    """
    depth, width = map(int, model.split(", ")[1].split(" x "))
    products, attention = 24 * tokens * width**2, 4 * tokens**2 * width
    moved = 2 * (36 + 12 * config.startswith("diffusion")) * tokens * width
    seconds = depth * (3 * products / 790e12 + 3.5 * attention / 380e12 + moved / 4.3e12)
    assert step.TARGETS[config, model, tokens] == pytest.approx(1 / seconds, rel=0.01)


def test_a_cpu_s_peak_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.25, 1, 1, 1])
    monkeypatch.setattr(step, "seconds_of", lambda work, device: next(seconds))
    assert step.peak(torch.device("cpu"), "32-true").flops == 2 * step.SIDE**3 / 0.25


@pytest.mark.parametrize("option", ["rounds", "threads", "depth", "batch", "steps", "images", "crops", "side"])
def test_numbers_that_make_no_sense(option: str) -> None:
    with pytest.raises(InputError, match=f"--{option} 0: give a whole number"):
        main(["step", f"--{option}", "0"])


@pytest.mark.parametrize("arguments, message", [
    (["step", "--device", "cuda"], "--device cuda: step does not take it; peers, sample and data do"),
    (["peers", "--device", "cuda"], "--device cuda: there is no GPU that torch can use; give cpu, or leave it out"),
])  # fmt: skip
def test_a_gpu_that_is_of_no_use(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        main(arguments)


@pytest.mark.parametrize("device, size, batch", [("cpu", "nano", 64), ("cuda", "large", 16)])
def test_a_study_s_benchmark_is_asked_by_name(
    device: str, size: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion import benchmark as study

    monkeypatch.setattr(study, "sections", lambda options: [options])
    [options] = benchmark.of_study("diffusion", "peers", argparse.Namespace(rounds=3, device=device))
    assert (options.mode, options.rounds, options.device, options.size, options.batch) == (
        "peers", 3, device, size, batch)


def test_scaling_trains_one_config() -> None:
    with pytest.raises(InputError, match="--config: scaling trains one, and there are 2"):
        main(["scaling", "--config", CONFIG, CONFIG])


def test_the_command_leaves_with_2_and_one_line() -> None:
    process = run("common.benchmark", "step", "--rounds", "0")
    assert process.returncode == 2
    assert process.stderr == "error: --rounds 0: give a whole number, 1 or more\n"

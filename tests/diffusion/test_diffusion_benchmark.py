"""That both sides do the same work, and that the tables hold what their columns say. Nothing here is timed."""

import mmap
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import run
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from common.benchmark import interleaving
from common.data import Augment
from common.errors import InputError
from common.randomness import permutation, seeded
from common.training.checkpoints import Checkpoints
from common.training.curves import Curves
from common.training.ema import EMA
from common.training.optim import Recipe
from common.training.progress import Progress
from common.training.run import RunFolder
from diffusion import benchmark, generation, metrics_cost, peers
from diffusion.autoencoder import Autoencoder
from diffusion.benchmark import LATENTS_COLUMNS, SAMPLING_COLUMNS, STEP_COLUMNS, TimedGeneration, main
from diffusion.dit import DiT
from diffusion.latent_set import LatentSet
from diffusion.metrics_cost import FID_COLUMNS, MEMORY_COLUMNS
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler

STEPS = 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 8)
    monkeypatch.setattr(benchmark, "has_bf16", lambda: True)


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
    assert trainer.global_step == STEPS and trainer.precision == "bf16-mixed"
    assert list(cli.model.seconds) == ["plain loop", "Trainer"] and min(cli.model.seconds.values()) > 0
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
        suite.setattr("common.training.recipe.attention_kernels", lambda *_: "")  # told by running one
        suite.setattr(benchmark, "plain_steps", lambda *_: iter(range(STEPS)))  # not in turns
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
        assert len(list(benchmark.plain_steps(cli.model, cli.datamodule))) == STEPS
    assert lerps == pytest.approx([0.01] * STEPS)

    assert flops_of_trainer.get_total_flops() == flops_of_loop.get_total_flops() > 0
    [optimizer], [theirs] = optimizers, cli.trainer.optimizers
    for option in ("lr", "betas", "weight_decay", "fused"):
        assert {group[option] for group in theirs.param_groups} == {optimizer.defaults[option]}, option
    assert optimizer.defaults["fused"]
    for own, other in zip(optimizer.param_groups[0]["params"], cli.model.net.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bf16, precision, numbers", [(True, "bf16-mixed", torch.bfloat16),
                                                      (False, "32-true", torch.float32)])
def test_the_plain_loop_has_the_trainers_precision(
    bf16: bool, precision: str, numbers: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "has_bf16", lambda: bf16)
    seen, build, autocast = [], TimedGeneration.build, []
    steps = benchmark.plain_steps
    monkeypatch.setattr(benchmark, "plain_steps", lambda *given: (
        autocast.append(torch.is_autocast_enabled("cpu")) for _ in steps(*given)))

    def watched(module, data):
        net, side = build(module, data), []
        net.blocks[0].mlp.register_forward_hook(lambda _, __, out: side.append(out.dtype))
        seen.append(side)
        return net

    monkeypatch.setattr(TimedGeneration, "build", watched)
    monkeypatch.setattr("common.training.recipe.attention_kernels", lambda *_: "")
    assert benchmark.trained(2, STEPS).trainer.precision == precision
    assert [side for side in seen if side] == [[numbers] * STEPS] * 2  # others are built for their cost alone
    assert autocast == [False] * STEPS  # around its backward, as a plain loop has none


def test_both_sides_are_timed_apart_and_after_their_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock.now)

    def passes(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(benchmark, "plain_steps", lambda *_: map(passes, [50.0, 60.0, 2.0, 3.0, 7.0]))
    module = TimedGeneration(Recipe(lr=1e-3))
    module.trainer = SimpleNamespace(datamodule=None)
    module.on_train_start()
    for i, seconds in enumerate([80.0, 4.0, 5.0, 12.0, 90.0]):  # what follows the last step is not counted
        module.on_train_batch_start({}, i)
        passes(seconds)
    assert module.seconds == {"plain loop": 4.0, "Trainer": 7.0}


def test_row_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = iter([(9.0, 9.0), (0.1, 0.2), (0.3, 0.3), (0.4, 0.6)])  # the first run is not counted

    def trained(*given) -> SimpleNamespace:
        plain, own = next(pairs)
        return SimpleNamespace(model=SimpleNamespace(seconds={"plain loop": plain, "Trainer": own}))

    monkeypatch.setattr(benchmark, "trained", trained)
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
    calls = sides_that_only_say_so(monkeypatch)
    times = {"ours": [2.0, 1.0, 4.0], "theirs": [6.0, 8.0, 9.0]}
    monkeypatch.setattr(interleaving, "interleaved", lambda sides, rounds: times)
    [row] = benchmark.measure_sampling(nano(2), samples=12, steps=5, rounds=3)
    assert set(calls) == {(name, False, False, 16, "ddim", 5, 1.5, 12, (*range(10), 0, 1))
                          for name in ("one_by_one", "in_batches")}
    # Pairs 3, 8, 9/4; the ratio of the medians would be 4.
    assert row == ("/2, 4 x 48", "fp32", "fp32", "1.5", "6.0", "3.00 (2.62 to 5.50)")


def test_rows_of_the_sampling_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in bf16 in batches, and one by one both so and in fp32; on the CPU, where compiling is left out."""
    calls, compiled = sides_that_only_say_so(monkeypatch), []
    monkeypatch.setattr(benchmark, "compile_blocks", lambda net: compiled.append(setattr(net, "compiled", True)))
    rows = list(benchmark.measure_sampling(nano(2), samples=3, steps=5, rounds=1, fast=True))
    assert [row[1:3] for row in rows] == [("bf16, compiled", "bf16, compiled"), ("bf16, compiled", "eager fp32")]
    assert {call[:3] for call in calls} == {
        ("in_batches", True, True), ("one_by_one", True, True), ("one_by_one", False, False)}
    assert len(compiled) == 1


def nano(patch_size: int) -> DiT:
    return DiT(8, patch_size, 4, 10, size="nano")


def sides_that_only_say_so(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Their calls: which side, whether compiled and in bf16, and of what."""
    calls = []

    def side(name: str):
        return lambda net, sampler, numbers, labels: calls.append(
            (name, getattr(net, "compiled", False), torch.is_autocast_enabled("cpu"), net.tokens, sampler.solver,
             sampler.steps, sampler.guidance, len(numbers), tuple(labels.tolist())))  # fmt: skip

    for name in ("one_by_one", "in_batches"):
        monkeypatch.setattr(benchmark, name, side(name))
    return calls


# The metrics


MB = 1_000_000


def held_for_a_while(size: int) -> int:
    """So many bytes, filled and given back.

    Mapped by hand: malloc may hand out what this process has held and freed before, and nothing would be added.
    """
    with mmap.mmap(-1, size) as memory:
        for place in range(0, size, mmap.PAGESIZE):
            memory[place] = 1
        return memory[place]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is observed without a process of its own, whose imports take long."""
    monkeypatch.setattr(metrics_cost, "alone", lambda *work: metrics_cost.observed(torch.get_num_threads(), *work))


@pytest.fixture
def extractors(tmp_path: Path):
    file = tmp_path / "inception.pth"
    metrics_cost.random_inception(file)
    return metrics_cost.extractors(file)


def test_the_peak_is_that_of_a_fresh_process() -> None:
    """Neither what the asking process holds is counted, nor the modules that the fresh one has imported."""
    held_here = torch.ones(100 * MB, dtype=torch.double)
    value, peak = metrics_cost.alone(held_for_a_while, 100 * MB)
    assert value == 1 == held_here[-1]
    assert peak == pytest.approx(100 * MB, abs=10 * MB)


def test_the_peak_is_that_of_the_work() -> None:
    """Not an earlier one, and not what is left in the end."""
    held_for_a_while(400 * MB)
    assert metrics_cost.observed(torch.get_num_threads(), held_for_a_while, 100 * MB) == (
        1, pytest.approx(100 * MB, abs=10 * MB))  # fmt: skip


def test_both_sides_take_the_same_statistics_of_features(extractors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_cost, "BATCH", 4)
    theirs, ours = extractors
    noise = torch.rand(6, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    images = (noise * torch.arange(40, 280, 40)[:, None, None, None]).byte()  # of one brightness, features vary little
    seen = {"theirs": [], "ours": []}
    theirs.register_forward_pre_hook(lambda _, arguments: seen["theirs"].append(len(arguments[0])))
    ours.register_forward_pre_hook(lambda _, arguments: seen["ours"].append(len(arguments[0])))
    expected = metrics_cost.fidelity_statistics(theirs, images)
    mean, covariance = metrics_cost.suite_statistics(ours, images)
    assert seen == {"theirs": [4, 2], "ours": [4, 2]}
    assert theirs.features_list == ["2048"]  # no logits, which FID alone does not need
    assert mean.shape == (2048,) and covariance.diagonal().mean() > 1e-4
    torch.testing.assert_close(mean, torch.from_numpy(expected["mu"]).double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariance, torch.from_numpy(expected["sigma"]), rtol=1e-3, atol=1e-6)


def test_row_of_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(metrics_cost, "random_inception", lambda file: None)
    monkeypatch.setattr(metrics_cost, "extractors", lambda file: ("their net", "our net"))
    for name in ("fidelity_statistics", "suite_statistics"):
        monkeypatch.setattr(metrics_cost, name, lambda net, images, name=name: calls.append((name, net, images.shape)))
    seconds = iter([[6.0, 8.0, 9.0], [2.0, 1.0, 4.0]])

    def fake(sides, rounds):
        return {name: [side() > 0 for _ in range(rounds)] and next(seconds) for name, side in sides.items()}

    monkeypatch.setattr(metrics_cost, "interleaved", fake)
    row = dict(zip(FID_COLUMNS, metrics_cost.measure_statistics(32, 12, rounds=3), strict=True))
    sides = [("fidelity_statistics", "their net"), ("suite_statistics", "our net")]
    assert calls == [(*side, (2, 3, 32, 32)) for side in sides] + [
        (*side, (12, 3, 32, 32)) for side in sides for _ in range(3)
    ]
    assert (row["images"], row["pixels"]) == ("12", "32x32")
    assert (row["torch-fidelity images/s"], row["suite images/s"]) == ("1.50", "6.00")
    # Pairs 3, 8, 9/4; the ratio of the medians would be 4.
    assert row["times as fast (quartiles)"] == "3.000 (2.625 to 5.500)"


def test_row_of_the_gathering(in_this_process, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(metrics_cost, "suite_statistics", lambda *work: given.append(work))
    row = dict(zip(MEMORY_COLUMNS, metrics_cost.measure_gathering(32, 5), strict=True))
    [(net, images)] = given
    assert (row["analysis"], row["of"]) == ("FID's statistics", "5 images of 32x32")
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8 and images.float().std() > 50
    assert net.features == 2048
    assert int(row["share of 4 GB"].rstrip("%")) == pytest.approx(25 * float(row["peak GB"]), abs=1)


def test_row_of_precision_and_recall(in_this_process, monkeypatch: pytest.MonkeyPatch) -> None:
    given, measured = [], metrics_cost.precision_recall
    monkeypatch.setattr(metrics_cost, "precision_recall", lambda *rows: given.extend(rows) or measured(*rows))
    row = dict(zip(MEMORY_COLUMNS, metrics_cost.measure_precision_recall(9000, 100, 64), strict=True))
    assert [rows.shape for rows in given] == [(9000, 64), (100, 64)]
    assert all(abs(rows.std() - 1) < 0.1 for rows in given)
    assert (row["analysis"], row["of"]) == ("precision and recall", "9,000 x 100 features of 64")
    assert float(row["seconds"]) > 0


def test_precision_and_recall_hold_no_more_than_blocks_of_distances() -> None:
    row = dict(zip(MEMORY_COLUMNS, metrics_cost.measure_precision_recall(9000, 100, 64), strict=True))
    # A block of 2000 x 2000 distances takes 32 MB; with all of 9000 x 9000 the peak is 1.3 GB.
    assert 0.03 <= float(row["peak GB"]) <= 0.5
    assert int(row["share of 4 GB"].rstrip("%")) == pytest.approx(25 * float(row["peak GB"]), abs=1)


def test_row_of_the_attention(in_this_process, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, examine = [], metrics_cost.examine
    monkeypatch.setattr(metrics_cost, "examine", lambda run, *given: seen.append((run, given, examine(run, *given))))
    row = dict(zip(MEMORY_COLUMNS, metrics_cost.measure_attention("nano", 24, 20), strict=True))
    [(run, (folder, count, shown), found)] = seen
    assert (folder, count, shown) == (None, 20, [(0, 0), (0, 1), (0, 2)])
    assert found.measures.distance.shape == (4, 3) and not run.net.training
    assert found.images.shape == (4, 3, 24, 24) and found.images.std() > 0.05
    assert (row["analysis"], row["of"]) == ("attention", "nano/1, 577 tokens, 4 layers, 3 heads, 20 images")
    assert float(row["seconds"]) > 0


def test_the_attention_holds_one_layer_at_a_time() -> None:
    row = dict(zip(MEMORY_COLUMNS, metrics_cost.measure_attention("nano", 24, 20), strict=True))
    # One layer's maps of all images take 80 MB, and three times that is there at once; a map that is shown and kept as
    # a part of them would keep 80 MB of each layer.
    assert 0.16 <= float(row["peak GB"]) <= 0.37


def test_the_metrics_are_measured_at_the_sizes_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics_cost.SIDES == (299, 32) and metrics_cost.BATCH == 64 and metrics_cost.LIMIT == 4e9
    works = []
    monkeypatch.setattr(metrics_cost, "alone", lambda *work: works.append(work) or (1234.5, int(1e9)))
    options = benchmark._parser().parse_args(["metrics"])
    monkeypatch.setattr(metrics_cost, "measure_statistics", lambda *given: (*map(str, given), "", ""))
    list(benchmark.sections(options))
    assert works == [(metrics_cost.gather, 299, 64), (metrics_cost.judge, 50_000, 10_000, 2048),
                     (metrics_cost.attend, "base", 32, 20)]  # fmt: skip


def test_the_report_of_the_metrics(in_this_process, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(metrics_cost, "SIDES", (8,))
    for name, value in {"FEATURES": 16, "ATTENDING": "nano", "ATTENDED": 8}.items():
        monkeypatch.setattr(metrics_cost, name, value)
    threads = torch.get_num_threads()
    try:
        assert main(["metrics", "--rounds", "1", "--images", "2", "--generated", "40", "--references", "30",
                     "--analysed", "3"]) == 0  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert "`python -m diffusion.benchmark metrics --rounds 1" in output and "by torch-fidelity 0." in output
    rows = [cells(line) for line in output.splitlines() if line.startswith("|")]
    assert [rows[0], rows[3]] == [list(FID_COLUMNS), list(MEMORY_COLUMNS)]
    assert [row[:2] for row in rows if "-" not in row[0]] == [
        ["images", "pixels"], ["2", "8x8"], ["analysis", "of"],
        ["FID's statistics", "2 images of 8x8"],
        ["precision and recall", "40 x 30 features of 16"],
        ["attention", "nano/1, 65 tokens, 4 layers, 3 heads, 3 images"],
    ]  # fmt: skip
    assert 0.05 < float(rows[2][2]) < 50 and 0.05 < float(rows[2][3]) < 50


# The command


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_mode_reports_with_its_circumstances(capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    arguments = ["all", "--rounds", "1", "--steps", "3", "--samples", "2", "--solver_steps", "3", "--batch", "2"]
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    head = output.split("|")[0]
    assert f"`python -m diffusion.benchmark {' '.join(arguments)}`" in head and "medians over 1 rounds" in head
    assert "under bf16, 3 steps" in head and "2 samples of 8x8x4 in batches of 64, 3 steps of DDIM" in output
    rows = [cells(line) for line in output.splitlines() if line.startswith("|")]
    assert len(rows) == 16 and [rows[i] for i in (0, 4, 8, 12)] == [
        list(columns) for columns in (STEP_COLUMNS, peers.COLUMNS, LATENTS_COLUMNS, SAMPLING_COLUMNS)
    ]
    assert [rows[i][0] for i in (2, 3, 6, 7, 10, 11, 14, 15)] == [
        "nano/1", "nano/2", "/1, 4 x 48", "/2, 4 x 48", "vq", "kl", "/1, 4 x 48", "/2, 4 x 48"]


@pytest.mark.parametrize("option, least", [("rounds", 1), ("threads", 1), ("steps", 3), ("side", 2), ("batch", 1),
                                           ("samples", 1), ("solver_steps", 2), ("images", 2), ("generated", 4),
                                           ("references", 4), ("analysed", 1)])  # fmt: skip
def test_numbers_that_make_no_sense(option: str, least: int) -> None:
    with pytest.raises(InputError, match=f"--{option} {least - 1}: give a whole number, {least} or more"):
        main(["sampling", f"--{option}", str(least - 1)])


def test_a_mistyped_option_is_named() -> None:
    with pytest.raises(InputError, match="unrecognized arguments: --round 2; python -m diffusion.benchmark --help"):
        main(["step", "--round", "2"])


def test_the_command_leaves_with_2_and_one_line() -> None:
    process = run("diffusion.benchmark", "step", "--rounds", "0")
    assert process.returncode == 2
    assert process.stderr == "error: --rounds 0: give a whole number, 1 or more\n"

"""One global batch: however it is spread over processes and micro-batches, every study trains the same weights.

Each case trains for 50 steps and more with all that could tell a part of the batch from the whole of it. `one` process
with the whole batch is what the others are measured against. They compute in fp64: in fp32, training amplifies rounding
to 5e-4 of depth's positions and of KL's weights, and how much depends on the processor. VQ's nearest codes are searched
in fp32: tests/diffusion/test_vqgan.py has it, for a few steps, and the adversary of both.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forked import run
from recording import STOP, seen

from common.training.checkpoints import read
from common.training.requeue import STOPPED

VIT = ["--model.patch_size", "2", "--model.width", "16", "--model.depth", "2", "--model.heads", "2"]
CLASSIFIER = [*VIT, "--model.drop_path", "0.2", "--model.mixup", "0.8", "--model.cutmix", "1.0",
              "--model.label_smoothing", "0.1", "--data.augment.flip", "0.5", "--data.augment.crop_scale",
              "[0.5,1.0]"]  # fmt: skip
COMMON = ["--run_name", "run", "--model.optim.ema", "0.9", "--model.optim.warmup_epochs", "1", "--trainer.accelerator",
          "cpu", "--trainer.precision", "64-true", "--trainer.log_every_n_steps", "1",
          "--trainer.callbacks+=recording.Recorder"]  # fmt: skip


class Case(NamedTuple):
    """A study's config with the options that make it small; 9 steps of 128 images an epoch where not said otherwise."""

    config: str
    options: list[str]
    epochs: int = 6


CASES = {
    "classification": Case("supervised/configs/digits.yaml", CLASSIFIER),
    "permuted": Case("locality_ablation/configs/digits.yaml", [*CLASSIFIER, "--model.permutation.share", "1.0"]),
    "mae": Case("mae/configs/digits.yaml",
                [*VIT, "--data.augment.crop_scale", "[0.3,1.0]", "--data.augment.flip", "0.5"]),
    "probe": Case("mae/configs/digits_probe.yaml", [*VIT, "--model.mixup", "0.8"]),
    "depth": Case(  # 4 steps an epoch; the variance is in the loss from step 10 on
        "supervised/configs/rooms.yaml",
        [*VIT, "--data.source.train", "64", "--data.source.val", "20", "--model.sig_warmup", "10",
         "--model.drop_path", "0.2"], epochs=13,
    ),
    "dit": Case(
        "diffusion/configs/digits.yaml",
        [*VIT, "--data.autoencoder", "null", "--data.image_size", "8", "--data.augment.interpolation", "bilinear",
         "--data.augment.flip", "0.5"],
    ),
    "kl": Case("diffusion/configs/autoencoder_digits.yaml",
               ["--model.kind", "kl", "--model.base", "8", "--model.groups", "4", "--model.adversary.weight", "0",
                "--data.batch_size", "128", "--data.augment.flip", "0.5"]),
}  # fmt: skip


def fit(case: str, folder: Path, *more: object, devices: int = 1, stop: int | None = None) -> tuple[int, Path]:
    """Trains in a process of its own on each device, as far as `stop`; the exit code, and the run folder."""
    config, options, epochs = CASES[case]
    study = config.split("/")[0]
    words = ["fit", "--config", config, "--runs", folder, *COMMON, *options, "--trainer.max_epochs", epochs,
             "--trainer.check_val_every_n_epoch", epochs // 2, "--trainer.devices", devices, *more]  # fmt: skip
    words += ["--model.picture_epochs", "0"] * (study in ("mae", "diffusion") and case != "probe")
    done = run(study, *words, variables={} if stop is None else {STOP: str(stop)}, ranks=devices)
    assert done.returncode in (0, STOPPED), done.stderr
    return done.returncode, folder / study / "run"


def assert_alike(ours: Path, theirs: Path, scalars: Callable) -> None:
    """Weights, average and moments as fp64 rounds them; curves as TensorBoard and the metrics do, to fp32.

    Adam's steps are those of any multiple of the gradients: that they are not multiplied, their norm and moments tell.
    """
    one, other = (read(folder / "checkpoints" / "last.ckpt") for folder in (theirs, ours))
    curves, others = scalars(theirs), scalars(ours)
    assert one["global_step"] == other["global_step"] >= 50
    for part in (lambda c: c["state_dict"], lambda c: c["ema"]["state_dict"]):
        assert part(one).keys() == part(other).keys()
        for name, value in part(one).items():
            assert value.dtype == torch.float64 or not value.is_floating_point()
            torch.testing.assert_close(part(other)[name], value, rtol=0, atol=1e-9, msg=name)
    assert one["ema"]["updates"] == other["ema"]["updates"] == one["global_step"]
    (ours,), (theirs,) = other["optimizer_states"], one["optimizer_states"]
    for number, moments in theirs["state"].items():
        for name, value in moments.items():
            apart = (ours["state"][number][name] - value).abs().max()
            assert apart <= 1e-9 * value.abs().max(), f"{name} of parameter {number}"
    compared = [tag for tag in curves if tag in ("train/loss", "train/grad_norm") or tag.startswith("val/")]
    assert len(curves["train/loss"]) >= 50 and max(len(curves[tag]) for tag in compared if tag.startswith("val/")) >= 3
    for tag in compared:
        assert [step for step, _ in others[tag]] == [step for step, _ in curves[tag]]
        values = [value for _, value in curves[tag]]
        assert [value for _, value in others[tag]] == pytest.approx(values, rel=1e-6, nan_ok=True), tag  # HPARAMS' NaN


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of one process with the whole batch at once, made when it is first asked for."""

    @functools.cache
    def made(case: str) -> Path:
        return fit(case, tmp_path_factory.mktemp(case), *source(case))[1]

    def source(case: str) -> list[object]:
        return ["--init_from", made("mae")] if case == "probe" else []

    made.source = source
    return made


SLOW = ("permuted", "dit", "kl", "probe")
EACH = [pytest.param(case, marks=[pytest.mark.soak] * (case in SLOW)) for case in CASES]


@pytest.mark.parametrize("case", EACH)
def test_two_processes_with_half_the_batch_train_as_one(
    whole: Callable, tmp_path: Path, scalars: Callable, case: str
) -> None:
    _, two = fit(case, tmp_path, *whole.source(case), devices=2)
    assert seen(two) == seen(whole(case))
    assert len(list(two.glob("seen-by-rank*"))) == 2
    assert_alike(two, whole(case), scalars)


@pytest.mark.parametrize("case", [each for each in EACH if each.values[0] not in ("depth", "probe")])
def test_micro_batches_train_as_the_whole(whole: Callable, tmp_path: Path, scalars: Callable, case: str) -> None:
    """Losses over the whole batch, of depth and of a probe's batch norm, refuse to be divided (tests/data)."""
    _, micro = fit(case, tmp_path, "--data.batch_per_device", 32)
    assert seen(micro) == seen(whole(case))
    assert_alike(micro, whole(case), scalars)


@pytest.mark.parametrize("first, then", [
    ({"devices": 1}, {"devices": 2}), ({"devices": 2}, {"devices": 1}),
    pytest.param({"devices": 1, "micro": 32}, {"devices": 2, "micro": 32}, marks=pytest.mark.soak),  # 4 a step, then 2
])  # fmt: skip
def test_a_run_goes_on_with_other_devices(
    whole: Callable, tmp_path: Path, scalars: Callable, first: dict[str, int], then: dict[str, int]
) -> None:
    """In the middle of its second epoch; every image is seen once, in the step and at the place that it had."""
    for start, stop in ((first, 12), (then, None)):
        micro = ["--data.batch_per_device", start["micro"]] if "micro" in start else []
        code, run = fit("classification", tmp_path, *micro, devices=start["devices"], stop=stop)
        assert code == (0 if stop is None else STOPPED)
        if stop:
            assert 12 < read(run / "checkpoints" / "last.ckpt")["global_step"] < 18
    assert seen(run) == seen(whole("classification"))
    assert_alike(run, whole("classification"), scalars)

"""What the suite's Trainer, as the command line sets it up, adds to a step: of a model that does nothing, of ViT-T."""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection

from common.benchmark.interleaving import differences, interleaved, ratios
from common.data.loader import Draw, GlobalBatchData
from common.training.cli import StudyCLI
from common.training.module import Cost, Experiment

BATCH = 128  # the demo's
PATCH, SIDE, VIT_BATCH = 2, 32, 1  # of ViT-T: more images would hide more
VIT_STEPS = 50  # of which one is logged, as by default; that one costs more than the others
CLOCK = f"--trainer.callbacks={__name__}.Clock"
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
MEMORY, LOADER, TRAINER = ("plain, batches in memory", "plain, batches from the suite's loader",
                           "Trainer, as the command line sets it up")
COLUMNS = ("model", "loop", "ms per step", "ms more than the plain loop (quartiles)",
           "times the plain loop (quartiles)")  # fmt: skip


class NullModel(nn.Module):
    """One parameter, and a loss (scalar) that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return (self.weight * images).mean()

    def no_weight_decay(self) -> set[str]:
        return set()


class Clock(L.Callback):
    """Leaves the seconds per step of a training with its module, as `seconds`."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        # From the end of the first step, in which Lightning sets itself up: whole steps, with all callbacks.
        if i == 0:
            self._start = time.perf_counter()
        else:
            module.seconds = (time.perf_counter() - self._start) / i


class NullExperiment(Experiment):
    """Trains the null model."""

    def build(self, data: GlobalBatchData) -> NullModel:
        return NullModel()

    def cost(self, net: nn.Module) -> Cost:
        return Cost(tokens=1, parameters=1, forward_flops=1, training_flops=3, activation_bytes=4)

    def metrics(self, data: GlobalBatchData) -> MetricCollection:
        return MetricCollection({})

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.net(batch["image"])


class NullImages(Dataset):
    """The same batch again and again."""

    def __init__(self, images: int) -> None:
        self.images, self.batch = images, {"image": torch.zeros(BATCH, 1)}

    def __len__(self) -> int:
        return self.images

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        return self.batch


class NullData(GlobalBatchData):
    """As many batches as there are steps.

    Args:
        steps: of the one epoch.
    """

    dataset, image_size, channels = "nothing", (1, 1), 1

    def __init__(self, steps: int) -> None:
        super().__init__(BATCH)
        self.steps = steps

    def load(self, split: str) -> NullImages:
        return NullImages(self.steps * BATCH)


def fit(study: str, runs: str | Path, name: str, *options: str) -> StudyCLI:
    """`fit` of a study with these options for one epoch on the CPU, without validation, into a run of that name."""
    with redirect_stdout(io.StringIO()):  # its recipe is nobody's
        return StudyCLI(study, [
            "fit", *options, "--runs", str(runs), "--run_name", name,
            "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0",
        ])  # fmt: skip


def fitted(steps: int) -> StudyCLI:
    """`fit` of the null model for one epoch, in a run folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as runs:
        return fit("common.benchmark", runs, "nothing", f"--model={__name__}.NullExperiment", "--model.optim.lr=1e-3",
                   f"--data={__name__}.NullData", f"--data.steps={steps}", CLOCK)


def fitted_vit() -> StudyCLI:
    """`fit` of the first study's ViT-T in fp32, likewise, on rendered pictures; the last step is logged."""
    with tempfile.TemporaryDirectory() as runs:
        return fit("supervised", runs, "vit", "--model=supervised.Classification", "--model.size=tiny",
                   f"--model.patch_size={PATCH}", "--model.optim.lr=1e-3", "--data=common.data.ImageData",
                   "--data.source=common.data.Shapes", f"--data.source.size={SIDE}",
                   f"--data.source.train={VIT_BATCH * VIT_STEPS}", f"--data.image_size={SIDE}",
                   f"--data.batch_size={VIT_BATCH}", f"--trainer.log_every_n_steps={VIT_STEPS}", CLOCK)  # fmt: skip


def plain_loop(module: Experiment, batches: Iterable[dict[str, Tensor]]) -> float:
    """Seconds per step of the same net, loss, optimiser and schedule in the loop that one would write by hand."""
    [optimizer], [schedule] = module.configure_optimizers()
    with without_lightning():
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            module.training_step(batch, step).backward()
            optimizer.step()
            schedule["scheduler"].step()
            if step == 0:
                start = time.perf_counter()
        return (time.perf_counter() - start) / step


@contextmanager
def without_lightning() -> Iterator[None]:
    """Undoes a setting that `import lightning` makes, and that a loop without it would not pay for.

    AdamW asks in every step whether there is a GPU; by way of NVML, where there is none, that takes 0.06 ms.
    """
    setting = os.environ.pop(NVML_CHECK, None)
    try:
        yield
    finally:
        if setting is not None:
            os.environ[NVML_CHECK] = setting


def measure(steps: int, rounds: int) -> list[tuple[str, ...]]:
    """The rows of the table, of the null model in so many steps, and of ViT-T; a round is a whole run of the Trainer
    and of each plain loop.
    """
    null, vit = fitted(steps), fitted_vit()  # imports and first calls are over before the clock runs
    loader = null.datamodule.train_dataloader()
    batches, noise = list(loader), [vit.datamodule.random_batch(VIT_BATCH)] * VIT_STEPS
    of_null = interleaved({
        MEMORY: lambda: plain_loop(null.model, batches),
        LOADER: lambda: plain_loop(null.model, loader),
        TRAINER: lambda: fitted(steps).model.seconds,
    }, rounds)  # fmt: skip
    of_vit = interleaved({
        MEMORY: lambda: plain_loop(vit.model, noise),
        TRAINER: lambda: fitted_vit().model.seconds,
    }, rounds)  # fmt: skip
    return [*_rows(f"null model, {steps} steps", of_null),
            *_rows(f"tiny/{PATCH} at {SIDE}x{SIDE}, batch {VIT_BATCH}, {VIT_STEPS} steps", of_vit)]


def _rows(model: str, times: dict[str, list[float]]) -> Iterator[tuple[str, ...]]:
    rows = {loop: [1e3 * seconds for seconds in values] for loop, values in times.items()}
    plain = rows[MEMORY]
    for loop, values in rows.items():
        compared = ("", "") if loop == MEMORY else (f"{differences(values, plain):.3f}", f"{ratios(plain, values):.3f}")
        yield (model, loop, f"{statistics.median(values):.3f}", *compared)

"""What the suite's Trainer, as the command line sets it up, adds to a step of a model that does nothing."""

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

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection

from common.benchmark.interleaving import differences, interleaved
from common.data.loader import Draw, GlobalBatchData
from common.training.cli import StudyCLI
from common.training.module import Cost, Experiment

BATCH = 128  # the demo's
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
COLUMNS = ("loop", "ms per step", "more than the plain loop (quartiles)")


class NullModel(nn.Module):
    """One parameter, and a loss (scalar) that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return (self.weight * images).mean()

    def no_weight_decay(self) -> set[str]:
        return set()


class Timed(Experiment):
    """Measures the seconds per step of its own training."""

    seconds = 0.0

    def on_train_batch_end(self, out: Any, batch: Any, i: int) -> None:
        # The first step is left out: Lightning sets itself up in it. All callbacks have run when this is called.
        if i == 0:
            self._start = time.perf_counter()
        else:
            self.seconds = (time.perf_counter() - self._start) / i


class NullExperiment(Timed):
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
    here = "common.benchmark.trainer_cost"
    with tempfile.TemporaryDirectory() as runs:
        return fit("common.benchmark", runs, "nothing", f"--model={here}.NullExperiment", "--model.optim.lr=1e-3",
                   f"--data={here}.NullData", f"--data.steps={steps}")


def plain_loop(module: NullExperiment, batches: Iterable[dict[str, Tensor]]) -> float:
    """Seconds per step of the same optimiser and schedule in the loop that one would write by hand."""
    [optimizer], [schedule] = module.configure_optimizers()
    with without_lightning():
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            module.net(batch["image"]).backward()
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
    """The rows of the table; a round is a whole run of the Trainer and of both plain loops."""
    cli = fitted(steps)  # imports and first calls are over before the clock runs
    loader = cli.datamodule.train_dataloader()
    batches = list(loader)
    times = interleaved({
        "plain, batches in memory": lambda: plain_loop(cli.model, batches),
        "plain, batches from the suite's loader": lambda: plain_loop(cli.model, loader),
        "Trainer, as the command line sets it up": lambda: fitted(steps).model.seconds,
    }, rounds)  # fmt: skip
    rows = {name: [1e3 * seconds for seconds in values] for name, values in times.items()}
    plain, *others = rows
    return [(plain, f"{statistics.median(rows[plain]):.3f}", ""), *(
        (name, f"{statistics.median(rows[name]):.3f}", f"{differences(rows[name], rows[plain]):.3f}") for name in others
    )]

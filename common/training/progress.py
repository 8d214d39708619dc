"""The progress line: epoch, loss, images per second, time left; of an evaluation, batches and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from common.training.curves import Curves

LINES = 25  # of a run, at the most, where the output is a file
SECONDS = 10  # between two lines of an evaluation there


def within_batch_of(trainer: L.Trainer) -> Callable[[float], None]:
    """What to call with the share that is done of a batch of an evaluation, where one may take hours."""
    return next((partial(callback.within_batch, trainer) for callback in trainer.callbacks
                 if isinstance(callback, Progress)), lambda share: None)  # fmt: skip


class Progress(L.Callback):
    """One bar over all steps of the run on a terminal; a line every few epochs where the output is a file.

    Args:
        curves: whose last loss and speed are shown, so that the bar never waits for the device.
    """

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self._bar: Bar | None = None
        self._shown = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._total = trainer.datamodule.steps_per_epoch * trainer.max_epochs
        self._start, self._first_step = time.perf_counter(), trainer.global_step
        self._open_bar(trainer, "training", self._total, trainer.global_step)

    def _open_bar(self, trainer: L.Trainer, title: str, total: int, done: int = 0) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=done)
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        now = time.perf_counter()
        if self._bar and now - self._shown > 0.2:
            self._shown = now
            self._bar.update(self._task, completed=trainer.global_step, description=self._line(trainer, module))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, description=self._line(trainer, module))
        elif trainer.is_global_zero and self._due(trainer):
            done = trainer.global_step - self._first_step
            left = (time.perf_counter() - self._start) / max(done, 1) * (self._total - trainer.global_step)
            print(f"{self._line(trainer, module)} · {left:.0f} s left", file=sys.stderr, flush=True)

    def _due(self, trainer: L.Trainer) -> bool:
        epoch, every = trainer.current_epoch + 1, -(-trainer.max_epochs // LINES)
        return epoch % every == 0 or epoch == trainer.max_epochs

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    # Evaluation and prediction apart from a training, whose batches may take minutes

    def _begin(self, trainer: L.Trainer, batches: list[int | float]) -> None:
        self._total, self._start, self._shown = sum(batches), time.perf_counter(), time.perf_counter()
        self._done = 0
        self._open_bar(trainer, trainer.state.fn.value, self._total)

    def within_batch(self, trainer: L.Trainer, share: float) -> None:
        self._show(trainer, self._done + share)

    def _advance(self, trainer: L.Trainer, done: int) -> None:
        self._done = done
        self._show(trainer, done)

    def _show(self, trainer: L.Trainer, done: float) -> None:
        now = time.perf_counter()
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif trainer.is_global_zero and now - self._shown > SECONDS:
            self._shown = now
            left = (now - self._start) / done * (self._total - done)
            print(f"{trainer.state.fn.value}: batch {round(done, 2):g}/{self._total} · {left:.0f} s left",
                  file=sys.stderr, flush=True)

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin(trainer, trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: L.Trainer, module: L.LightningModule, o: Any, b: Any, i: int) -> None:
        self._advance(trainer, i + 1)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin(trainer, trainer.num_test_batches)

    def on_test_batch_end(self, trainer: L.Trainer, module: L.LightningModule, o: Any, b: Any, i: int) -> None:
        self._advance(trainer, i + 1)

    def on_test_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_end(trainer, module)

    on_predict_epoch_end = on_test_epoch_end

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def _line(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        parts = [f"epoch {min(trainer.current_epoch + 1, trainer.max_epochs)}/{trainer.max_epochs}"]
        values = self.curves.values
        if values:
            parts += [f"loss {values['train/loss']:.4f}", f"{values['train/images_per_second']:,.0f} images/s"]
        score = trainer.callback_metrics.get(f"val/{module.headline}")
        if score is not None:
            parts.append(f"val/{module.headline} {score:.2f}")
        return " · ".join(parts)


@contextmanager
def told(name: str, images: int) -> Iterator[Callable[[int], None]]:
    """Says on standard error how many of the `images` are done, and how long the others will take.

    The line stays in its place on a terminal; elsewhere there is a new one now and then, as in every evaluation.

    Yields:
        What is to be called with the number of images that were done since.
    """
    start = shown = time.perf_counter()
    done = 0
    bar = Bar(TextColumn("{task.description}", markup=False), console=Console(stderr=True), transient=True,
              disable=not sys.stderr.isatty())
    task = bar.add_task(f"{name}: 0 of {images} images")

    def tell(more: int) -> None:
        nonlocal done, shown
        done, now = done + more, time.perf_counter()
        line = f"{name}: {done} of {images} images · {(now - start) / done * (images - done):.0f} s left"
        bar.update(task, description=line)
        if bar.disable and now - shown > SECONDS:
            shown = now
            print(line, file=sys.stderr, flush=True)

    with bar:
        yield tell

"""TensorBoard's event file of a run, and what its x axis counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger


class Events(TensorBoardLogger):
    """Writes at optimiser steps; or at the images that they have seen, where it is told of how many a step is.

    Args:
        folder: of the run.
        batch: the images of a step. Asked as late as can be, for they are known when the data are set up.
        steps: done by the checkpoint that a run goes on from. What an earlier start logged after it, and was killed, is
            dropped from the curves. None drops nothing.
    """

    def __init__(self, folder: Path, batch: Callable[[], int] | None = None, steps: int | None = None) -> None:
        super().__init__(str(folder.parent), name="", version=folder.name, default_hp_metric=False)
        self._batch, self._steps = batch, steps

    @property
    def experiment(self) -> Any:
        """The SummaryWriter; no attribute (as Lightning asks, before it sets the data up) while `batch` has none."""
        batch = self._batch() if self._batch else 1
        if self._steps is not None:
            self._kwargs["purge_step"] = self._steps * batch + 1
        writer = super().experiment
        return _AtImages(writer, batch) if self._batch else writer


class _AtImages:
    """A SummaryWriter that puts all that it is given at images seen, of its optimiser step."""

    def __init__(self, writer: Any, batch: int) -> None:
        self._writer, self._batch = writer, batch

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._writer, name)
        if not name.startswith("add_"):
            return method

        def add(*args: Any, **kwargs: Any) -> None:
            call = inspect.signature(method).bind(*args, **kwargs)
            if call.arguments.get("global_step") is not None:
                call.arguments["global_step"] *= self._batch
            method(*call.args, **call.kwargs)

        return add

"""TensorBoard's event file of a run, and what its x axis counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from common.data.loader import GlobalBatchData


class Events(TensorBoardLogger):
    """Writes at optimiser steps; or at the images that they have seen, where it is given the data.

    Args:
        folder: of the run.
        data: whose global batch a step sees, known when the data are set up.
        steps: done by the checkpoint that a run goes on from. What an earlier start logged after it, and was killed, is
            dropped from the curves. None drops nothing.
    """

    def __init__(self, folder: Path, data: GlobalBatchData | None = None, steps: int | None = None) -> None:
        super().__init__(str(folder.parent), name="", version=folder.name, default_hp_metric=False)
        self._data, self._steps = data, steps

    def x(self, step: int) -> int:
        """Where on the axis a step lies."""
        return step * self._data.global_batch if self._data and step else step

    @property
    def experiment(self) -> Any:
        if self._steps is not None:
            self._kwargs["purge_step"] = self.x(self._steps) + 1
        return super().experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else self.x(step))

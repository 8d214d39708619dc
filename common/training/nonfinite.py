"""Steps whose gradient is not finite are left out, and counted."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from common.training.curves import grad_norm

MOST = 10  # in a row; more of them are no accident


class SkipNonFinite(L.Callback):
    """Takes the gradients away from an optimiser's step in which one is NaN or infinite.

    Weights, moments and their counts stay as they are; the schedule goes on, and the step counts as done. All ranks
    decide alike, since their gradients are the same. Costs that every step waits for the device.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        norm = float(grad_norm(module))
        if norm < float("inf"):  # NaN is not
            self._in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)
        step = trainer.global_step + 1
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        rank_zero_warn(f"step {step} is left out, for its gradient's norm is {norm} ({self.skipped} so far)")
        if trainer.logger:
            trainer.logger.log_metrics({"train/skipped_steps": self.skipped}, step=step)
        if self._in_a_row == MOST:
            raise FloatingPointError(f"the gradients of {MOST} steps in a row, up to step {step}, were not finite; the "
                                     "last checkpoint is kept. Try a lower model.optim.lr or a longer warm-up")

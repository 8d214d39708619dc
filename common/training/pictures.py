"""Pictures of a validation, at a fixed cadence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Pictures(L.Callback):
    """Draws what the validation of a training kept: to TensorBoard as val/NAME, and to figures/NAME.png.

    Args:
        name: of the picture.
        every: epochs between two pictures; there is one after the last epoch too. 0 draws none.
    """

    def __init__(self, name: str, every: int) -> None:
        self.name, self.every = name, every

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        due = self.every and (epoch % self.every == 0 or epoch == trainer.max_epochs)
        if not due or trainer.state.fn != "fit" or not trainer.is_global_zero or trainer.sanity_checking:
            return
        from PIL import Image

        picture = pixels(module.draw(f"{module.pictured} after epoch {epoch}"))  # once: a second costs as much again
        folder = Path(trainer.default_root_dir) / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{self.name}.png")
        if trainer.logger is not None:
            trainer.logger.experiment.add_image(f"val/{self.name}", picture, trainer.global_step, dataformats="HWC")


def pixels(figure: Figure) -> np.ndarray:
    """A figure as (H, W, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]

"""What a training under test is told by `--trainer.callbacks+=recording.Recorder`, in whatever process it runs."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L

STOP = "STOP_IN_STEP"  # the environment's: no part of the config, which must stay the same when a run goes on


class Recorder(L.Callback):
    """Writes which images every step trains on, and has the first rank told to leave in a chosen step."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, i: int) -> None:
        step = trainer.global_step
        with open(Path(trainer.default_root_dir) / f"seen-by-rank{trainer.global_rank}", "a") as file:
            for place, index in zip(batch["place"].tolist(), batch["index"].tolist(), strict=True):
                file.write(f"{step} {place} {index}\n")
        if step == int(os.environ.get(STOP, -1)) and trainer.is_global_zero:
            signal.raise_signal(signal.SIGUSR1)


def seen(folder: Path) -> list[tuple[int, ...]]:
    """(step, place in the global batch, index in the data set) of all ranks and starts of a run, sorted."""
    lines = [line for path in folder.glob("seen-by-rank*") for line in path.read_text().splitlines()]
    return sorted(tuple(map(int, line.split())) for line in lines)

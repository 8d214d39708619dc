"""Writing checkpoints so that no kill costs more than the steps since the last one, and finding them again."""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.tensor import DTensor

from common.errors import InputError
from common.files import whole
from common.training.curves import Curves

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, syncs to the disk, then renames; the old `last.ckpt` stays as `previous.ckpt`.

    Args:
        check: called before a file takes its name; raises where that must not be.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)

        def make_way() -> None:
            self.check()
            if path.exists():
                os.replace(path, path.with_name(PREVIOUS))

        try:
            with whole(path, make_way) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer tells the second for the first
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            raise OSError(f"{path} could not be written ({first}); what was saved before is intact. Make room, and the "
                          "same command goes on") from error


class Checkpoints(Checkpoint):
    """`last.ckpt` within and at the end of epochs, `best.ckpt` by the headline metric, and milestones.

    No checkpoint is written after an epoch's last batch before its validation: that one follows the validation, since
    Lightning would validate twice, or skip it, when it goes on from in between.

    Args:
        every_n_steps: optimiser steps between two checkpoints within an epoch.
        every_n_epochs: epochs between two checkpoints at the end of an epoch; the last epoch's is always written.
        milestones: epochs done whose checkpoint is kept as `epoch=N.ckpt`.
    """

    def __init__(self, every_n_steps: int = 1000, every_n_epochs: int = 1, milestones: list[int] | None = None) -> None:
        for name, value in [("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)]:
            if value < 1:
                raise InputError(f"checkpoint.{name}: {value} is not a positive number")
        self.every_n_steps, self.every_n_epochs, self.milestones = every_n_steps, every_n_epochs, milestones or []
        self.best: float | None = None
        self._saved: int | None = None  # the step of `last.ckpt`, of this start

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        stepped = (i + 1) % trainer.accumulate_grad_batches == 0
        last_of_epoch = i + 1 == trainer.num_training_batches
        if stepped and not last_of_epoch and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, module)
        if last_of_epoch and trainer.current_epoch + 1 == trainer.max_epochs and trainer.check_val_every_n_epoch:
            trainer.check_val_every_n_epoch = 1  # a run's results are those of its last epoch

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        better = self._improved(trainer, module)
        if better or epochs % self.every_n_epochs == 0 or epochs in (trainer.max_epochs, *self.milestones):
            self.save(trainer, module)
            for name in [BEST] * better + [f"epoch={epochs}.ckpt"] * (epochs in self.milestones):
                if trainer.is_global_zero:
                    trainer.strategy.checkpoint_io.check()  # the folder may be another's since it was saved
                    link(folder_of(trainer) / LAST, folder_of(trainer) / name)

    def _improved(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        every = trainer.check_val_every_n_epoch
        validated = every and (trainer.current_epoch + 1) % every == 0
        value = trainer.callback_metrics.get(f"val/{module.headline}") if validated else None
        if value is None or not value.isfinite():
            return False
        value = float(value)
        if self.best is None or (value > self.best if module.higher_is_better else value < self.best):
            self.best = value
            return True
        return False

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Writes `last.ckpt`, unless it is this step's already."""
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        curves = next((callback for callback in trainer.callbacks if isinstance(callback, Curves)), None)
        if curves:
            curves.settle(trainer)
        # The curves look at the loss now and then; a checkpoint must never replace a sound one by one that diverged.
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
        if not trainer.strategy.reduce_boolean_decision(all(part.isfinite().all() for part in parts), all=True):
            first = curves and curves.refuse_nonfinite and curves.first_nonfinite(trainer)
            since = f"train/loss is not finite since step {first}, and " if first else ""
            raise FloatingPointError(f"{since}weights are not finite at step {trainer.global_step}; the last "
                                     "checkpoint is kept. Try a lower model.optim.lr, a longer warm-up, or --nonfinite "
                                     "skip")
        if trainer.is_global_zero:
            trainer.logger.experiment.flush()  # the curves up to this step must survive with it
        trainer.save_checkpoint(folder_of(trainer) / LAST, weights_only=False)


def folder_of(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def link(source: Path, target: Path) -> None:
    """The same content under another name, whole or not there."""
    if target.exists() and source.samefile(target):
        return  # to rename one name of a file to another of its names would leave both
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)  # no second copy on the disk
    except OSError:
        try:
            shutil.copyfile(source, temporary)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise
    os.replace(temporary, target)


def newest_readable(folder: Path) -> Path | None:
    """The newest checkpoint of `folder` that can be read; None where there is none at all.

    Raises:
        InputError: there are checkpoints and none can be read. Never a silent fresh start.
    """
    candidates = [folder / LAST, folder / PREVIOUS]
    candidates += sorted(set(folder.glob("*.ckpt")) - set(candidates), key=lambda p: p.stat().st_mtime, reverse=True)
    candidates = [path for path in candidates if path.exists()]
    for path in candidates:
        reason = damage(path)
        if reason is None:
            return path
        rank_zero_warn(f"{path} cannot be read ({reason}); falling back to the checkpoint before it")
    if candidates:
        raise InputError(f"{folder}: no checkpoint of {len(candidates)} can be read; restore one, "
                         "or start anew with --overwrite")
    return None


def damage(path: Path) -> str | None:
    """Why a checkpoint of the suite cannot be used, or None."""
    try:
        checkpoint = read(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    missing = {"state_dict", "loops", "optimizer_states", "accumulation"} - checkpoint.keys()
    if missing:
        return f"not a checkpoint of this suite: it lacks {', '.join(sorted(missing))}"
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not compare them when it reads
            broken = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError) as error:  # a damaged header, an unknown compression in it
        return str(error)
    return f"the checksum of {broken} differs" if broken else None


def read(path: Path) -> dict[str, Any]:
    """A dict of tensors and plain values from a file of torch.save.

    Raises:
        InputError: missing, empty, truncated, of another format, or holding more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and others keep their options beside weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch's reader meets damage with nearly any of them, KeyError and struct.error too
        raise InputError(f"{path}: truncated, or not a checkpoint of tensors and plain values alone "
                         f"({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return content

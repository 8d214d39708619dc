"""Lightning's Trainer with the run's seed and one more stage, `check`, and without what the suite does otherwise."""

from __future__ import annotations

import inspect
from datetime import timedelta

import lightning as L
import torch
from jsonargparse import Namespace

from common.data.loader import GlobalBatchData
from common.errors import InputError
from common.training.module import Experiment
from common.training.recipe import effective_recipe, print_recipe

# Options that the suite answers itself, and what to give instead.
OVERRULED = {
    "accumulate_grad_batches": "micro-batches follow from data.batch_size and data.batch_per_device",
    "fast_dev_run": "it would leave a finished run; give trainer.max_epochs and trainer.limit_train_batches",
    "max_time": "what is left would never be trained, since Lightning counts all starts together; a signal ends a "
                "start with all saved, as by `timeout --signal USR1 8h python -m ...`, and the same command goes on",
    "default_root_dir": "--runs and --run_name say where a run lies",
    "logger": "a run folder holds TensorBoard's events",
    "plugins": "the suite has its own, for checkpoints and Slurm",
}


class Trainer(L.Trainer):
    # All randomness is a function of it (see common.randomness); the command line sets it from `seed_everything`.
    seed: int = 0

    def take_over(self, seed: int, hang_timeout: float) -> None:
        """Gives it the run's seed, and has it leave signals, collectives' patience and checkpoints to the suite.

        Args:
            hang_timeout: seconds after which the watchdog ends a rank that waits; 0 never.
        """
        self.seed = seed
        # Its handlers save, and wait for other ranks, in mid-step; ours only note what came.
        self._signal_connector.register_signal_handlers = lambda: None
        # With several ranks it asks in every micro-batch for a signal that so never comes, and waits for the device.
        self.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if hasattr(self.strategy, "_timeout"):  # of collectives; the watchdog is to be first, and says where
            self.strategy._timeout = timedelta(seconds=2 * hang_timeout or 10**7)
        # The checkpoint that was found and no other: inside Slurm Lightning would take any hpc_ckpt_*.ckpt about.
        self._checkpoint_connector._parse_ckpt_path = lambda _, path, **__: path

    @property
    def finished(self) -> bool:
        """Whether all epochs are done: a callback of the user's may have ended the training before."""
        return self.current_epoch >= self.max_epochs

    def check(self, model: Experiment, datamodule: GlobalBatchData) -> None:
        """Looks at the data and prints the effective recipe with its cost; trains nothing."""
        model.trainer = datamodule.trainer = self
        self.datamodule = datamodule
        self.strategy.connect(model)
        for line in datamodule.describe():
            print(line)
        datamodule.setup("fit")
        with torch.device("meta"):  # shapes alone: a Large model is checked in no memory
            model.net = model.built(datamodule)
        print_recipe(effective_recipe(self, model, datamodule))


def refuse_options(given: Namespace) -> None:
    """Raises an InputError for an option of the Trainer, of those `given`, that a training here cannot obey."""
    for name, instead in OVERRULED.items():
        if getattr(given, name) not in (None, False, 0, inspect.signature(L.Trainer).parameters[name].default):
            raise InputError(f"trainer.{name}: {getattr(given, name)} is not used; {instead}")
    if str(given.precision) in ("16", "16-mixed", "16-true"):
        raise InputError(f"trainer.precision: {given.precision} is not used: fp16 needs a loss scaler, under which "
                         "gradients cannot be watched, and loses small ones without; take bf16-mixed, or 32-true on a "
                         "GPU without bf16")
    if (every := given.log_every_n_steps) is not None and every < 1:
        raise InputError(f"trainer.log_every_n_steps: {every} is not a positive number of steps")
    if (every := given.check_val_every_n_epoch) is not None and every < 1:
        raise InputError(f"trainer.check_val_every_n_epoch: {every} is not a positive number of epochs; for none give "
                         "trainer.limit_val_batches 0")
    if given.max_steps not in (-1, None):
        raise InputError(f"trainer.max_steps: {given.max_steps} is not used, since Lightning does not resume it "
                         "exactly; give the length of the run as trainer.max_epochs")
    if given.max_epochs is None or given.max_epochs < 1:
        raise InputError(f"trainer.max_epochs: {given.max_epochs}; give the length of the run in epochs, 1 or more")

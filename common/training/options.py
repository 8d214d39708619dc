"""The options of the command line that are neither the model's nor the data's nor the Trainer's."""

from typing import Literal

OPTIONS = {
    "run_name": (str | None, None, "folder of the run below runs/STUDY; default: made from the config and overrides"),
    "runs": (str, "runs", "folder of all runs"),
    "overwrite": (bool, False, "discard what an earlier run left in the folder"),
    "init_from": (str | None, None, "start from the weights of a run folder, a checkpoint or a timm state dict"),
    "continue_from": (str | None, None, "train a finished run on, in a new folder, to a larger trainer.max_epochs"),
    "copy_of": (str | None, None, "instead of training, copy a finished run, to be tested by other model.predict or "
                "model.evaluation options than its own"),
    "nonfinite": (Literal["stop", "skip"], "stop", "what follows a loss or gradient that is not finite: stop, and keep "
                  "the last checkpoint; or leave out the optimiser's step, and count it as train/skipped_steps"),
    "x_axis": (Literal["step", "images"], "step", "what the curves are over: optimiser steps, or images seen, by which "
               "runs of different batches compare"),
    "compile": (bool | None, None, "compile the Transformer's blocks, which takes a minute at the start and agrees to "
                "rounding; default: on a GPU alone"),
    "requeue_signal": (str, "SIGUSR1", "signal (and SIGTERM) after which a run saves and asks Slurm to start it again"),
    "hang_timeout": (float, 1800.0, "seconds without a batch, or a solver's step of sampling, after which a rank "
                     "writes its stacks and ends; 0: never"),
    "extends": (str | None, None, "in a config file: the file beside it whose values it starts from"),
}

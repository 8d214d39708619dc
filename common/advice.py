"""Lightning's advice."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silences what does not apply here; every other warning is shown."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*`srun` command is available.*",  # where Slurm is installed, a run outside it is no mistake
        ".*does not have many workers.*",  # resident data need none
        ".*dataloader is not resumable.*",  # the order reads its position from the restored progress
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Found .* module.* in eval mode at the start of training.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*sync_dist=True.*",  # torchmetrics has reduced them
        ".*custom batch sampler.*for prediction.*",  # which leaves out nothing, as Lightning's own would
        ".*predict returned None.*",  # predictions are written, not returned
    ):
        warnings.filterwarnings("ignore", message)

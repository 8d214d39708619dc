"""Lightning's Trainer with the run's seed and one more stage, `check`."""

from __future__ import annotations

import lightning as L
import torch

from common.data.loader import GlobalBatchData
from common.training.module import Experiment
from common.training.recipe import effective_recipe, print_recipe


class Trainer(L.Trainer):
    # All randomness is a function of it (see common.randomness); the command line sets it from `seed_everything`.
    seed: int = 0

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

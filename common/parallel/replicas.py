"""Data parallelism: the whole model on every device, each with its part of the global batch."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy


class ReplicasStrategy(DDPStrategy):
    """DDP whose gradients live in the buckets that are reduced, which saves a copy of them.

    The graph is declared static where it is: DDP then need not look, in every step, for parameters without a gradient.
    """

    def configure_ddp(self) -> None:
        experiment = self.lightning_module
        # torch's reducer fails on a static graph whose first backward is a micro-batch that is not reduced (2.15).
        static = experiment.static_graph and experiment.trainer.accumulate_grad_batches == 1
        self._ddp_kwargs = {"gradient_as_bucket_view": True, "static_graph": static} | self._ddp_kwargs
        super().configure_ddp()

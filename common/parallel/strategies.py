"""The names that `--trainer.strategy` knows beside Lightning's own, with the settings that suit the suite."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from common.parallel.replicas import ReplicasStrategy
from common.parallel.sequence import SequenceStrategy
from common.parallel.sharding import ShardedStrategy


def register() -> None:
    """Makes Lightning's registry answer to them. `ddp` is also what it takes for several devices of itself."""
    for name, strategy in {"ddp": ReplicasStrategy, "fsdp2": ShardedStrategy, "sequence": SequenceStrategy}.items():
        StrategyRegistry.register(name, strategy, description=strategy.__doc__, override=True)

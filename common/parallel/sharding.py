"""FSDP2: parameters, gradients and moments are sharded over the devices, for models of size Large and beyond."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from common.errors import InputError
from common.parallel.replicas import ReplicasStrategy


class ShardedStrategy(ReplicasStrategy):
    """Each block, and what lies around the blocks, is gathered for the time that it computes.

    A checkpoint holds whole tensors under the names and numbers of a single device's, so that a run may go on with
    another strategy. An average of the weights is kept whole on every device, and gathered in every step.
    Validations run on whole weights.
    """

    def configure_ddp(self) -> None:
        experiment = self.lightning_module
        if not experiment.static_graph:
            raise InputError(f"trainer.strategy: fsdp2 shards one net, and {type(experiment).__name__} trains two that "
                             "play against each other; use ddp")
        shard(experiment.net, init_device_mesh(self.root_device.type, (self.world_size,)))

    def on_validation_start(self) -> None:
        """Whole weights on every device for its length: devices may have unequal numbers of batches, and one that
        gathers alone, for a last batch or a picture, would wait for ever.
        """
        for part in self._sharded():
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def on_validation_end(self) -> None:
        for part in self._sharded():
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()

    def _sharded(self) -> list[FSDPModule]:
        return [part for part in self.lightning_module.net.modules() if isinstance(part, FSDPModule)]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Whole moments from a checkpoint, of which each device keeps its shard."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {index: {name: _as(parameters[index], value) for name, value in entries.items()}
                     for index, entries in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shards each block of a net by itself, and the rest of it."""
    for row in net.modules():
        if isinstance(row, nn.ModuleList):
            for block in row:
                fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def whole(node: Any) -> Any:
    """The same structure with whole tensors on the CPU in place of sharded ones; every device has to ask for it."""
    if isinstance(node, DTensor):
        return node.full_tensor().cpu()
    if isinstance(node, dict):
        return {key: whole(value) for key, value in node.items()}
    return [whole(value) for value in node] if isinstance(node, list) else node


def _as(parameter: Tensor, value: Any) -> Any:
    """`value` sharded as its parameter is; counts of steps and the like as they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

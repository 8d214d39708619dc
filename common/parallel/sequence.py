"""Sequence parallelism: devices share their images and divide the tokens, each with the whole model.

Between the embedding and the pooling a device has its slice of the tokens alone, and so of what is kept for the
backward. Only attention looks beyond the slice. Where the devices divide the heads, tokens are exchanged for heads and
back (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv 2309.14509); elsewhere all keys and values are gathered on each
device. Both are exact, for any number of tokens.

Shapes: B images, N tokens, n of them on this device, D width, H heads, K channels of a head, R devices of an image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from common.errors import InputError
from common.model.blocked_attention import attend
from common.model.transformer import Attention, block_lists
from common.parallel.replicas import ReplicasStrategy


class SequenceStrategy(ReplicasStrategy):
    """DDP over groups of devices: those of a group share their images in training, and divide the tokens.

    In evaluation nothing is kept for a backward, and each device has whole images of its own.

    Args:
        devices_per_image: size of a group, neighbours by their rank; all devices where it is left out.
        **kwargs: see Lightning's DDPStrategy.
    """

    def __init__(self, devices_per_image: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._asked = devices_per_image

    @property
    def devices_per_image(self) -> int:
        world = self.world_size
        size = world if self._asked is None else self._asked
        if size < 1 or world % size:
            divisors = [n for n in range(1, world + 1) if world % n == 0]
            raise InputError(f"trainer.strategy.devices_per_image: {size} does not divide the {world} devices; "
                             f"{' or '.join(map(str, divisors))} would")
        return size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the training images a device has: those of a group have the same."""
        size = self.devices_per_image
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    @property
    def kept_share(self) -> float:
        """The most that a device keeps of an image's activations: 2 of a block's 16 vectors, keys and values, may be
        gathered whole.
        """
        return 1 / 8 + 7 / 8 / self.devices_per_image

    def configure_ddp(self) -> None:
        # Not the group of all: its gradients are reduced while tokens are exchanged.
        group, _ = dist.new_subgroups(self.devices_per_image)
        divide_tokens(self.lightning_module.net, group)
        super().configure_ddp()


def divide_tokens(net: nn.Module, group: dist.ProcessGroup) -> None:
    """Has every list of blocks in `net` work on this device's slice of the tokens, where gradients are computed.

    Without them (evaluation, attention maps) the net and its copies run as before, on whole images and by themselves.

    Every step from slices to whole and back is differentiated as if all devices were one program, whose result is the
    sum of their losses. A parameter's gradient on a device is thus what its own copy contributes to that sum; the mean
    over the copies, which DDP takes, is the gradient of the mean loss, for a block's parameters as for a head's.
    """
    lists = block_lists(net)
    if not lists:
        raise InputError(f"trainer.strategy: sequence divides the tokens of Transformer blocks, of which "
                         f"{type(net).__name__} has none; use ddp")
    for blocks in lists:
        tokens = Tokens(group)
        # Hooks and a class of its own: what is recomputed in the backward goes through them again, and a copy of the
        # net has its own.
        blocks[0].register_forward_pre_hook(tokens.before_blocks)
        blocks[-1].register_forward_hook(tokens.after_blocks)
        for attention in attentions(blocks):
            attention.__class__, attention.tokens = SequenceAttention, tokens


def attentions(module: nn.Module) -> list[Attention]:
    return [part for part in module.modules() if isinstance(part, Attention)]


class SequenceAttention(Attention):
    """The attention of this device's tokens to those of all: (B, n, D) -> (B, n, D)."""

    tokens: Tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, N) is true for the tokens that are attended to; without one, all are."""
        if not torch.is_grad_enabled():
            return super().forward(x, mask)
        keys = None if mask is None else mask[:, None, None]
        q, k, v = (part.transpose(1, 2) for part in self.split(x))
        # In one message, in the precision that attention casts them to under autocast.
        if self.heads % self.tokens.devices == 0:
            qkv = self.tokens.for_heads(torch.cat([q.to(v), k.to(v), v], dim=3))
            q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=3))
            out = attend(q, k, v, keys)
            out = self.tokens.from_heads(out.transpose(1, 2))
        else:
            kv = self.tokens.gathered(torch.cat([k.to(v), v], dim=3))
            k, v = (part.transpose(1, 2) for part in kv.chunk(2, dim=3))
            q = q.to(v).contiguous().transpose(1, 2)  # a view would keep this device's keys and values as well
            out = attend(q, k, v, keys).transpose(1, 2)
        return self.proj(out.flatten(2))


class Tokens:
    """How the tokens of one list of blocks lie on the devices of a group: in order, the first ones with one more."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.devices = group, dist.get_rank(group), dist.get_world_size(group)
        self.counts: list[int] = []  # n of every device, in the current forward and its backward

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokens:
        return self  # for the average of the weights: there is no copy of a process group

    def before_blocks(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Tokens (B, N, D), with whatever else the block takes, to (B, n, D)."""
        x, *others = inputs
        if not torch.is_grad_enabled():
            return inputs
        if x.shape[1] < self.devices:
            raise InputError(f"trainer.strategy: sequence divides tokens, and {x.shape[1]} of an image are fewer than "
                             f"the {self.devices} devices that share it; give "
                             f"trainer.strategy.devices_per_image={x.shape[1]} or less")
        parts = x.tensor_split(self.devices, dim=1)
        self.counts = [part.shape[1] for part in parts]
        return parts[self.rank], *others

    def after_blocks(self, block: nn.Module, inputs: tuple[Any, ...], x: Tensor) -> Tensor:
        """Tokens (B, n, D) to (B, N, D)."""
        return self.gathered(x) if torch.is_grad_enabled() else x

    def gathered(self, x: Tensor) -> Tensor:
        """(B, n, ...) -> (B, N, ...), the tokens of all on every device."""
        rows = x.transpose(0, 1)
        copies = rows.expand(self.devices, *rows.shape).flatten(0, 1)
        return self._exchange(copies, [len(rows)] * self.devices, self.counts).transpose(0, 1)

    def for_heads(self, x: Tensor) -> Tensor:
        """(B, n, H, K) -> (B, N, H / R, K): all tokens of a part of the heads."""
        rows = x.unflatten(2, (self.devices, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
        return self._exchange(rows, [x.shape[1]] * self.devices, self.counts).transpose(0, 1)

    def from_heads(self, x: Tensor) -> Tensor:
        """(B, N, H / R, K) -> (B, n, H, K)."""
        own = [self.counts[self.rank]] * self.devices
        rows = self._exchange(x.transpose(0, 1), self.counts, own)
        return rows.unflatten(0, (self.devices, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return Exchange.apply(rows, sent, received, self.group)


class Exchange(Function):
    """Sends `sent[r]` of the rows (the first axis), in order, to device r, and receives `received[r]` from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return Exchange.apply(grad, *ctx.way_back), None, None, None

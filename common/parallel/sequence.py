"""Sequence parallelism: the tokens of an image are spread over several devices, each holding all parameters.

Between the embedding and the pooling a device has its slice of the tokens alone, and so of the activations, whose
memory is what stops a Transformer on 50,176 pixels. Only attention looks beyond the slice. Where the devices divide the
heads, tokens are exchanged for heads around it (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv 2309.14509); elsewhere
each device gathers all keys and values. Both are exact, for any number of tokens.

Shapes: B images, N tokens, n of them on this device, D width, H heads, K channels of a head, R devices of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Size, Tensor, nn
from torch.autograd import Function

from common.errors import InputError
from common.model.transformer import Attention
from common.parallel.replicas import ReplicasStrategy


class SequenceStrategy(ReplicasStrategy):
    """DDP over groups of devices that share their images, and divide the tokens among them. For training: where nothing
    is trained, each device has images of its own.

    Args:
        devices_per_image: size of a group; all devices where it is left out.
    """

    def __init__(self, devices_per_image: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if devices_per_image is not None and devices_per_image < 1:
            raise InputError(f"trainer.strategy.devices_per_image: {devices_per_image} is not a number of devices")
        self._devices_per_image = devices_per_image

    @property
    def devices_per_image(self) -> int:
        return self._devices_per_image or self.world_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Who sees which images."""
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        size = self.devices_per_image if fitting else 1
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    def setup_distributed(self) -> None:
        super().setup_distributed()
        if self.world_size % self.devices_per_image:
            raise InputError(f"trainer.strategy.devices_per_image: {self.devices_per_image} does not divide the "
                             f"{self.world_size} devices")

    def configure_ddp(self) -> None:
        size = self.devices_per_image
        firsts = range(0, self.world_size, size)
        groups = [dist.new_group(list(range(first, first + size))) for first in firsts]  # every rank makes all of them
        spread(self.lightning_module.net, groups[self.global_rank // size])
        super().configure_ddp()


def spread(net: nn.Module, group: dist.ProcessGroup) -> None:
    """Makes every row of blocks in `net` work on this device's slice of the tokens; the net's own code stays as it is.

    A hook before the first block takes the slice, one after the last puts the tokens together again, and the attention
    in between is the one over all devices.
    """
    rows = [row for row in net.modules() if isinstance(row, nn.ModuleList) and len(row)
            and all(any(isinstance(part, Attention) for part in block.modules()) for block in row)]
    if not rows:
        raise InputError(f"trainer.strategy: sequence, but {type(net).__name__} has no blocks with attention whose "
                         "tokens could be spread; use ddp")
    for row in rows:
        tokens = Slices(group)
        row[0].register_forward_pre_hook(tokens.take)
        row[-1].register_forward_hook(tokens.join)
        for part in row.modules():
            if isinstance(part, Attention):
                part.forward = MethodType(tokens.attention, part)


class Slices:
    """The slices of a row of blocks: as even as can be, the first ones a token longer.

    Every device of the group computes the same loss from the joined tokens. A parameter of the blocks gets a part of
    its gradient on each device, one outside of them its whole gradient on all. DDP takes the mean over the devices,
    which is right for the latter; for the former `join` multiplies gradients by R on their way back, and `take` divides
    them again.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.devices = group, dist.get_rank(group), dist.get_world_size(group)
        self.sizes: list[int] = []  # of the tokens that are on their way through the blocks

    def __deepcopy__(self, memo: dict) -> Slices:
        return Slices(self.group)  # for the average of the weights; a group of processes cannot be copied

    def take(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Tokens (B, N, D) -> (B, n, D)."""
        tokens = inputs[0].shape[1]
        if tokens < self.devices:
            raise InputError(f"trainer.strategy: sequence spreads {tokens} tokens over {self.devices} devices; use "
                             "fewer devices_per_image")
        self.sizes = [len(part) for part in torch.arange(tokens).tensor_split(self.devices)]
        return _Take.apply(inputs[0], self), *inputs[1:]

    def join(self, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Tokens (B, n, D) -> (B, N, D)."""
        return _Join.apply(output, self)

    def attention(self, own: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `Attention.forward` computes for these tokens (B, n, D), among those of all devices."""
        if mask is not None:
            raise InputError("trainer.strategy: sequence has no key mask, as tokens of segments need; use ddp")
        q, k, v = own.split(x)
        if own.heads % self.devices == 0:
            out = self._over_heads(torch.stack([q, k, v]))
        else:
            k, v = _Gather.apply(torch.stack([k, v]), self)
            out = F.scaled_dot_product_attention(q, k, v)
        return own.proj(out.transpose(1, 2).flatten(2))

    def _over_heads(self, qkv: Tensor) -> Tensor:
        """(3, B, H, n, K) -> (B, H, n, K), each device attending for H / R heads over all tokens."""
        heads = qkv.tensor_split(self.devices, dim=2)
        shapes = [Size((*heads[self.rank].shape[:3], size, qkv.shape[4])) for size in self.sizes]
        q, k, v = torch.cat(_Exchange.apply(self.group, shapes, *heads), dim=3)
        out = F.scaled_dot_product_attention(q, k, v)
        tokens = out.split(self.sizes, dim=2)
        shapes = [tokens[self.rank].shape] * self.devices
        return torch.cat(_Exchange.apply(self.group, shapes, *tokens), dim=1)

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """The slices of all devices, put together along the tokens."""
        longest = list(x.shape)
        longest[dim] = max(self.sizes)
        padded = x.new_zeros(longest)
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)  # all_gather wants equal shapes
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, self.sizes, strict=True)], dim)


def exchange(parts: Sequence[Tensor], shapes: Sequence[Size], group: dist.ProcessGroup) -> list[Tensor]:
    """Sends part i to device i, and receives one of shapes[i] from it."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [shape.numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: Slices) -> Tensor:
        ctx.slices = slices
        return x.split(slices.sizes, dim=1)[slices.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.slices.gathered(grad, dim=1) / ctx.slices.devices, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: Slices) -> Tensor:
        ctx.slices = slices
        return slices.gathered(x, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slices = ctx.slices
        return grad.split(slices.sizes, dim=1)[slices.rank] * slices.devices, None


class _Gather(Function):
    """Keys and values (2, B, H, n, K) -> (2, B, H, N, K), all of which every device has a use for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: Slices) -> Tensor:
        ctx.slices, ctx.shape = slices, x.shape
        return slices.gathered(x, dim=3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slices = ctx.slices
        parts = grad.split(slices.sizes, dim=3)
        return torch.stack(exchange(parts, [ctx.shape] * slices.devices, slices.group)).sum(0), None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, shapes: Sequence[Size], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, [part.shape for part in parts]
        return tuple(exchange(parts, shapes, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *exchange(grads, ctx.shapes, ctx.group)

"""Sums over the ranks of a training, within its steps."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(value: Tensor) -> Tensor:
    """In place, and without the barrier of Lightning's `reduce`, in which the host would wait for the device."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """A new tensor; `value` itself becomes the sum."""
    return sum_over_ranks(value) / (dist.get_world_size() if dist.is_initialized() else 1)

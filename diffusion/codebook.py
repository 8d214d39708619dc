"""How much of a codebook is in use: a codebook that collapses shows nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

COLLAPSED = 0.1  # share of the codes in use below which a training warns


def usage(counts: Tensor) -> dict[str, Tensor]:
    """Share of the codes that were used at all, and their perplexity: the exponential of the entropy of their use.

    Args:
        counts: how often each code was used.
    """
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = torch.special.entr(shares).sum()
    return {"codebook_usage": (counts > 0).double().mean(), "codebook_perplexity": entropy.exp()}


def add_counts(counts: Tensor, indices: Tensor) -> Tensor:
    """`counts` with the codes in `indices`, of any shape, counted; the device is not waited for, as bincount would."""
    indices = indices.flatten()
    return counts.scatter_add(0, indices, torch.ones_like(indices))


class CodebookUsage(Metric):
    """`usage` over all batches and ranks of an evaluation. The perplexity of single batches says too little: it is
    bounded by the cells of a batch.

    Args:
        codes: in the codebook.
    """

    full_state_update = False

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        self.counts = add_counts(self.counts, indices)

    def compute(self) -> dict[str, Tensor]:
        return usage(self.counts)

"""What linear probing puts between a frozen encoder and its head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.parallel.reduction import sum_over_ranks


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm without affine parameters of a frozen encoder's features (B, D), over the global batch.

    torch's SyncBatchNorm does the same on GPUs alone. Nothing goes backward through the statistics, since the features
    do not learn, so their sums need no gradient.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features)
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            values = features.double()
            sums = torch.stack([torch.full_like(values[0], len(values)), values.sum(0), values.square().sum(0)])
            sum_over_ranks(sums)
            count, mean = sums[0], sums[1] / sums[0]
            variance = sums[2] / count - mean.square()
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
            self.num_batches_tracked += 1
            return ((values - mean) / (variance + self.eps).sqrt()).to(features.dtype)

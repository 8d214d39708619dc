"""Errors of predicted depth, with the protocol fixed in code (Eigen et al. 2014, as DINOv2 evaluates NYU-v2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from supervised.depth_loss import valid_pixels

PER_IMAGE = ("rmse", "rae", "delta1", "delta2", "delta3", "log10")


class DepthErrors(Metric):
    """Errors over the valid pixels of a set; exact over any batches and processes.

    - `rmse` (metres), `rae` (|error| / truth, which the literature calls AbsRel), `delta1` to `delta3` (share of pixels
      whose ratio to the truth, either way up, is below 1.25, 1.25^2, 1.25^3) and `log10` (|log10 error|) are taken per
      image and then averaged over the images. An image without a valid pixel has no error and is left out.
    - `rmse_pooled` and `rae_pooled` take all pixels of the set at once: another quantity, usually larger for RMSE.
    - `relative_absolute_error`: sum of |error| over the sum of |truth - mean of its image|, the textbook's RAE; 1 is
      as good as knowing each image's mean depth.

    Args:
        depth_range: metres; the truth counts strictly inside it, and the prediction is clamped to it.
        size: (H, W) at which to compare; the truth's own by default. The truth is sampled at the nearest pixel.
        crop: rows and columns of the truth that count, as slices.
        suffix: appended to the metrics' names.
    """

    full_state_update = False

    def __init__(
        self,
        depth_range: tuple[float, float],
        size: tuple[int, int] | None = None,
        crop: tuple[slice, slice] | None = None,
        suffix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.depth_range, self.size, self.crop, self.suffix = depth_range, size, crop, suffix
        zeros = torch.zeros(len(PER_IMAGE), dtype=torch.float64)
        self.add_state("per_image", zeros, dist_reduce_fx="sum")
        for name in ("images", "pixels", "squares", "relative", "absolute", "spread"):
            self.add_state(name, zeros.sum(), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Prediction (B, 1, h, w) at any size and truth (B, 1, H, W) in metres, 0 where unknown."""
        if self.size is not None:
            truth = F.interpolate(truth, self.size, mode="nearest-exact")
        prediction = F.interpolate(prediction.float(), truth.shape[-2:], mode="bilinear")
        if self.crop is not None:
            prediction, truth = prediction[(..., *self.crop)], truth[(..., *self.crop)]
        prediction, truth = prediction.clamp(*self.depth_range).flatten(1), truth.flatten(1)
        valid = valid_pixels(truth, self.depth_range)
        present = valid.any(1)
        prediction, truth, valid = prediction[present].double(), truth[present].double(), valid[present]
        n = valid.sum(1)

        def sums(values: Tensor) -> Tensor:
            return torch.where(valid, values, 0).sum(1)

        error = prediction - truth
        squares, absolute, relative = sums(error.square()), sums(error.abs()), sums(error.abs() / truth)
        ratio = torch.maximum(prediction / truth, truth / prediction)
        deltas = [sums((ratio < 1.25**k).double()) / n for k in (1, 2, 3)]
        log10 = sums((prediction.log10() - truth.log10()).abs()) / n
        self.per_image += torch.stack([(squares / n).sqrt(), relative / n, *deltas, log10], dim=1).sum(0)
        self.images += len(n)
        self.pixels += n.sum()
        self.squares += squares.sum()
        self.relative += relative.sum()
        self.absolute += absolute.sum()
        self.spread += sums((truth - (sums(truth) / n)[:, None]).abs()).sum()

    def compute(self) -> dict[str, Tensor]:
        values = dict(zip(PER_IMAGE, self.per_image / self.images, strict=True))
        values["rmse_pooled"] = (self.squares / self.pixels).sqrt()
        values["rae_pooled"] = self.relative / self.pixels
        values["relative_absolute_error"] = self.absolute / self.spread
        return {f"{name}{self.suffix}": value for name, value in values.items()}

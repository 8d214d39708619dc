"""Losses of depth estimation, in logarithms of metres. Shapes: B batch, H x W pixels."""

import torch
import torch.distributed as dist
from torch import Tensor

# Added to both depths before the logarithm, as DINOv2 does; metres.
EPSILON = 0.001
GRADIENT_STRIDES = (1, 2, 4, 8)


def valid_pixels(truth: Tensor, depth_range: tuple[float, float]) -> Tensor:
    """Where the true depth (metres, 0 where unknown) counts: strictly inside the range."""
    return (truth > depth_range[0]) & (truth < depth_range[1])


def log_residual(prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """log(prediction) - log(truth) in fp32, 0 where not valid."""
    truth = torch.where(valid, truth, 1.0)
    residual = torch.log(prediction.float() + EPSILON) - torch.log(truth.float() + EPSILON)
    return torch.where(valid, residual, 0.0)


def sig_loss(residual: Tensor, valid: Tensor, mean_only: bool = False) -> Tensor:
    """Scale-invariant loss sqrt(var(g) + 0.15 mean(g)^2) over the valid pixels g of the global batch (DINOv2, BTS).

    `mean_only` leaves the variance out, as in the first steps of training. The variance is unbiased and not a mean
    over images: every process sums its part, and the sums, not the losses, are added up over the processes. The sum's
    backward adds the gradients of all processes, and DDP then takes their mean; the two factors cancel, so that the
    parameters receive the gradient of one process with the whole batch.
    """
    g = residual.double()  # sums of squares: fp32 would lose the variance of a small spread about a large mean
    sums = torch.stack([valid.sum().double(), g.sum(), g.square().sum()])
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        sums = all_reduce(sums)
    n, total, squares = sums
    mean = total / n
    if mean_only:
        return (0.15**0.5 * mean.abs()).float()
    variance = (squares - n * mean.square()) / (n - 1)
    return (variance + 0.15 * mean.square()).sqrt().float()


def gradient_loss(residual: Tensor, valid: Tensor) -> Tensor:
    """How much the log residual (B, 1, H, W) changes between neighbouring valid pixels (Li and Snavely 2018).

    At strides 1, 2, 4 and 8: the sum of absolute differences along both axes over the number of valid pixels; summed
    over the strides, averaged over the images.

    This is the form that DINOv2's code means. As published, that code slices the first two axes of (B, 1, H, W), and
    so compares images of the batch with each other; at 2 images per device, its setting, it is always 0.
    """
    loss = residual.new_zeros(len(residual))
    for stride in GRADIENT_STRIDES:
        g, ok = residual[:, 0, ::stride, ::stride], valid[:, 0, ::stride, ::stride]
        count = ok.sum((1, 2)).clamp(min=1)
        rows = (g.diff(dim=1).abs() * (ok[:, 1:] & ok[:, :-1])).sum((1, 2))
        columns = (g.diff(dim=2).abs() * (ok[:, :, 1:] & ok[:, :, :-1])).sum((1, 2))
        loss = loss + (rows + columns) / count
    return loss.mean()

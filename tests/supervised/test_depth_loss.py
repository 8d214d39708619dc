"""Losses of depth estimation against NumPy and plain loops, and over two processes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from supervised.depth_loss import gradient_loss, log_residual, sig_loss, valid_pixels

RANGE = (0.001, 10.0)


def example(batch: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    truth = 0.5 + 8 * torch.rand(batch, 1, 18, 24, generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 0
    truth[0, 0, 0, :3] = torch.tensor([0.001, 10.0, 12.0])  # at and outside the ends of the range
    return 0.5 + 8 * torch.rand(truth.shape, generator=generator), truth


def test_only_depths_strictly_inside_the_range_count():
    truth = torch.tensor([0.0, 0.001, 0.002, 9.99, 10.0, 11.0])
    assert valid_pixels(truth, RANGE).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("mean_only", [False, True])
def test_sig_loss_is_the_formula_over_all_valid_pixels_of_the_batch(mean_only):
    prediction, truth = example()
    valid = valid_pixels(truth, RANGE)
    p, t = (x.double().numpy()[valid.numpy()] for x in (prediction, truth))
    g = np.log(p + 0.001) - np.log(t + 0.001)
    expected = math.sqrt(0.15 * g.mean() ** 2 + (0 if mean_only else g.var(ddof=1)))
    loss = sig_loss(log_residual(prediction, truth, valid), valid, mean_only)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_gradient_loss_is_the_sum_over_neighbours_and_strides():
    prediction, truth = example(batch=2)
    valid = valid_pixels(truth, RANGE)
    per_image = []
    for b in range(2):
        loss = 0.0
        for stride in (1, 2, 4, 8):
            rows, columns = range(0, 18, stride), range(0, 24, stride)
            g = {(r, c): math.log(prediction[b, 0, r, c] + 0.001) - math.log(truth[b, 0, r, c] + 0.001)
                 for r in rows for c in columns if valid[b, 0, r, c]}
            pairs = [((r, c), other) for r, c in g for other in ((r + stride, c), (r, c + stride)) if other in g]
            loss += sum(abs(g[one] - g[other]) for one, other in pairs) / len(g)
        per_image.append(loss)
    loss = gradient_loss(log_residual(prediction, truth, valid), valid)
    assert float(loss) == pytest.approx(sum(per_image) / 2, rel=1e-5)


def test_gradient_loss_ignores_scale_and_does_not_compare_images():
    _, truth = example()
    valid = valid_pixels(truth, RANGE)
    factors = torch.tensor([0.5, 1, 2, 4]).view(4, 1, 1, 1)
    assert float(gradient_loss(log_residual(truth * factors, truth, valid), valid)) < 0.01


def test_unknown_pixels_have_no_gradient():
    prediction, truth = example()
    prediction.requires_grad_()
    valid = valid_pixels(truth, RANGE)
    residual = log_residual(prediction, truth, valid)
    (sig_loss(residual, valid) + gradient_loss(residual, valid)).backward()
    assert not prediction.grad[~valid].any() and prediction.grad[valid].any()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1), nn.Softplus())


def gradient_of(net: nn.Module, truth: torch.Tensor) -> torch.Tensor:
    valid = valid_pixels(truth, RANGE)
    residual = log_residual(net(truth), truth, valid)
    (sig_loss(residual, valid) + 0.5 * gradient_loss(residual, valid)).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def half_of_the_batch(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # a fork must not use its parent's pool
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    _, truth = example()
    gradient = gradient_of(nn.parallel.DistributedDataParallel(network()), truth[2 * rank : 2 * rank + 2])
    torch.save(gradient, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_half_a_batch_give_the_gradient_of_one_with_the_whole(tmp_path):
    _, truth = example()
    expected = gradient_of(network(), truth)
    # Forked: two fresh processes would import for longer than they compute.
    mp.start_processes(half_of_the_batch, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-5, atol=1e-6)

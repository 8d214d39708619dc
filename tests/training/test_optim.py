"""The optimiser recipe: schedule, decay groups, layer-wise decay."""

import math
from collections.abc import Callable

import lightning as L
import pytest
import torch

from common.errors import InputError
from common.model import VisionTransformer
from common.training.optim import Recipe, adamw, parameter_groups

# 5 steps up from exactly 0, then half a cosine from 1 to 0.1 over 10: 0.1 + 0.9 * (1 + cos(pi k / 10)) / 2.
COSINE = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.9779754, 0.9140576, 0.8145034, 0.6890576, 0.55, 0.4109424, 0.2854966,
          0.1859424, 0.1220246]  # fmt: skip
CONSTANT = [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 10


class Rates(L.Callback):
    """The learning rates with which the optimiser steps."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer) -> None:
        self.steps.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("schedule, expected", [("cosine", COSINE), ("constant", CONSTANT)])
@pytest.mark.parametrize("batch_per_device", [8, 2])
def test_the_schedule_counts_optimiser_steps(train: Callable, schedule, expected, batch_per_device):
    rates = Rates()
    optim = {"lr": 0.02, "min_lr": 0.002, "schedule": schedule}
    train(rates, epochs=3, optim=optim, batch_per_device=batch_per_device)  # 44 images in batches of 8: 5 steps
    assert [step[0] for step in rates.steps] == pytest.approx([0.02 * factor for factor in expected], abs=1e-9)


def test_the_cosine_ends_at_its_floor_and_stays_there():
    factor = Recipe(lr=0.5, min_lr=0.05, warmup_epochs=1).factor(64, 5, 3)
    assert factor(0) == 0.0 and factor(15) == factor(99) == pytest.approx(0.1)
    assert Recipe(lr=0.5).factor(64, 5, 3)(15) == pytest.approx(0.0)
    assert Recipe(lr=0.5).factor(64, 5, 3)(0) == 1.0  # no warm-up


def test_a_warm_up_may_last_part_of_an_epoch():
    factor = Recipe(lr=1.0, warmup_epochs=0.5, schedule="constant").factor(64, 5, 1)
    assert [factor(step) for step in range(5)] == pytest.approx([0.0, 0.4, 0.8, 1.0, 1.0])


def test_a_run_that_is_all_warm_up_ends_at_its_peak():
    factor = Recipe(lr=1.0, warmup_epochs=2).factor(64, 2, 2)
    assert [factor(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_base_lr_is_per_256_images():
    assert Recipe(base_lr=1e-3).peak_lr(1024) == pytest.approx(4e-3)
    assert Recipe(lr=1e-3).peak_lr(1024) == 1e-3
    assert Recipe(base_lr=1e-3, min_lr=4e-4).factor(1024, 10, 1)(10) == pytest.approx(0.1)  # of the scaled peak


@pytest.mark.parametrize("options, message", [
    ({}, "one of lr .* and base_lr"),
    ({"lr": 0.1, "base_lr": 0.1}, "one of lr .*lr=0.1 and base_lr=0.1"),
    ({"lr": -1.0}, "optim.lr: -1.0"),
    ({"lr": math.nan}, "optim.lr: nan"),
    ({"lr": 0.1, "weight_decay": math.inf}, "optim.weight_decay: inf"),
    ({"lr": 0.1, "warmup_epochs": -1}, "optim.warmup_epochs: -1"),
    ({"lr": 0.1, "ema": 1.0}, "optim.ema: 1.0"),
    ({"lr": 0.1, "layer_decay": 0.0}, "optim.layer_decay: 0.0"),
    ({"lr": 0.1, "layer_decay": 1.5}, "optim.layer_decay: 1.5"),
    ({"lr": 0.1, "betas": (0.9, 1.0)}, "optim.betas: .*1.0"),
])  # fmt: skip
def test_impossible_recipes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Recipe(**options)


def test_what_depends_on_the_batch_is_checked_with_it():
    with pytest.raises(InputError, match="optim.warmup_epochs: 4 is longer than the run of 3 epochs"):
        Recipe(lr=0.1, warmup_epochs=4).factor(256, 5, 3)
    for options in ({"lr": 0.1}, {"lr": 0.0}, {"base_lr": 0.1}):
        with pytest.raises(InputError, match="optim.min_lr: 0.2 is above"):
            Recipe(min_lr=0.2, **options).factor(256, 5, 3)


# Parameter groups


def names(net: torch.nn.Module, group: dict) -> set[str]:
    name_of = {id(parameter): name for name, parameter in net.named_parameters()}
    return {name_of[id(parameter)] for parameter in group["params"]}


def test_matrices_decay_and_nothing_else():
    net = VisionTransformer(4, patch_size=2, size="nano", depth=1, qk_norm=True)
    decayed, exempt = parameter_groups(net, Recipe(lr=0.1, weight_decay=0.3), 0.1)
    if decayed["weight_decay"] == 0:
        decayed, exempt = exempt, decayed
    assert names(net, decayed) == {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
                                   "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"}  # fmt: skip
    assert names(net, exempt) == {name for name, _ in net.named_parameters()} - names(net, decayed)
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.q_norm.weight"} <= names(net, exempt)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr"] == exempt["lr"] == 0.1


def test_layer_wise_decay_of_twelve_blocks():
    net = VisionTransformer(4, patch_size=2, size="nano", depth=12)
    groups = parameter_groups(net, Recipe(lr=0.024, layer_decay=0.65), 0.024)
    rate = {name: group["lr"] / 0.024 for group in groups for name in names(net, group)}
    assert len(rate) == len(list(net.parameters()))
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert rate[name] == pytest.approx(0.0036972, rel=1e-4)  # 0.65 ** 13
    for block in range(12):
        assert rate[f"blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.65 ** (12 - block))
        assert rate[f"blocks.{block}.norm1.bias"] == pytest.approx(0.65 ** (12 - block))
    assert rate["norm.weight"] == rate["head.weight"] == rate["head.bias"] == 1.0
    assert len(groups) == 2 * 14  # decayed or not, times embedding, 12 blocks, head


def test_the_schedule_scales_every_layer_alike(train: Callable):
    rates = Rates()
    train(rates, epochs=3, optim={"lr": 0.02, "layer_decay": 0.5})
    for early, late in zip(rates.steps[1:], rates.steps[2:], strict=False):
        assert [a / b for a, b in zip(late, early, strict=True)] == pytest.approx([late[0] / early[0]] * len(early))
    assert max(rates.steps[5]) == pytest.approx(0.02) and min(rates.steps[5]) == pytest.approx(0.02 * 0.5**3)


def test_frozen_parameters_are_left_out():
    net = VisionTransformer(4, patch_size=2, size="nano", depth=1, position="sincos")
    net.patch_embed.requires_grad_(False)
    optimizer = adamw(net, Recipe(lr=0.1, betas=(0.8, 0.9)), 0.1)
    assert optimizer.defaults["fused"]  # one pass over the weights
    chosen = set().union(*(names(net, group) for group in optimizer.param_groups))
    assert chosen == {name for name, p in net.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("patch_embed", "pos_embed")) for name in chosen)
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in optimizer.param_groups)


def test_one_step_is_adamw():
    """From a gradient g, the first step of AdamW is lr * (sign(g) + decay * w), and lr * sign(g) without decay."""
    net = VisionTransformer(4, patch_size=2, size="nano", depth=1)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    adamw(net, Recipe(lr=0.01, weight_decay=0.3), 0.01).step()
    for name, decay in [("head.weight", 0.3), ("head.bias", 0.0), ("pos_embed", 0.0), ("cls_token", 0.0)]:
        expected = before[name] * (1 - 0.01 * decay) - 0.01
        torch.testing.assert_close(net.get_parameter(name).detach(), expected, atol=1e-6, rtol=0)

"""The attention kernel that a training says it has is the one that torch runs."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.model import VisionTransformer
from common.training.kernels import attention_kernels
from mae.model import MaskedAutoencoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend, name", [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_one_that_torch_is_held_to(backend, name, masked):
    with torch.device("meta"):  # as `check` builds it
        net = VisionTransformer(8, 1, size="nano")
    with sdpa_kernel(backend), torch.no_grad():
        assert attention_kernels(net, 65, masked, CPU, contextlib.nullcontext()) == name


def test_it_is_that_in_blocks(monkeypatch):
    monkeypatch.setattr("common.model.blocked_attention.has_avx512_bf16", lambda: True)
    with torch.device("meta"):
        net = VisionTransformer(8, 1, size="nano")
    assert attention_kernels(net, 65, False, CPU, torch.autocast("cpu", torch.bfloat16)) == "blocked"
    assert attention_kernels(net, 65, False, CPU, torch.autocast("cpu", torch.bfloat16), compiled=True) == "flash"
    assert attention_kernels(net, 65, False, CPU, contextlib.nullcontext()) == "flash"


def test_heads_of_unlike_widths_are_asked_apart(monkeypatch):
    net = MaskedAutoencoder(8, 1, size="nano", decoder_width=32, decoder_heads=2, decoder_depth=1)
    asked = []
    monkeypatch.setattr("common.training.kernels._kernel", lambda _, x: asked.append(tuple(x.shape)) or "flash")
    assert attention_kernels(net, 65, False, CPU, contextlib.nullcontext()) == "flash"
    assert sorted(asked) == [(1, 2, 65, 16), (1, net.heads, 65, net.width // net.heads)]


def test_a_net_without_attention_has_none():
    assert attention_kernels(torch.nn.Linear(2, 2), 4, False, CPU, contextlib.nullcontext()) == ""


@pytest.mark.parametrize("stage", ["check", "fit"])
def test_training_says_it_and_keeps_it(command, stage):
    outcome = command(stage, "--run_name", "run", "--trainer.max_epochs", "1")
    assert outcome.code == 0
    assert any(line.split() == ["attention", "kernel", "flash"] for line in outcome.out.splitlines())
    if stage == "fit":
        results = json.loads(Path("runs/supervised/run/results.json").read_text())
        assert results["recipe"]["attention kernel"] == "flash"

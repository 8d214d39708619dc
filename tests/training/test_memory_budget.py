"""Blocks that recompute their activations: as few as make room, where the number is left to the training."""

from types import SimpleNamespace

import pytest
import torch

from common.model.flops import activation_bytes
from common.training.optim import Recipe
from diffusion.generation import Generation
from supervised import Classification

DATA = SimpleNamespace(image_size=(8, 8), channels=1, class_names=list("abcd"), input_size=(8, 8), input_channels=1,
                       classes=4, held_bytes=0)  # fmt: skip


def experiment(kind: type, memory: int, monkeypatch) -> Classification | Generation:
    module = kind(Recipe(lr=1e-3), patch_size=1, size="nano", checkpoint_blocks="auto")
    module.trainer = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")))
    monkeypatch.setattr("common.training.module.device_memory", lambda _: memory)
    return module


@pytest.mark.parametrize("kind", [Classification, Generation])
def test_no_block_more_than_needed_recomputes(kind, monkeypatch):
    plain = experiment(kind, 0, monkeypatch)
    with torch.device("meta"):
        net = plain.build(DATA)
    weights = 22 * sum(p.numel() for p in net.parameters())
    by_blocks = []
    for blocks in range(net.depth):
        plain.recomputed = blocks
        with torch.device("meta"):
            by_blocks.append(plain.cost(plain.built(DATA)).activation_bytes)
    assert by_blocks == sorted(set(by_blocks), reverse=True)
    for blocks, each in enumerate(by_blocks):
        module = experiment(kind, int((16 * each + weights) / 0.7) + 2, monkeypatch)
        module.make_room(DATA, 16)
        assert module.recomputed == blocks and module.images_that_fit(DATA) >= 16
        assert module.backbone(module.built(DATA)).checkpoint_blocks == blocks
        module.make_room(DATA, 1)
        assert module.recomputed == 0  # anew, for another batch


def test_where_nothing_is_enough_all_blocks_recompute(monkeypatch):
    module = experiment(Classification, 10**6, monkeypatch)
    module.make_room(DATA, 4)
    assert module.recomputed == 3 and module.images_that_fit(DATA) == 0


def test_a_number_that_was_chosen_stays(monkeypatch):
    module = experiment(Classification, 10**6, monkeypatch)
    module.vit["checkpoint_blocks"] = 1
    module.make_room(DATA, 4)
    assert module.recomputed == 0 and module.built(DATA).checkpoint_blocks == 1
    with torch.device("meta"):
        net = module.built(DATA)
    assert activation_bytes(net, 1) < activation_bytes(experiment(Classification, 0, monkeypatch).built(DATA), 1)


def test_training_with_auto_is_training(command, tmp_path):
    outcome = command("fit", "--model.checkpoint_blocks", "auto", "--run_name", "a")
    assert outcome.code == 0
    # No part of the config's identity: the same run goes on with another number.
    assert command("fit", "--model.checkpoint_blocks", "1", "--run_name", "a").out.startswith("finished: ")


def test_what_the_data_hold_on_the_device_is_no_room(monkeypatch):
    holding = SimpleNamespace(**{**vars(DATA), "held_bytes": 5 * 10**8})
    fitting = experiment(Classification, 5 * 10**8, monkeypatch).images_that_fit(DATA)
    module = experiment(Classification, 10**9, monkeypatch)
    assert module.images_that_fit(holding) == fitting < module.images_that_fit(DATA)

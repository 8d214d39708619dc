"""The average follows its recurrence, in fp32, once per optimiser step, and is what `val` reports."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from common.model import VisionTransformer
from common.training.checkpoints import Checkpoints, read
from common.training.ema import EMA
from supervised import Classification


class Weights(L.Callback):
    """The raw weights after every optimiser step, and where there was an average before one."""

    def __init__(self) -> None:
        self.history: list[dict[str, torch.Tensor]] = []
        self.averaged: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Classification, *_) -> None:
        self.averaged.append(module.average is not None)

    def on_train_batch_end(self, trainer: L.Trainer, module: Classification, *_) -> None:
        if trainer.global_step > len(self.history):
            self.history.append({k: v.detach().double() for k, v in module.net.named_parameters()})


def recurrence(history: list[dict[str, torch.Tensor]], decay: float, warmup: bool) -> dict[str, torch.Tensor]:
    average = history[0]
    for t, weights in enumerate(history[1:], start=1):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        average = {key: d * average[key] + (1 - d) * weights[key] for key in average}
    return average


@pytest.mark.parametrize("batch_per_device", [8, 2])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_follows_its_recurrence(train: Callable, warmup, batch_per_device, monkeypatch):
    weights, calls, lerp = Weights(), [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *given: calls.append(len(given[0])) or lerp(*given))
    trainer = train(weights, optim={"ema": 0.9, "ema_warmup": warmup}, batch_per_device=batch_per_device)
    assert len(weights.history) == 10
    average = trainer.lightning_module.average
    for name, expected in recurrence(weights.history, 0.9, warmup).items():
        torch.testing.assert_close(average.get_parameter(name).double(), expected, atol=1e-7, rtol=1e-6)
    micro_batches = 8 // batch_per_device
    assert calls == [len(list(average.parameters()))] * 9  # all weights at once
    assert weights.averaged == [False] * micro_batches + [True] * 9 * micro_batches  # none before the first step


def test_the_warm_up_rises_to_the_decay():
    """A parameter that is 0 at first and 1 ever after shows the product of the decays."""
    net, callback = torch.nn.Linear(1, 1, bias=False), EMA(decay=0.25, warmup=True)
    trainer, module = SimpleNamespace(global_step=0, precision="32-true"), SimpleNamespace(net=net, compiled=False)
    callback.on_train_start(trainer, module)
    shares = []
    for value in (0.0, 1.0, 1.0, 1.0):
        net.weight.data.fill_(value)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module)
        shares.append(1 - callback.net.weight.item())
    assert shares == pytest.approx([1, 2 / 11, 2 / 11 * 3 / 12, 2 / 11 * 3 / 12 * 0.25])


def test_bf16_weights_are_averaged_in_fp32():
    net, callback = VisionTransformer(4, patch_size=2, size="nano", depth=1).bfloat16(), EMA(decay=0.999)
    trainer, history = SimpleNamespace(global_step=0, precision="bf16-true"), []
    module = SimpleNamespace(net=net, compiled=False)
    callback.on_train_start(trainer, module)
    for _ in range(20):
        for parameter in net.parameters():
            parameter.data += 0.1
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module)
        history.append({name: parameter.detach().double() for name, parameter in net.named_parameters()})
    expected = recurrence(history, 0.999, warmup=False)
    assert all(parameter.dtype == torch.float32 for parameter in callback.net.parameters())
    for name, value in expected.items():
        torch.testing.assert_close(callback.net.get_parameter(name).double(), value, atol=1e-6, rtol=1e-6)
    assert net.head.weight.dtype == torch.bfloat16


def test_the_average_is_frozen_in_evaluation_mode_and_no_part_of_the_module(train: Callable):
    module = train(optim={"ema": 0.5}, drop_path=0.5).lightning_module
    assert not module.average.training and not any(p.requires_grad for p in module.average.parameters())
    assert all(key.startswith("net.") for key in module.state_dict())
    raw = dict(module.net.named_parameters())
    assert all(parameter is not raw[name] for name, parameter in module.average.named_parameters())


def test_val_is_the_average_and_val_raw_the_weights(train: Callable):
    trainer = train(optim={"ema": 0.9})
    module, data = trainer.lightning_module, trainer.datamodule.sets["val"]
    for tag, net in [("val", module.average), ("val_raw", module.net)]:
        with torch.no_grad():
            logits = net(data.images)
        assert trainer.callback_metrics[f"{tag}/loss"].item() == pytest.approx(F.cross_entropy(logits, data.labels))
        hits = (logits.argmax(1) == data.labels).double().mean().item()
        assert trainer.callback_metrics[f"{tag}/acc1"].item() == pytest.approx(100 * hits)
    assert abs(trainer.callback_metrics["val/loss"] - trainer.callback_metrics["val_raw/loss"]) > 1e-4
    assert "val_raw/loss" not in train(folder="without").callback_metrics


def test_the_average_is_saved_and_restored_bit_by_bit(train: Callable, tmp_path: Path):
    optim = {"ema": 0.9, "ema_warmup": True, "schedule": "constant"}
    whole = train(Checkpoints(), epochs=4, optim=optim, folder="whole").lightning_module.average
    half = train(Checkpoints(), epochs=2, optim=optim).lightning_module
    saved = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["ema"]["updates"] == 10
    assert all(torch.equal(value, half.average.state_dict()[key]) for key, value in saved["ema"]["state_dict"].items())
    assert all(torch.equal(value, half.state_dict()[key]) for key, value in saved["state_dict"].items())
    trainer = train(Checkpoints(), epochs=4, optim=optim, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    resumed = trainer.lightning_module.average.state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.state_dict().items())

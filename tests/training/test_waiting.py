"""What training asks of a GPU, with tensors that only claim to lie on one: no devices are mixed, and no step waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import device
from common.benchmark import step
from common.data.loader import GlobalBatchData
from common.model import VisionTransformer
from common.training.curves import Curves
from common.training.ema import EMA
from common.training.module import Experiment
from common.training.optim import Recipe, adamw

ROOT = Path(__file__).parents[2]
IMAGES = 4


class Refusal(TorchDispatchMode):
    """Refuses what waits for a GPU: copies between it and the CPU, unless asked not to wait, and indices on the CPU.

    What reads a number (item, bool, tolist, nonzero) the fake tensors refuse themselves.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            waits = source.device != target.device and not (kwargs or {}).get("non_blocking")
            assert not waits, f"{func}: {source.device} -> {target.device}"
        if name.startswith("index"):
            devices = {each.device for each in [args[0], *args[1]] if isinstance(each, Tensor)} \
                if isinstance(args[1], list | tuple) else set()  # fmt: skip
            assert len(devices) < 2, f"{func}: an index from another device"
        return out


@contextmanager
def on_gpu(net: nn.Module) -> Iterator[None]:
    """Gives a net parameters and buffers without numbers, on a GPU that need not be there."""
    device._made.cache_clear()  # of real tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in net.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty_like(parameter, device="cuda")
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
        try:
            yield
        finally:
            device._made.cache_clear()


def arrived(data: GlobalBatchData) -> dict[str, Tensor]:
    """A training batch on the GPU as the loader has made it."""
    batch = {name: torch.empty_like(values, device="cuda") for name, values in data.random_batch(IMAGES).items()}
    if "depth" not in batch:  # which is prepared on the CPU
        side = getattr(data, "store", None) or 40
        size = (side, side) if data._on_device("train") else data.image_size
        batch["image"] = torch.empty(IMAGES, data.channels, *size, dtype=torch.uint8, device="cuda")
        if data.store:
            batch["shape"] = torch.empty(IMAGES, 2, dtype=torch.int64, device="cuda")
    return batch


def trained(module: Experiment, data: GlobalBatchData, taken: step.Step) -> None:
    """A step but for the backward, for which PyTorch needs a true GPU."""
    taken.batch = data.on_after_batch_transfer(arrived(data), 0)
    taken.optimizer.zero_grad()
    taken.loss()
    for parameter in module.net.parameters():
        parameter.grad = torch.empty_like(parameter)
    module.on_before_optimizer_step(taken.optimizer)
    taken.optimizer.step()
    taken.scheduler.step()


CROPPED = ["--data.augment.crop_scale", "[0.5,1.0]", "--data.augment.interpolation", "nearest"]


@pytest.mark.parametrize("config, options", [
    ("supervised/configs/digits.yaml", []),
    ("supervised/configs/digits.yaml", ["--data.image_size", "6"]),
    ("supervised/configs/cifar100.yaml", []),
    ("supervised/configs/cifar100.yaml", ["--data.augment.rand_augment", "null", *CROPPED]),
    ("supervised/configs/imagenet28.yaml", ["--data.store", "96", "--data.augment.rand_augment", "null"]),
    ("supervised/configs/rooms.yaml", []),
    ("mae/configs/cifar100.yaml", []),
    ("mae/configs/digits_probe.yaml", ["--init_from", "null"]),
    ("locality_ablation/configs/shapes.yaml", ["--model.permutation.swaps", "64"]),
    ("locality_ablation/configs/imagenet28.yaml", ["--model", "locality_ablation.DictionaryClassification"]),
    ("diffusion/configs/cifar10.yaml", []),
    ("diffusion/configs/autoencoder_shapes.yaml", []),
])  # fmt: skip
def test_a_step_waits_for_no_gpu(config: str, options: list[str]) -> None:
    """From the batch that has arrived to the optimiser; the first step makes what the others use again."""
    narrow = [] if "autoencoder" in config else ["--model.depth", "1", "--model.width", "48", "--model.heads", "3"]
    cpu = ["--trainer.accelerator", "cpu"]
    module, data = step.experiment(str(ROOT / config), [*cpu, *narrow, *options], IMAGES, compiled=False)
    module._device, module.trainer.training = torch.device("cuda", 0), True
    with on_gpu(module):
        taken = step.Step(module, data.random_batch(IMAGES))
        trained(module, data, taken)
        with Refusal():
            trained(module, data, taken)


class Recorded(list):
    """Events of a GPU that is not there."""

    def __call__(self) -> SimpleNamespace:
        return SimpleNamespace(record=lambda: self.append("recorded"))


@pytest.mark.parametrize("rhythm, points", [(50, 0), (4, 1)])
def test_average_and_curves_wait_for_no_gpu(monkeypatch, rhythm: int, points: int) -> None:
    """Nor does a point of the curves, when it is made."""
    net, averaged = (VisionTransformer(8, 1, 1, 10, size="nano") for _ in range(2))
    module = SimpleNamespace(net=net, compiled=False, parameters=net.parameters)
    trainer = SimpleNamespace(precision="bf16-mixed", accumulate_grad_batches=2, log_every_n_steps=rhythm,
                              global_step=0)  # fmt: skip
    average, curves, events = EMA(0.9, warmup=True), Curves(), Recorded()
    monkeypatch.setattr(torch.cuda, "Event", events)
    with on_gpu(nn.ModuleList([net, averaged])):
        optimizer = adamw(net, Recipe(lr=0.1), 0.1)
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
        average.on_train_start(trainer, module)
        average.net = averaged
        for micro_batch in range(8):
            trainer.global_step += micro_batch % 2
            with Refusal():
                curves.on_before_optimizer_step(trainer, module, optimizer)
                average.on_train_batch_end(trainer, module)
                curves.on_train_batch_end(trainer, module, {"loss": torch.empty((), device="cuda")}, {}, micro_batch)
        assert average.updates == 4 and len(curves._losses) == 4 and len(events) == points


def test_the_refusal_refuses() -> None:
    with on_gpu(nn.Identity()):
        there = torch.empty(3, device="cuda")
        for waiting in (lambda: there.cpu(), lambda: there.new_tensor([1.0]), lambda: there[torch.tensor([0, 1])]):
            with pytest.raises(AssertionError), Refusal():
                waiting()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(there.isfinite().all())

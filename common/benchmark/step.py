"""The training step of any study's experiment, on noise in place of its data: time, work, memory."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.benchmark.device import start_afresh
from common.benchmark.interleaving import Spread, seconds_of
from common.benchmark.memory import kept_bytes
from common.data.loader import GlobalBatchData
from common.device import peak_flops
from common.errors import InputError
from common.training.cli import StudyCLI
from common.training.module import Experiment
from common.training.trainer import Trainer

WARM_UP = 3  # steps: the first compiles and allocates the optimiser's state
SIDE = 2048  # of the matrices whose product is a CPU's peak
# Images/s that one H200 could reach at most, of a config's model and tokens: PERFORMANCE 1, `target img/s`, which is
# three forwards' products at 790 TFLOP/s, 3.5 forwards' attention at 380, and the elementwise traffic at 4.3 TB/s, none
# hidden behind another.
TARGETS = {
    ("supervised/cifar100", "/1, 12 x 192", 1024): 5889, ("supervised/cifar100", "/1, 12 x 384", 1024): 2369,
    ("supervised/cifar100", "/1, 12 x 768", 1024): 851, ("supervised/imagenet28", "/1, 12 x 192", 784): 8769,
    ("supervised/imagenet28", "/1, 12 x 384", 784): 3433, ("supervised/imagenet28", "/1, 12 x 768", 784): 1197,
    ("diffusion/imagenet256", "/1, 24 x 1024", 1024): 257, ("diffusion/imagenet256", "/2, 24 x 1024", 256): 1259,
}  # fmt: skip
COLUMNS = ("config", "model", "tokens", "M parameters", "precision", "compiled", "batch", "ms (quartiles)", "images/s",
           "GFLOP an image", "TFLOP/s", "share of the peak", "of an H200's target", "memory MB",
           "MB by formula")  # fmt: skip


def experiment(config: str, overrides: Sequence[str], batch: int, compiled: bool | None
               ) -> tuple[Experiment, GlobalBatchData]:  # fmt: skip
    """The experiment of a config, built on the device that its Trainer would take, and its data, without the files.

    Args:
        overrides: further options of `fit`.
        batch: images of a step, which is one micro-batch.
        compiled: compile the blocks; as `fit` would where it is None.
    """
    study = Path(config).resolve().parent.parent.name
    if not Path(config).is_file() or importlib.util.find_spec(study) is None:
        raise InputError(f"--config {config}: no file, or in no study; give one as STUDY/configs/NAME.yaml")
    cli = StudyCLI(study, ["fit", "--config", config, *overrides], run=False)
    module, data = cli.parts(cli.options.trainer.accelerator)
    data.without_files()
    trainer: Trainer = module.trainer
    data.global_batch, data.steps_per_epoch = batch, 1
    device = trainer.strategy.root_device
    module.compiled = device.type == "cuda" if compiled is None else compiled
    data.batch_per_device = batch
    module.make_room(data, batch)
    module.configure_model()
    trainer.precision_plugin.convert_module(module)
    module.to(device).train()
    return module, data


class Step:
    """A step as `fit` takes it: forward under the Trainer's precision, backward, AdamW, schedule, average; no logging.
    """

    def __init__(self, module: Experiment, batch: dict[str, Tensor]) -> None:
        self.module, self.batch = module, batch
        [self.optimizer], [schedule] = module.configure_optimizers()
        self.scheduler = schedule["scheduler"]
        self.average = None if module.optim.ema is None else [p.detach().clone() for p in module.net.parameters()]

    def loss(self) -> Tensor:
        batch = copy.copy(self.batch)  # a study may mix a batch with itself in place, which noise survives
        with self.module.trainer.precision_plugin.forward_context():
            out = self.module.training_step(batch, 0)
        return out["loss"] if isinstance(out, dict) else out

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.module.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            with torch.no_grad():
                weights = [p.detach().float() for p in self.module.net.parameters()]
                torch._foreach_lerp_(self.average, weights, 1 - self.module.optim.ema)
        return loss.detach()


class Peak(NamedTuple):
    """What the device could do at most, and where that is known from."""

    flops: float
    source: str


def peak(device: torch.device, precision: str) -> Peak | None:
    """A GPU's by its data sheet, in bf16; a CPU's as a large matrix product reaches it, in the step's precision."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        flops = peak_flops(name)
        return Peak(flops, f"{name} by its data sheet") if flops else None
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    seconds = min(seconds_of(partial(torch.mm, a, b), device) for _ in range(5))
    return Peak(2 * SIDE**3 / seconds, f"a product of {SIDE}x{SIDE} matrices")


def measure(config: str, overrides: Sequence[str], batch: int, compiled: bool | None, rounds: int
            ) -> tuple[str, ...]:  # fmt: skip
    """A row of the table."""
    start_afresh()
    module, data = experiment(config, overrides, batch, compiled)
    device = module.trainer.strategy.root_device
    noise = {name: values.to(device) for name, values in data.random_batch(batch).items()}
    step = Step(module, noise)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = Spread.of(seconds_of(step, device) for _ in range(rounds))
    cost = module.cost(module.net)
    flops = cost.training_flops * batch / times.median
    limit = peak(device, str(module.trainer.precision))
    name, model = "/".join(Path(config).resolve().with_suffix("").parts[-3::2]), _model(module)
    target = TARGETS.get((name, model, cost.tokens)) if device.type == "cuda" else None
    return (
        name, model,
        f"{cost.tokens:,}", f"{cost.parameters / 1e6:.2f}", str(module.trainer.precision),
        "yes" if module.compiled else "no", str(batch), f"{Spread(*(1e3 * t for t in times)):.1f}",
        f"{batch / times.median:,.1f}", f"{cost.training_flops / 1e9:.3f}", f"{flops / 1e12:.3f}",
        f"{flops / limit.flops:.1%} of {limit.source}" if limit else "unknown",
        f"{batch / times.median / target:.0%} of {target:,}" if target else "", _memory(step, device),
        f"{cost.activation_bytes * batch / 1e6:,.0f}",
    )  # fmt: skip


def _model(module: Experiment) -> str:
    """Patch size, width and blocks, of what has them."""
    backbone = module.backbone(module.net)
    if not hasattr(backbone, "patch_size"):
        return type(module).__name__
    return f"/{backbone.patch_size}, {backbone.depth} x {backbone.width}"


def _memory(step: Step, device: torch.device) -> str:
    """The peak on a GPU, with weights and moments; on a CPU what the forward keeps for its backward."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:,.0f}"
    if step.module.compiled:
        return "unknown"  # compiled code keeps what it needs in ways of its own
    return f"{kept_bytes(step.loss, step.module.net.parameters()) / 1e6:,.0f}"

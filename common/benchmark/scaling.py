"""How training scales over devices: measured over processes of this machine, and computed for GPUs that are not here.

Computed figures are arithmetic on assumptions, which their table states; they are no measurements.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.benchmark.interleaving import Spread, interleaved, ratios
from common.errors import InputError
from common.training.cli import StudyCLI
from common.training.module import Cost
from common.training.recipe import H200_FLOPS

# Measured: whole runs of `fit`

EPOCHS = 4  # of a run; the first is left out
MEASURED_COLUMNS = ("processes", "global batch", "images of a process", "images/s", "times one process (quartiles)",
                    "parallel efficiency (quartiles)")


def images_per_second(config: str, options: Sequence[str], batch: int, processes: int, threads: int) -> float:
    """The median over the steps of a run, for all processes together.

    Raises:
        InputError: the run fails; the message is its own.
    """
    study = Path(config).parent.parent.name
    with tempfile.TemporaryDirectory() as runs:
        words = [sys.executable, "-m", study, "fit", "--config", config, *options, "--runs", runs, "--run_name", "run",
                 "--data.batch_size", batch, "--trainer.devices", processes, "--trainer.accelerator", "cpu",
                 "--trainer.max_epochs", EPOCHS, "--model.optim.warmup_epochs", 0, "--trainer.limit_val_batches", 0,
                 "--trainer.log_every_n_steps", 1]  # fmt: skip
        done = subprocess.run([str(word) for word in words], env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise InputError(f"{study} fit with {processes} process(es): {said[-1] if said else done.returncode}")
        events = EventAccumulator(str(Path(runs) / study / "run"), size_guidance={"scalars": 0})
        events.Reload()
        speeds = [event.value for event in events.Scalars("train/images_per_second")]
    return statistics.median(speeds[len(speeds) // EPOCHS :])


def measured(
    config: str, options: Sequence[str], batch: int, processes: int, threads: int, rounds: int
) -> list[tuple[str, ...]]:
    """The rows of the table: one process, many with the same global batch, many with the same batch on each."""
    sides = [(1, batch), (processes, batch), (processes, processes * batch)]

    def seconds(many: int, images: int) -> float:
        speed = images_per_second(config, options, images, many, threads)
        print(f"{many} process(es), batch {images}: {speed:,.0f} images/s", file=sys.stderr)
        return 1 / speed  # of an image

    times = interleaved({side: partial(seconds, *side) for side in sides}, rounds)
    rows = []
    for side in sides:
        many, images = side
        gain = ratios(times[side], times[1, batch])
        efficiency = Spread(*(value / many for value in gain))
        speed = statistics.median(1 / value for value in times[side])
        compared = ("", "") if many == 1 else (f"{gain:.2f}", f"{efficiency:.0%}")
        rows.append((str(many), str(images), str(images // many), f"{speed:,.0f}", *compared))
    return rows


# Computed: the paper's configs on H200

BANDWIDTH = {8: 450e9, 64: 50e9}  # bytes/s that a GPU sends, by the number of GPUs: NVLink, InfiniBand
BUCKET = 25 * 2**20  # bytes that DDP reduces at once
BACKWARD = 2 / 3  # of a step
ENOUGH = 0.9  # the efficiency below which a GPU has too little to do
SHORT = 10e-3  # seconds; a step that takes less waits for the launches of its kernels
COMPUTED_COLUMNS = ("config", "size", "parameters M", "gradients MB", "GPUs", "global batch", "images per GPU",
                    "step ms", "all-reduce ms", "its share, nothing overlaps", "efficiency, overlapped",
                    "least images per GPU", "global batch at that", "remark")  # fmt: skip


class Paper(NamedTuple):
    """A config of the paper, and what its net has to know of data that are not here.

    Args:
        size: the model's, where it is not the config's.
        shape: height, width and channels of what the net sees, where they are not those of an RGB image of the config.
        images: of the training set, where they are fewer than the config's batch.
    """

    config: str
    classes: int
    size: str | None = None
    shape: tuple[int, int, int] | None = None
    images: int | None = None


PAPER = (
    Paper("supervised/cifar100", 100),
    Paper("supervised/imagenet28", 1000),
    Paper("supervised/imagenet28", 1000, "large"),
    Paper("supervised/imagenet64", 1000),
    Paper("supervised/imagenet224", 1000),
    Paper("supervised/flowers102", 102, images=1020),
    Paper("supervised/nyu_depth", 0),
    Paper("mae/cifar100", 0),
    Paper("mae/imagenet28", 0),
    Paper("mae/imagenet28", 0, "large"),
    Paper("mae/imagenet224", 0),
    Paper("diffusion/imagenet256", 1000, shape=(32, 32, 4)),
)
ROOT = Path(__file__).parent.parent.parent


class Step(NamedTuple):
    """Seconds of a step's arithmetic, of its all-reduce, and what becomes of them.

    Args:
        share: of the all-reduce in a step in which nothing overlaps.
        efficiency: of a step in which all but the last bucket overlaps with the backward.
        least: seconds of arithmetic that make this efficiency 0.9.
    """

    compute: float
    all_reduce: float
    share: float
    efficiency: float
    least: float


def step_on(devices: int, flops: float, gradients: float, bandwidth: float, mfu: float) -> Step:
    """A data-parallel step of n devices, each with `flops` FLOPs of its own and the same gradients (bytes).

        compute    = flops / (mfu x 790 TFLOP/s)
        all-reduce = 2 (n - 1) / n x gradients / bandwidth                     a ring
        share      = all-reduce / (compute + all-reduce)
        exposed    = max(all-reduce of the last bucket, all-reduce - backward)  the backward is 2/3 of compute
        efficiency = compute / (compute + exposed)

    An efficiency e leaves r = 1 / e - 1 of compute exposed, for which compute must be
    max(all-reduce of the last bucket / r, all-reduce / (r + 2/3)).
    """
    compute = flops / (mfu * H200_FLOPS)
    all_reduce = 2 * (devices - 1) / devices * gradients / bandwidth
    last = all_reduce * min(1, BUCKET / gradients)
    exposed = max(last, all_reduce - BACKWARD * compute)
    room = 1 / ENOUGH - 1
    least = max(last / room, all_reduce / (room + BACKWARD))
    return Step(compute, all_reduce, all_reduce / (compute + all_reduce), compute / (compute + exposed), least)


def cost_of(paper: Paper) -> tuple[Cost, str, int]:
    """What the config's net costs, its name, and the global batch."""
    study, name = paper.config.split("/")
    words = ["fit", "--config", str(ROOT / study / "configs" / f"{name}.yaml")]
    cli = StudyCLI(study, [*words, "--model.size", paper.size] if paper.size else words, run=False)
    made = cli.parser.instantiate(cli.config)["fit"]
    module, data = made.model, made.data  # which has read nothing yet
    height, width, channels = paper.shape or (*data.image_size, 3)
    seen = SimpleNamespace(image_size=(height, width), input_size=(height, width), channels=channels,
                           input_channels=channels, classes=paper.classes, class_names=range(paper.classes))
    module._trainer = SimpleNamespace(precision="bf16-mixed")  # of no concern to FLOPs
    with torch.device("meta"):
        cost = module.cost(module.build(seen))
    model = cli.resolved["model"]["init_args"]
    return cost, f"{model['size']}/{model['patch_size']}", min(data.batch_size, paper.images or data.batch_size)


def computed(mfu: float) -> Iterator[tuple[str, ...]]:
    """The rows of the table."""
    for paper in PAPER:
        cost, size, batch = cost_of(paper)
        gradients = 4 * cost.parameters
        for devices, bandwidth in BANDWIDTH.items():
            images = batch // devices
            head = (paper.config, size, f"{cost.parameters / 1e6:.1f}", f"{gradients / 1e6:.0f}", str(devices))
            one = step_on(devices, cost.training_flops, gradients, bandwidth, mfu)  # of one image on each
            least = -int(-one.least // one.compute)
            needed = (str(least), f"{least * devices:,}")
            if not images:
                yield (*head, str(batch), *["-"] * 5, *needed, f"**{batch} images: {batch} GPUs at the most**")
                continue
            step = step_on(devices, images * cost.training_flops, gradients, bandwidth, mfu)
            remarks = [f"{batch:,} do not divide"] * bool(batch % devices)
            remarks += ["**too little per GPU: all-reduce**"] * (images < least)
            remarks += ["**too little per GPU: launches**"] * (step.compute < SHORT)
            yield (*head, f"{images * devices:,}", str(images), f"{1e3 * step.compute:.2f}",
                   f"{1e3 * step.all_reduce:.2f}", f"{step.share:.1%}", f"{step.efficiency:.1%}", *needed,
                   "; ".join(remarks))


def assumptions(mfu: float) -> str:
    """What the computed table stands on."""
    return (f"**Computed, not measured.** A step is 3 x forward FLOPs at {mfu:g} of 790 TFLOP/s (an assumption; a "
            "slower step hides more of its communication), without input, logging and optimiser. Gradients are fp32; "
            "a ring all-reduce sends 2(n-1)/n of them from each GPU, at 450 GB/s among 8 GPUs (NVLink, one direction) "
            "and 50 GB/s among 64 (one 400 Gb/s InfiniBand port per GPU; NCCL may spread a ring over the 8 ports of a "
            "node, and be up to 8 times as fast). Overlapped: all but the last bucket of 25 MiB goes out during the "
            f"backward, two thirds of the step. Least images: at which the overlapped efficiency is {ENOUGH:.0%}. A "
            f"step below {1e3 * SHORT:.0f} ms is taken to wait for the launches of its kernels (an assumption).")

"""What the LightningModules of all studies share: a net built for the data, one recipe, draws by place, evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from common.data.loader import GlobalBatchData, rescale_progress
from common.device import device_memory
from common.errors import InputError
from common.model.flops import BYTES, Precision, activation_bytes, forward_flops, training_flops
from common.model.vit import VisionTransformer
from common.randomness import seeded, uniform
from common.training.compilation import compile_blocks
from common.training.ema import EMA
from common.training.initialisation import initialise
from common.training.optim import Recipe, adamw, lr_schedule
from common.training.pictures import Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Cost(NamedTuple):
    """What a net costs: tokens of an image, parameters, FLOPs of an image's forward and of its whole training step,
    bytes kept for its backward.
    """

    tokens: int
    parameters: int
    forward_flops: int
    training_flops: int
    activation_bytes: int


class Experiment(L.LightningModule):
    """A net, a loss and metrics; the Trainer does the rest.

    A study overrides `build`, `metrics`, `training_step` and `evaluate`, and names its headline metric; `picture` and
    `draw` where there is something to look at.

    Args:
        optim: the optimiser recipe.
        picture_epochs: log the picture every this many epochs, and after the last; 0 logs none.
    """

    data_class: type[GlobalBatchData] = GlobalBatchData
    headline = "acc1"
    higher_is_better = True
    # True where micro-batches do not add up to a batch: a step must then see its whole batch on each device.
    whole_batch = False
    makes_room = "model.checkpoint_blocks=auto"  # what to choose where a device cannot hold it
    # False where the parameters that receive a gradient change during training.
    static_graph = True
    masked = False  # True where attention leaves tokens out
    picture = ""  # the name of the picture that a validation draws, where a study has one
    pictured = "validation images"  # what is in it
    judged = "images"  # what a test counts

    def __init__(self, optim: Recipe, picture_epochs: int = 0) -> None:
        super().__init__()
        if picture_epochs < 0:
            raise InputError(f"model.picture_epochs: {picture_epochs} is negative; 0 logs no pictures")
        self.optim, self.picture_epochs = optim, picture_epochs
        self.net: nn.Module | None = None
        self.init_from: str | None = None  # set by the command line for a fresh start alone
        self.compiled = False  # set by the command line
        self.recomputed = 0  # blocks, where the model's checkpoint_blocks is auto
        self.initialised: dict[str, Any] = {}
        self.scores: dict[str, MetricCollection] = {}
        self.record: dict[str, Any] = {}  # how a test was done, where its metrics do not say
        self.shown: Any = None  # what `evaluate` keeps of a validation for its picture
        self.trained_steps = 0  # of the checkpoint; Lightning restores its own count for training alone

    def build(self, data: GlobalBatchData) -> nn.Module:
        """The net for these data."""
        raise NotImplementedError

    def metrics(self, data: GlobalBatchData) -> MetricCollection:
        """Fresh metrics, named as they are logged behind `val/` or `test/`."""
        raise NotImplementedError

    def evaluate(self, net: nn.Module, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        """Updates `scores` with what `net` says of an evaluation batch."""
        raise NotImplementedError

    def draw(self, title: str) -> Figure:
        """The picture of what `evaluate` kept in `shown`."""
        raise NotImplementedError

    def backbone(self, net: nn.Module) -> VisionTransformer:
        """The Vision Transformer in `net`, whose cost is reported."""
        return net

    def initialise(self, net: nn.Module, source: str) -> dict[str, Any]:
        """Loads weights, and says what was loaded, missing, unexpected, resampled."""
        return initialise(net, self.backbone(net), source)

    # Building and cost

    def configure_model(self) -> None:
        if self.net is None:
            # On the CPU, where Lightning would build on the GPU: a run starts from the same weights on every device.
            with torch.device("cpu"):
                self.assemble()
            if self.compiled:
                compile_blocks(self.net)

    def assemble(self) -> None:
        """Builds the net, and in a study what it has beside the net, which belongs to a checkpoint as well."""
        with seeded("init", self.trainer.seed):
            self.net = self.built(self.trainer.datamodule)
        if self.init_from:
            self.initialised = self.initialise(self.net, self.init_from)
            if self.trainer.state.fn != "fit" and self.initialised["missing"]:
                raise InputError(f"--init_from: {self.init_from} lacks {', '.join(self.initialised['missing'][:3])} "
                                 f"({len(self.initialised['missing'])} in all), without which there is nothing to "
                                 f"{self.trainer.state.fn.value}; fit trains them")

    def built(self, data: GlobalBatchData) -> nn.Module:
        """The net, with the number of blocks that recompute their activations where that was left to us."""
        net = self.build(data)
        if self._recomputes_as_needed(net):
            self.backbone(net).checkpoint_blocks = self.recomputed
        return net

    def _recomputes_as_needed(self, net: nn.Module) -> bool:
        return getattr(self.backbone(net), "checkpoint_blocks", 0) == "auto"

    def cost(self, net: nn.Module) -> Cost:
        vit = self.backbone(net)
        parameters = sum(p.numel() for p in net.parameters())
        # Of one image more: the copy of the weights under bf16-mixed is no image's.
        activations = activation_bytes(vit, 2, self.precision) - activation_bytes(vit, 1, self.precision)
        return Cost(vit.tokens, parameters, forward_flops(vit), training_flops(vit), activations)

    def test_flops(self, net: nn.Module) -> int:
        """FLOPs of a test where it makes what it judges; 0 where it only looks at the images there are."""
        return 0

    @property
    def precision(self) -> Precision:
        """The Trainer's, as the formulas of memory know it."""
        return self.trainer.precision if self.trainer.precision in BYTES else "32-true"

    def notes(self, net: nn.Module) -> dict[str, Any]:
        """Further lines of the effective recipe."""
        return {}

    def images_that_fit(self, data: GlobalBatchData) -> int:
        """The most images that a training step can hold on this device: 0.7 of the memory that its data leave, less the
        weights' share.

        0 where not even one fits.
        """
        with torch.device("meta"):
            cost = self.cost(self.built(data))
        # In fp32 weights, gradients, two moments, an average; and a bf16 copy. In fp64 the five alone.
        weights = (40 if self.precision == "64-true" else 22) * cost.parameters
        room = 0.7 * (device_memory(self.trainer.strategy.root_device) - data.held_bytes) - weights
        share = getattr(self.trainer.strategy, "kept_share", 1)  # of an image's activations, where devices share it
        return max(int(room / (share * cost.activation_bytes)), 0)

    def make_room(self, data: GlobalBatchData, images: int) -> None:
        """Has as few blocks as possible recompute their activations so that so many images fit, where that is asked for
        (model.checkpoint_blocks: auto).
        """
        with torch.device("meta"):
            net = self.build(data)
        if self._recomputes_as_needed(net):
            self.recomputed = 0
            # Recomputing the last one as well would gain nothing: one block at a time is whole.
            while self.images_that_fit(data) < images and self.recomputed < self.backbone(net).depth - 1:
                self.recomputed += 1

    # Training

    def configure_callbacks(self) -> list[L.Callback]:
        pictures = [Pictures(self.picture, self.picture_epochs)] if self.picture else []
        if self.optim.ema is None:
            return pictures
        if self.trainer.precision == "bf16-true":
            raise InputError("model.optim.ema: the average is kept in fp32 and cannot be evaluated under "
                             "trainer.precision=bf16-true; bf16-mixed can")
        return [EMA(self.optim.ema, self.optim.ema_warmup), *pictures]

    def configure_optimizers(self) -> tuple[list, list]:
        data = self.trainer.datamodule
        optimizer = adamw(self.net, self.optim, self.optim.peak_lr(data.global_batch))
        factor = self.optim.factor(data.global_batch, data.steps_per_epoch, self.trainer.max_epochs)
        return [optimizer], [lr_schedule(optimizer, factor)]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's, which refuses a fused optimiser under any mixed precision, though only fp16's scaler would
        forbid it, and fp16 is refused.
        """
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grad_norm_(self.net.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def draws(self, stream: str, batch: dict[str, Tensor], n: int) -> Tensor:
        """Uniform draws (B, n) for this optimiser step, by each image's place in the global batch."""
        return uniform(stream, self.trainer.seed, self.trainer.global_step, batch["place"], n=n)

    # Evaluation: with EMA the average is `val` and the weights themselves are `val_raw`

    @property
    def average(self) -> nn.Module | None:
        """The EMA callback's net, where it is on and has been updated."""
        return next((callback.net for callback in self.trainer.callbacks if isinstance(callback, EMA)), None)

    def evaluated(self, stage: str) -> Iterator[tuple[str, nn.Module]]:
        if self.average is None:
            yield stage, self.net
        else:
            yield from [(stage, self.average), (f"{stage}_raw", self.net)]

    def _start(self, stage: str) -> None:
        data = self.trainer.datamodule
        self.scores = {tag: self.metrics(data).to(self.device) for tag, _ in self.evaluated(stage)}

    def _step(self, stage: str, batch: dict[str, Tensor]) -> None:
        for tag, net in self.evaluated(stage):
            self.evaluate(net, batch, self.scores[tag])

    def _end(self) -> None:
        # `step`: the x axis of these points is the optimiser steps done, as that of the training curves.
        values = {"step": torch.tensor(float(self.trainer.global_step or self.trained_steps))}
        for tag, scores in self.scores.items():
            values |= {f"{tag}/{name}": value.float() for name, value in scores.compute().items()}
        self.log_dict(values)
        self.scores = {}

    def on_validation_epoch_start(self) -> None:
        self.shown = None
        self._start("val")

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self._step("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._end()

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def test_step(self, batch: dict[str, Tensor], _: int) -> None:
        self._step("test", batch)

    def on_test_epoch_end(self) -> None:
        self._end()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["accumulation"] = self.trainer.accumulate_grad_batches
        if hasattr(backbone := self.backbone(self.net), "beyond_shapes"):
            checkpoint["beyond_shapes"] = backbone.beyond_shapes()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_steps = checkpoint["global_step"]
        if self.trainer.state.fn == "fit":
            rescale_progress(checkpoint, self.trainer.accumulate_grad_batches)

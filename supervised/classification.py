"""Classification: a Vision Transformer on pixels or patches, cross-entropy, Acc@1 and Acc@5."""

from __future__ import annotations

import csv
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from common.data import ImageData
from common.errors import InputError
from common.model import VisionTransformer
from common.model.flops import block_bytes
from common.randomness import seeded
from common.training.module import Cost, Experiment
from common.training.optim import Recipe
from supervised.probe import FeatureNorm


class Classification(Experiment):
    """The paper's first case study. Patch size 1 makes every pixel a token; nothing else differs between two arms.

    Args:
        optim: the optimiser recipe.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of mixup, 0 is off; a batch is mixed with itself in reverse order.
        cutmix: alpha of cutmix, 0 is off; with both on, each batch takes one of them with probability 0.5.
        probe: linear probing: the encoder is frozen, and the head, behind a batch norm without affine parameters,
            learns alone (He et al. 2022, appendix A.1).
        vit: the model's options, see `common.model.VisionTransformer`.
    """

    data_class = ImageData
    headline = "acc1"

    def __init__(
        self,
        optim: Recipe,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        probe: bool = False,
        **vit: Any,
    ) -> None:
        super().__init__(optim)
        for name, value in [("mixup", mixup), ("cutmix", cutmix)]:
            if value < 0:
                raise InputError(f"model.{name}: {value} is negative; 0 turns it off")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"model.label_smoothing: {label_smoothing} is not in [0, 1)")
        self.label_smoothing, self.mixup, self.cutmix = label_smoothing, mixup, cutmix
        self.probe = self.whole_batch = probe  # whole: the batch norm
        self.vit = vit

    def build(self, data: ImageData) -> VisionTransformer:
        net = VisionTransformer(
            image_size=data.image_size, channels=data.channels, classes=len(data.class_names), **self.vit
        )
        if self.probe:
            head = net.requires_grad_(False).head.requires_grad_(True)
            net.head = nn.Sequential(FeatureNorm(net.width), head)
        return net

    def cost(self, net: VisionTransformer) -> Cost:
        cost = super().cost(net)
        if not self.probe:
            return cost
        one_block = block_bytes(net.num_prefix_tokens + net.tokens, net.width, self.precision)
        return cost._replace(training_flops=cost.forward_flops, activation_bytes=one_block)  # nothing goes backward

    def transform(self, images: Tensor) -> Tensor:
        """What an image (B, C, H, W) goes through right before the net, after all augmentation and in every stage.

        The place for an ablation of one's own.
        """
        return images

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        drops = self.draws("drop path", batch, 2 * self.net.depth) if self.net.drop_path else None
        logits, targets = self.logits(batch, drops)
        # timm's Mixup has smoothed the targets that it mixed.
        smoothing = 0.0 if targets.ndim == 2 else self.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def logits(self, batch: dict[str, Tensor], drops: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of a training batch, with its targets: (B, classes), and (B,) or (B, classes)."""
        images, targets = self.mixed(batch["image"], batch["label"])
        return self.net(self.transform(images), drops=drops), targets

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), in place, and targets: (B,) labels, or (B, classes) where mixup or cutmix is on.

        By Zhang et al. (2018) and Yun et al. (2019).
        """
        if not (self.mixup or self.cutmix):
            return images, labels
        with self.mixing(labels):
            return self._timm_mixup(images, labels)

    def mixing(self, labels: Tensor) -> AbstractContextManager[None]:
        """Seeds the global generators for a mixture: one lambda and box for the global batch."""
        if len(labels) % 2:
            raise InputError(f"data.batch_size: mixup pairs images, and {len(labels)} on a device are odd")
        return seeded("mixup", self.trainer.seed, self.trainer.global_step)

    @cached_property
    def _timm_mixup(self) -> Any:
        from timm.data import Mixup

        return Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=self.net.classes)

    def metrics(self, data: ImageData) -> MetricCollection:
        return MetricCollection({"loss": MeanMetric(), "acc1": TopK(1), "acc5": TopK(5)})

    def predicted(self, net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The logits (B, classes) of a batch that is no training's."""
        return net(self.transform(batch["image"]))

    def evaluate(self, net: nn.Module, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        logits = self.predicted(net, batch).float()
        scores["loss"].update(F.cross_entropy(logits, batch["label"], reduction="none"))
        for name in ("acc1", "acc5"):
            scores[name].update(logits, batch["label"])

    # Prediction: a table of the five likeliest classes of each file

    def on_predict_epoch_start(self) -> None:
        self._predictions: list[tuple[str, Tensor, Tensor]] = []

    def predict_step(self, batch: dict[str, Any], _: int) -> None:
        _, net = next(self.evaluated("predict"))
        probabilities, classes = self.predicted(net, batch).float().softmax(-1).topk(min(5, self.net.classes))
        self._predictions += zip(batch["file"], classes.tolist(), probabilities.tolist(), strict=True)

    def on_predict_epoch_end(self) -> None:
        names = self.trainer.datamodule.class_names
        path = Path(self.trainer.default_root_dir) / "predictions.csv"
        if self.trainer.world_size > 1:
            path = path.with_name(f"predictions-rank{self.trainer.global_rank}.csv")
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            k = min(5, self.net.classes)
            table.writerow(["file", *(f"{kind}{i}" for i in range(1, k + 1) for kind in ("class", "probability"))])
            for name, classes, probabilities in self._predictions:
                pairs = zip(classes, probabilities, strict=True)
                table.writerow([name, *(cell for c, p in pairs for cell in (names[c], f"{p:.6f}"))])
        print(f"{len(self._predictions)} images -> {path}")


class TopK(Metric):
    """Percentage of images whose label is among the k largest logits, from exact counts over all ranks."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (B, classes), labels (B,)."""
        largest = logits.topk(min(self.k, logits.shape[1])).indices
        self.hits += (largest == labels[:, None]).sum()
        self.images += len(labels)

    def compute(self) -> Tensor:
        return 100 * self.hits / self.images

"""Depth estimation: a Vision Transformer on pixels or patches with a dense head, trained by DINOv2's procedure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from common.errors import InputError
from common.model import VisionTransformer
from common.training.module import Cost, Experiment
from common.training.optim import Recipe
from supervised.depth_data import DepthData
from supervised.depth_loss import gradient_loss, log_residual, sig_loss, valid_pixels
from supervised.depth_metrics import DepthErrors
from supervised.depth_net import UPSAMPLING, DepthNet
from supervised.depth_pictures import comparison, preview

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4  # images of the logged picture


class Depth(Experiment):
    """The paper's depth estimation (section 4.1). Patch size 1 makes every pixel a token.

    Metrics are those of `DepthErrors` at the full size of the truth, cropped as the source says, and with the suffix
    `_low` at the size of the model's input, whole.

    Args:
        optim: the optimiser recipe.
        bins: number of depths whose weighted mean is predicted.
        depth_range: metres; of the bins, of the truths that count, and of what is predicted in evaluation.
        sig_warmup: optimiser steps whose scale-invariant loss is its mean term alone.
        gradient_loss: `spatial` compares neighbouring pixels; `off` is what DINOv2's published code amounts to at its
            batch of 2 per device.
        gradient_weight: of the gradient loss beside the scale-invariant loss.
        flip_average: evaluate the mean of the predictions for the image and its mirror image; doubles the cost.
        picture_epochs: log a picture of predictions every this many epochs, and after the last; 0 logs none.
        vit: the model's options, see `common.model.VisionTransformer`.
    """

    data_class = DepthData
    headline = "rmse"
    higher_is_better = False
    whole_batch = True  # the variance in the scale-invariant loss
    picture = "depth"

    def __init__(
        self,
        optim: Recipe,
        bins: int = 256,
        depth_range: tuple[float, float] = (0.001, 10.0),
        sig_warmup: int = 100,
        gradient_loss: Literal["spatial", "off", False] = "spatial",  # YAML reads a bare off as False
        gradient_weight: float = 0.5,
        flip_average: bool = True,
        picture_epochs: int = 10,
        **vit: Any,
    ) -> None:
        super().__init__(optim, picture_epochs)
        if bins < 2:
            raise InputError(f"model.bins: {bins} is fewer than 2")
        if not 0 < depth_range[0] < depth_range[1]:
            raise InputError(f"model.depth_range: {list(depth_range)} is not two growing, positive depths in metres")
        for name, value in [("sig_warmup", sig_warmup), ("gradient_weight", gradient_weight)]:
            if value < 0:
                raise InputError(f"model.{name}: {value} is negative")
        self.bins, self.depth_range, self.sig_warmup = bins, tuple(depth_range), sig_warmup
        self.gradient_weight = gradient_weight if gradient_loss == "spatial" else 0.0
        self.flip_average = flip_average
        self.vit = vit

    def build(self, data: DepthData) -> DepthNet:
        # Both poolings leave the tokens alone; without a class token only one of them is allowed.
        pool = "cls" if self.vit.get("class_token", True) else "avg"
        backbone = VisionTransformer(
            image_size=data.image_size, channels=data.channels, classes=0, pool=pool, **self.vit
        )
        return DepthNet(backbone, self.bins, self.depth_range)

    def backbone(self, net: DepthNet) -> VisionTransformer:
        return net.backbone

    def cost(self, net: DepthNet) -> Cost:
        """The backbone's and the head's: a projection, and fp32 scores, their weights and products at x4."""
        cost, tokens = super().cost(net), net.backbone.tokens
        flops = 2 * tokens * net.head.in_features * self.bins
        scores = 3 * 4 * UPSAMPLING**2 * tokens * self.bins
        return cost._replace(
            forward_flops=cost.forward_flops + flops,
            training_flops=cost.training_flops + 3 * flops,
            activation_bytes=cost.activation_bytes + scores,
        )

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        backbone = self.net.backbone
        drops = self.draws("drop path", batch, 2 * backbone.depth) if backbone.drop_path else None
        prediction = resize(self.net(batch["image"], drops), batch["depth"])
        valid = valid_pixels(batch["depth"], self.depth_range)
        residual = log_residual(prediction, batch["depth"], valid)
        loss = sig_loss(residual, valid, mean_only=self.trainer.global_step < self.sig_warmup)
        if self.gradient_weight:
            loss = loss + self.gradient_weight * gradient_loss(residual, valid)
        return loss

    # Evaluation

    def metrics(self, data: DepthData) -> MetricCollection:
        full = DepthErrors(self.depth_range, crop=data.source.evaluation_crop)
        low = DepthErrors(self.depth_range, size=data.image_size, suffix="_low")
        return MetricCollection({"full": full, "low": low}, compute_groups=False)

    def evaluate(self, net: nn.Module, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        prediction = self.predict_depth(net, batch["image"])
        scores.update(prediction, batch["depth"])
        if self.shown is None:
            truth = batch["depth"][:SHOWN]
            self.shown = batch["image"][:SHOWN], truth, resize(prediction[:SHOWN], truth)

    def predict_depth(self, net: nn.Module, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> depth (B, 1, 4h, 4w) in metres, in fp32."""
        depth = net(images).float()
        if self.flip_average:
            depth = (depth + net(images.flip(-1)).float().flip(-1)) / 2
        return depth

    def draw(self, title: str) -> Figure:
        images, truth, prediction = self.shown
        return comparison(images, truth, prediction.clamp(*self.depth_range), self.depth_range, title)

    # Prediction: for each file a depth map (16-bit PNG, millimetres) and a coloured preview, of the file's own size

    def predict_step(self, batch: dict[str, Any], _: int) -> None:
        from PIL import Image

        _, net = next(self.evaluated("predict"))
        folder = Path(self.trainer.default_root_dir) / "predictions"
        depths = self.predict_depth(net, batch["image"])
        for name, size, depth in zip(batch["file"], batch["size"].tolist(), depths, strict=True):
            metres = F.interpolate(depth[None], size, mode="bilinear")[0, 0].clamp(*self.depth_range).cpu().numpy()
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            millimetres = (1000 * metres).round().clip(max=65535).astype("uint16")
            Image.fromarray(millimetres).save(path.with_name(f"{path.name}.depth.png"))
            Image.fromarray(preview(metres)).save(path.with_name(f"{path.name}.preview.png"))

    def on_predict_epoch_end(self) -> None:
        print(f"depth maps in millimetres and previews -> {Path(self.trainer.default_root_dir) / 'predictions'}")


def resize(depth: Tensor, like: Tensor) -> Tensor:
    """Depth (B, 1, h, w) -> the height and width of `like`."""
    return F.interpolate(depth.float(), like.shape[-2:], mode="bilinear")

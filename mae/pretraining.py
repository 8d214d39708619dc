"""Pre-training by masked autoencoding: hide most pixels or patches of an image, and predict them from the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from common.data import ImageData
from common.device import constant
from common.errors import InputError
from common.model import patchify
from common.randomness import uniform
from common.training.module import Cost, Experiment
from common.training.optim import Recipe
from mae.cost import activation_bytes, decoder_flops, encoder_flops, forward_flops, visible_tokens
from mae.model import MaskedAutoencoder
from mae.pictures import figure, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # images of the logged picture
REFERENCE_DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}  # MAE's, for every encoder


@dataclass
class Prediction:
    """What `predict` does otherwise than the training; it does not tell runs apart.

    Args:
        mask_ratio: share of masked tokens; none takes the training's.
        seed: of the masks; none takes the run's.
    """

    mask_ratio: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.mask_ratio is not None:
            check_mask_ratio("model.predict.mask_ratio", self.mask_ratio)
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"model.predict.seed: {self.seed} is not between 0 and 4294967295")


AS_TRAINED = Prediction()


class Pretraining(Experiment):
    """The paper's masked autoencoding (section 4.2). Patch size 1 masks single pixels.

    Metrics over the masked patches: `loss`; `mse` in the units of the normalised images, whatever the loss is
    normalised by; and `mse_of_mean`, that of predicting each channel's mean over the visible pixels of the image,
    which a model has to beat (but for the other modes of norm_pix_loss, where `mse` is lent the truth's own means and
    scales). Masks are a function of (seed, epoch, index of the image), in evaluation of epoch 0.

    Args:
        optim: the optimiser recipe.
        mask_ratio: share of the tokens that are masked, in (0, 1); the encoder never sees them.
        picture_epochs: log a picture of reconstructions every this many epochs, and after the last; 0 logs none.
        predict: what `predict` does otherwise.
        mae: the model's options, see `mae.MaskedAutoencoder`.
    """

    data_class = ImageData
    headline = "loss"
    higher_is_better = False
    picture = "reconstruction"

    def __init__(
        self,
        optim: Recipe,
        mask_ratio: float = 0.75,
        picture_epochs: int = 10,
        predict: Prediction = AS_TRAINED,
        **mae: Any,
    ) -> None:
        super().__init__(optim, picture_epochs)
        check_mask_ratio("model.mask_ratio", mask_ratio)
        self.mask_ratio, self.predict = mask_ratio, predict
        self.mae = mae

    def build(self, data: ImageData) -> MaskedAutoencoder:
        net = MaskedAutoencoder(image_size=data.image_size, channels=data.channels, **self.mae)
        for name, ratio in [("mask_ratio", self.mask_ratio), ("predict.mask_ratio", self.predict.mask_ratio)]:
            if ratio is not None and not 0 < visible_tokens(net, ratio) < net.tokens:
                raise InputError(f"model.{name}: {ratio} leaves {visible_tokens(net, ratio)} of {net.tokens} tokens "
                                 "visible; at least one must be visible and one masked")
        if net.norm_pix_loss == "patch" and net.patch_size == 1:
            rank_zero_warn(f"model.norm_pix_loss=patch at patch_size=1 normalises the {net.channels} channel values of "
                           "one pixel by their own mean and variance: its brightness is lost, what is left of the "
                           "target is a hue, and on grey pixels amplified noise. A larger patch keeps its contrast, so "
                           "the two would not learn the same task; choose none or image")
        return net

    # Cost

    def cost(self, net: MaskedAutoencoder) -> Cost:
        flops = forward_flops(net, self.mask_ratio)
        return super().cost(net)._replace(
            forward_flops=flops,
            training_flops=3 * flops,
            activation_bytes=activation_bytes(net, self.mask_ratio, self.precision),
        )

    def notes(self, net: MaskedAutoencoder) -> dict[str, Any]:
        """What each half costs, and what MAE's own decoder would."""
        with torch.device("meta"):
            sizes = {"width": net.width, "depth": net.depth, "heads": net.heads}
            reference = MaskedAutoencoder(net.image_size, net.patch_size, net.channels, qk_norm=net.qk_norm, **sizes,
                                          **REFERENCE_DECODER)  # fmt: skip
        decoders = {"decoder of": net, "MAE's decoder would be": reference}
        return {
            "visible tokens": visible_tokens(net, self.mask_ratio),
            "encoder GFLOP per image": round(encoder_flops(net, self.mask_ratio) / 1e9, 4),
            **{name: f"{half.decoder_width} x {half.decoder_depth} x {half.decoder_heads}: "
               f"{decoder_flops(half, self.mask_ratio) / 1e9:.4g} GFLOP, with the encoder "
               f"{activation_bytes(half, self.mask_ratio, self.precision) / 1e6:.4g} MB per image"
               for name, half in decoders.items()},
        }

    # Training

    def noise(self, batch: dict[str, Any], seed: int | None = None) -> Tensor:
        """The draws (B, L) that decide which tokens of an image are masked: those of the least draws stay visible.

        The place for a masking of one's own; equal draws keep the order of the tokens, which lie on `self.net.grid`.
        """
        seed = self.trainer.seed if seed is None else seed
        return uniform("mask", seed, batch["epoch"], batch["index"], n=self.net.tokens)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss, _, _ = self.net(batch["image"], self.noise(batch), self.mask_ratio)
        return loss

    # Evaluation

    def metrics(self, data: ImageData) -> MetricCollection:
        return MetricCollection({"loss": MeanMetric(), "mse": MeanMetric(), "mse_of_mean": MeanMetric()})

    def evaluate(self, net: MaskedAutoencoder, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        images = batch["image"].float()
        loss, prediction, mask = net(images, self.noise(batch), self.mask_ratio)
        reconstructions = net.reconstruct(images, prediction)
        truth = patchify(images, net.patch_size)
        scores["loss"].update(loss, weight=len(images))
        for name, guess in [("mse", patchify(reconstructions, net.patch_size)),
                            ("mse_of_mean", mean_of_visible(truth, mask, net.channels))]:  # fmt: skip
            error = (guess - truth).square().mean(dim=-1)
            scores[name].update((error * mask).sum(dim=1) / mask.sum(dim=1))
        if self.shown is None:
            self.shown = self.panels(images[:SHOWN], reconstructions[:SHOWN], mask[:SHOWN])

    def panels(self, images: Tensor, reconstructions: Tensor, mask: Tensor) -> Tensor:
        """Normalised images and reconstructions as they are shown, in their colours."""
        data = self.trainer.datamodule
        mean, std = (constant(values, images).view(-1, 1, 1) for values in (data.mean, data.std))
        return panels(images * std + mean, reconstructions * std + mean, mask, self.net.grid, self.net.patch_size)

    def draw(self, title: str) -> Figure:
        return figure(self.shown, f"{title}, {self.described(self.mask_ratio)}")

    def described(self, mask_ratio: float) -> str:
        target = self.net.norm_pix_loss
        lent = "" if target == "none" else " (means and scales from the truth)"
        return f"{mask_ratio:.0%} masked, patch size {self.net.patch_size}, norm_pix_loss {target}{lent}"

    # Prediction: for each file its picture

    def predict_step(self, batch: dict[str, Any], _: int) -> None:
        _, net = next(self.evaluated("predict"))
        ratio = self.mask_ratio if self.predict.mask_ratio is None else self.predict.mask_ratio
        images = batch["image"].float()
        _, prediction, mask = net(images, self.noise(batch, self.predict.seed), ratio)
        shown = self.panels(images, net.reconstruct(images, prediction), mask)
        folder = Path(self.trainer.default_root_dir) / "predictions"
        for name, row in zip(batch["file"], shown, strict=True):
            path = folder / f"{Path(name).relative_to(self.trainer.datamodule.images)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure(row[None], self.described(ratio)).savefig(path)

    def on_predict_epoch_end(self) -> None:
        print(f"reconstructions -> {Path(self.trainer.default_root_dir) / 'predictions'}")


def check_mask_ratio(key: str, mask_ratio: float) -> None:
    if not 0 < mask_ratio < 1:
        raise InputError(f"{key}: {mask_ratio} is not a share between 0 and 1, both excluded; MAE masks 0.75")


def mean_of_visible(patches: Tensor, mask: Tensor, channels: int) -> Tensor:
    """Patches (B, L, P * P * C) that all hold the mean of each channel over the visible patches of their image."""
    values = patches.unflatten(-1, (-1, channels))
    visible = (1 - mask)[:, :, None, None]
    mean = (values * visible).sum(dim=(1, 2), keepdim=True) / (visible.sum(dim=(1, 2), keepdim=True) * values.shape[2])
    return mean.expand_as(values).flatten(2)

"""The adversary of an autoencoder: a discriminator of patches, its hinge loss, and how much it weighs."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError

GROUP = 16  # channels of a group, or fewer where they do not divide, where norm is `group`
LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix (Isola et al. 2017): each logit judges one patch of an image, not the whole.

    Convolutions of 4x4: `layers` of stride 2, one of stride 1, and one to the logits. At 3 layers a logit sees 70x70
    pixels, and 256x256 images have 30x30 logits. It runs in the precision of its weights, under any autocast.

    Args:
        channels: of the images.
        image_size: (H, W) of the images.
        width: channels after the first convolution; they double with each further one, up to eightfold.
        layers: convolutions of stride 2.
        norm: `batch` as published. Its statistics are those of the images that a device holds at once, or of the global
            batch under trainer.sync_batchnorm, real images and reconstructions apart; none are kept for evaluation,
            where no discriminator runs. `group` normalises each image by itself, so that a batch may be divided.

    Raises:
        InputError: the images are too small for so many layers.
    """

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        width: int = 64,
        layers: int = 3,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        strides = [2] * layers + [1, 1]
        smallest = _input_side(strides)
        if min(image_size) < smallest:
            raise InputError(f"model.adversary.layers: {layers} need images of {smallest}x{smallest} pixels at least, "
                             f"not {'x'.join(map(str, image_size))}")
        widths = [channels, *(width * min(2**i, 8) for i in range(layers + 1))]
        parts: list[nn.Module] = []
        for i, (before, after, stride) in enumerate(zip(widths, widths[1:], strides, strict=False)):
            normed = i > 0
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=not normed or norm == "group")]
            parts += [_norm(norm, after)] * normed + [nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, 1, h, w), high where a patch looks real."""
        with torch.autocast(images.device.type, enabled=False):
            return self.main(images.to(self.main[0].weight.dtype))


def _input_side(strides: list[int]) -> int:
    """The smallest side of which 4x4 convolutions, padded by 1, leave one logit."""
    side = 1
    for stride in reversed(strides):
        side = (side - 1) * stride + 2
    return side


def _norm(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width, track_running_stats=False)
    return nn.GroupNorm(width // math.gcd(width, GROUP), width)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: the mean of both hinges over the logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """What lets the adversarial loss pull as strongly as the reconstruction loss does (Esser et al. 2021, equation 7).

    Args:
        reconstruction: the reconstruction loss's gradient at the decoder's last convolution.
        adversarial: the adversarial loss's gradient there.
    """
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)
    return ratio.clamp(0, LARGEST_WEIGHT).detach()

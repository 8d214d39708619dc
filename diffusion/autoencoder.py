"""Autoencoders between images and the latents that a diffusion Transformer is trained on.

`vq` quantises its latents with a codebook (Esser et al. 2021), `kl` draws them from a normal distribution held close to
the standard one (Rombach et al. 2022). The convolutional nets are diffusers'.

Shapes: B batch, C image channels, H x W pixels, z latent channels, h x w latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InputError
from diffusion.fingerprint import fingerprint

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

# Latent vectors compared with the codebook at once: 16,384 codes make that 268 MB of distances.
QUANTISED_AT_ONCE = 4096


class Reconstruction(NamedTuple):
    """What a training step needs of a batch.

    Args:
        images: reconstructed images (B, C, H, W).
        latents: what was decoded (B, z, h, w), neither quantised nor normalised.
        codebook_loss: of VQ; a mean over the batch.
        kl: of KL; nats of each image (B,).
        indices: of VQ; the code of each cell (B, h, w).
    """

    images: Tensor
    latents: Tensor
    codebook_loss: Tensor | None = None
    kl: Tensor | None = None
    indices: Tensor | None = None


class Autoencoder(nn.Module):
    """Images in [-1, 1] to latents and back.

    The defaults are the VQ model of 8x8 pixels a cell that latent diffusion published and the paper's latents fit
    (RECIPES 2.5). Stable Diffusion's KL model is kind=kl, multipliers=[1, 2, 4, 4], attention=middle.

    Args:
        kind: how latents are regularised.
        image_channels: C.
        channels: z, which of VQ is also the length of a code.
        codebook_size: codes of VQ.
        base: channels of the first level.
        multipliers: of `base`, one a level; each level after the first halves the image, so the factor follows.
        res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        attention: where cells see each other: nowhere, in the middle of both halves, or after the residual blocks of
            the coarsest level as well.
        groups: of the group norms; must divide `base`.
        beta: weight of VQ's commitment term, which pulls latents to their codes; the codes' own term has weight 1.
        legacy: weigh by `beta` the codes' term instead, as the published VQ models were trained.

    Attributes:
        factor: pixels a side of a latent cell.
        scale: latents times this have unit variance; 1 until `measure`.
        shift: what is taken from each channel before (z, 1, 1); 0 until `measure`.

    Raises:
        InputError: an argument that makes no net, with what would be right.
    """

    def __init__(
        self,
        kind: Literal["vq", "kl"] = "vq",
        image_channels: int = 3,
        channels: int = 4,
        codebook_size: int = 16384,
        base: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 4),
        res_blocks: int = 2,
        attention: Literal["none", "middle", "coarsest"] = "coarsest",
        groups: int = 32,
        beta: float = 0.25,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.channels, self.beta, self.legacy = kind, channels, beta, legacy
        # What a forward depends on beside the weights.
        self.config = {"kind": kind, "image_channels": image_channels, "channels": channels,
                       "codebook_size": codebook_size if kind == "vq" else None, "base": base,
                       "multipliers": list(multipliers), "res_blocks": res_blocks, "attention": attention,
                       "groups": groups}  # fmt: skip
        self._check_options()
        self.factor = 2 ** (len(multipliers) - 1)
        self.model = self._build()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(channels, 1, 1))

    def _check_options(self) -> None:
        for name, choices in [("kind", ("vq", "kl")), ("attention", ("none", "middle", "coarsest"))]:
            if self.config[name] not in choices:
                raise InputError(f"model.{name}={self.config[name]!r} is not known; choose one of {', '.join(choices)}")
        for name in ("image_channels", "channels", "codebook_size", "base", "res_blocks", "groups"):
            if self.config[name] is not None and self.config[name] < 1:
                raise InputError(f"model.{name}={self.config[name]} must be at least 1")
        multipliers, base, groups = self.config["multipliers"], self.config["base"], self.config["groups"]
        if not multipliers or min(multipliers) < 1:
            raise InputError(f"model.multipliers={multipliers} must name at least one level, each at least 1; "
                             "n levels reduce images by 2^(n - 1)")
        if base % groups:
            raise InputError(f"model.groups={groups} does not divide base={base}; groups={math.gcd(groups, base)} does")
        if self.beta < 0:
            raise InputError(f"model.beta={self.beta} must be at least 0")

    def _build(self) -> nn.Module:
        from diffusers import AutoencoderKL, VQModel  # costs 4 s, which `--help` need not wait for

        config, levels = self.config, len(self.config["multipliers"])
        down, up = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
        if config["attention"] == "coarsest":
            down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
        options = {
            "in_channels": config["image_channels"],
            "out_channels": config["image_channels"],
            "down_block_types": down,
            "up_block_types": up,
            "block_out_channels": [config["base"] * multiplier for multiplier in config["multipliers"]],
            "layers_per_block": config["res_blocks"],
            "latent_channels": config["channels"],
            "norm_num_groups": config["groups"],
            "mid_block_add_attention": config["attention"] != "none",
        }
        if self.kind == "vq":
            return VQModel(**options, num_vq_embeddings=config["codebook_size"], vq_embed_dim=config["channels"])
        return AutoencoderKL(**options)

    # Images to latents

    @property
    def moment_channels(self) -> int:
        """What `moments` has at each cell."""
        return self.channels if self.kind == "vq" else 2 * self.channels

    def moments(self, images: Tensor) -> Tensor:
        """What is worth caching of images (B, C, H, W) in [-1, 1], in fp32.

        Returns:
            VQ: latents before quantisation (B, z, h, w). KL: means and logarithms of variances (B, 2z, h, w).

        Raises:
            InputError: images that do not fit.
        """
        channels, height, width = images.shape[1:]
        if channels != self.config["image_channels"]:
            raise InputError(f"images of {channels} channels do not fit image_channels={self.config['image_channels']}")
        if height % self.factor or width % self.factor:
            raise InputError(f"images of {height}x{width} pixels cannot be reduced by {self.factor}: both sides must "
                             "be multiples of it")
        return self.model.quant_conv(self.model.encoder(images.to(self.model.dtype))).float()

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (B, z, h, w) from `moments`, not normalised.

        Args:
            moments: as `moments` returns them.
            noise: standard normal, of the latents' shape; without it KL gives the mean. VQ draws nothing.
        """
        if self.kind == "vq":
            return moments
        posterior = self._posterior(moments)
        return posterior.mean if noise is None else posterior.mean + posterior.std * noise

    def _posterior(self, moments: Tensor) -> DiagonalGaussianDistribution:
        """KL's normal distribution of each latent; the logarithm of its variance is clamped to [-30, 20]."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(moments.float())

    def _kl(self, moments: Tensor) -> Tensor:
        """Nats (B,) from each image's distribution to the standard normal, summed over its latents."""
        return self._posterior(moments).kl()

    # Latents to images

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each cell's nearest code, in fp32 under any autocast.

        diffusers' own quantiser is not called: it weighs the wrong term by beta, and finds the nearest code through a
        matrix product, which TF32 shortens to 10 bits and which cancels where latents lie far from 0. The direct
        distances to codes of 4 numbers take about as long.

        Returns:
            Codes (B, z, h, w), whose gradient is passed straight through to `latents`; the codebook loss; the codes'
            indices (B, h, w).
        """
        # Autocast leaves fp32 operands of cdist, embedding and mse_loss as they are.
        codebook = self.model.quantize.embedding.weight.float()
        cells = latents.float().movedim(1, -1)
        with torch.no_grad():
            indices = torch.cat([
                torch.cdist(some, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
                for some in cells.reshape(-1, self.channels).split(QUANTISED_AT_ONCE)
            ]).view(cells.shape[:-1])
        codes = F.embedding(indices, codebook)
        commitment, learning = F.mse_loss(cells, codes.detach()), F.mse_loss(codes, cells.detach())
        loss = commitment + self.beta * learning if self.legacy else self.beta * commitment + learning
        straight = cells + (codes - cells).detach()
        return straight.movedim(-1, 1), loss, indices

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) from latents that are not normalised; VQ quantises them first."""
        return self._decode(self.quantise(latents)[0] if self.kind == "vq" else latents)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decoder(self.model.post_quant_conv(latents.to(self.model.dtype)))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Images there and back, for training; `noise` as `sample` takes it."""
        moments = self.moments(images)
        latents = self.sample(moments, noise)
        if self.kind == "kl":
            return Reconstruction(self._decode(latents), latents, kl=self._kl(moments))
        codes, loss, indices = self.quantise(latents)
        return Reconstruction(self._decode(codes), latents, codebook_loss=loss, indices=indices)

    # The scale of latents

    def normalise(self, latents: Tensor) -> Tensor:
        """What a diffusion model sees of latents."""
        return (latents - self.shift) * self.scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """What `decode` takes of a diffusion model's latents."""
        return latents / self.scale + self.shift

    @torch.no_grad()
    def measure(self, moments: Iterable[Tensor]) -> None:
        """Sets `shift` to each channel's mean and `scale` to 1 / standard deviation of all that remains.

        One scale, as Stable Diffusion's 0.18215, keeps what one channel varies more than another, and so the distances
        that the autoencoder was trained to give. Channels have their own shift, as only a constant is lost by it: with
        a common one the scale would count the channels' distance from each other as variance of the images.

        KL's latents are taken as drawn: the variance is that of the means and the mean of the variances.

        Args:
            moments: batches of `moments`; several processes that measure must see the same ones.

        Raises:
            InputError: there is no batch.
            FloatingPointError: the latents are constant or not finite.
        """
        count, total, squares = 0, 0.0, 0.0
        for batch in moments:
            latents = self.sample(batch).double()
            spread = self._posterior(batch).var.double() if self.kind == "kl" else 0.0
            count += latents[:, 0].numel()
            total = total + latents.sum((0, 2, 3))
            squares = squares + (latents.square() + spread).sum((0, 2, 3))
        if not count:
            raise InputError("measuring the scale of latents needs at least one image")
        mean, power = total / count, squares / count
        std = (power - mean.square()).mean().sqrt().item()
        if not 1e-6 * power.mean().sqrt().item() < std < math.inf:  # 1e-6: what fp32 tells apart
            raise FloatingPointError(f"the latents' standard deviation is {std}: the autoencoder has collapsed, or its "
                                     "weights are not finite")
        self.shift.copy_(mean.view(-1, 1, 1))
        self.scale.fill_(1 / std)

    def fingerprint(self) -> str:
        """A hash of all that latents and images depend on: kind, configuration, weights, scale and shift."""
        return fingerprint(self, self.config)

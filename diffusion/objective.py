"""What both players of an adversarial autoencoder minimise in one step, and what such a step costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from common.errors import InputError
from diffusion.autoencoder import Autoencoder, Reconstruction
from diffusion.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from diffusion.perceptual import LPIPS


@dataclass
class Adversary:
    """The discriminator, and when it plays. Steps are the optimiser's.

    Args:
        weight: of the adversarial loss beside the adaptive weight; 0 trains without a discriminator.
        start: step with which the adversarial loss reaches the autoencoder.
        warmup: steps before that in which the discriminator learns alone; earlier ones do without it.
        width: see `diffusion.discriminator.PatchDiscriminator`, as the two below.
        layers: of stride 2.
        norm: `batch` or `group`.
    """

    weight: float = 0.8
    start: int = 250_001
    warmup: int = 0
    width: int = 64
    layers: int = 3
    norm: Literal["batch", "group"] = "batch"

    def __post_init__(self) -> None:
        for name, least in [("weight", 0), ("start", 0), ("warmup", 0), ("width", 1), ("layers", 1)]:
            if getattr(self, name) < least:
                raise InputError(f"model.adversary.{name}: {getattr(self, name)} is less than {least}")
        if self.warmup > self.start:
            raise InputError(f"model.adversary.warmup: {self.warmup} steps do not fit before start={self.start}")

    def build(self, channels: int, image_size: tuple[int, int]) -> PatchDiscriminator | None:
        if not self.weight:
            return None
        return PatchDiscriminator(channels, image_size, self.width, self.layers, self.norm)


class Players(NamedTuple):
    """The nets of a step; the perceptual loss is a judge and is never trained."""

    net: Autoencoder
    discriminator: PatchDiscriminator | None
    perceptual: LPIPS | None


class Pull:
    """What the adversarial loss of a step's micro-batches does to the autoencoder, until the last of them weighs it.

    The adaptive weight is a ratio of gradients of the whole batch. So the micro-batches before the last keep their
    gradient of the adversarial loss apart: another backward through the autoencoder for each, and a copy of the
    gradients.
    """

    def __init__(self) -> None:
        self.micro_batches = 0
        self.loss: Tensor | float = 0.0
        self.at_last: Tensor | float = 0.0  # the gradients that the adaptive weight compares
        self.gradients: dict[str, Tensor] = {}

    def add(self, loss: Tensor, at_last: Tensor, net: nn.Module, output: Tensor, at_output: Tensor) -> None:
        """Adds what a micro-batch's adversarial loss does to `net`, by the loss's gradient at what the net put out."""
        names, parameters = zip(*net.named_parameters(), strict=True)
        gradients = torch.autograd.grad(output, parameters, at_output, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:  # VQ's codes get none
                self.gradients[name] = self.gradients.get(name, 0) + gradient
        self.micro_batches += 1
        self.loss, self.at_last = self.loss + loss.detach(), self.at_last + at_last

    def on(self, net: nn.Module) -> Tensor | float:
        """A number that is the sum of the losses, and has their gradients at `net`."""
        parameters = dict(net.named_parameters())
        return self.loss + sum(((parameters[name] - parameters[name].detach()) * gradient).sum()
                               for name, gradient in self.gradients.items())  # fmt: skip


@dataclass
class Objective:
    """L1 + perceptual + codebook or KL + adversarial loss, and the discriminator's own, as one sum (Esser et al. 2021).

    The sum has one backward and one optimiser. It is two players' nonetheless: the adversarial loss sees the
    discriminator's parameters as constants, and the discriminator sees the reconstruction as one. Both so play on the
    same reconstruction, where the published training reconstructs again, with the autoencoder already moved, before
    the discriminator's turn.

    Everything but the autoencoder itself is fp32 under any autocast, the adaptive weight included.

    Args:
        adversary: the discriminator and its timing.
        perceptual_weight: of LPIPS, beside the mean absolute difference of pixels.
        codebook_weight: of VQ's codebook loss.
        kl_weight: of KL's divergence in nats for each number in an image (C, H, W). Latent diffusion's sums over pixels
            and over latents, divided by those numbers, are this: its weight of 1e-6 means the same here at any size.
    """

    adversary: Adversary
    perceptual_weight: float = 1.0
    codebook_weight: float = 1.0
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "codebook_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name}: {getattr(self, name)} is negative")

    def __call__(
        self,
        players: Players,
        images: Tensor,
        noise: Tensor | None,
        step: int,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
        earlier: Pull | None = None,
        more: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], Reconstruction]:
        """The loss of a batch, its terms before they are weighed, detached, and the reconstruction.

        The mean of the losses of a step's micro-batches, and of their gradients, is that of the whole batch, unless
        batch norm mixes its images. The last brings the adversarial loss of all.

        Args:
            images: (B, C, H, W) in [-1, 1].
            noise: KL's, standard normal of the latents' shape.
            step: optimiser steps done.
            mean_over_ranks: of the gradients in the adaptive weight, so that it is that of the global batch.
            earlier: of the step's micro-batches before this one; this one is added where `more` are to come.
            more: this is not the step's last micro-batch.
        """
        net, discriminator, perceptual = players
        last = net.model.decoder.conv_out
        with inputs_of(last) as inputs:
            out = net(images, noise)
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = out.images.float()
            distances = self.distances(perceptual, reconstruction, images)
            terms = {name: distance.mean() for name, distance in distances.items()}
            of_pixels = self.of_pixels(terms)
            if net.kind == "vq":
                terms["codebook"] = out.codebook_loss
                loss = of_pixels + self.codebook_weight * out.codebook_loss
            else:
                terms["kl"] = out.kl.mean()
                loss = of_pixels + self.kl_weight * terms["kl"] / images[0].numel()
            if discriminator is not None and step >= self.adversary.start - self.adversary.warmup:
                real, fake = discriminator(images), discriminator(reconstruction.detach())
                terms |= {"discriminator": hinge_loss(real, fake), "logits_real": real.mean(),
                          "logits_fake": fake.mean()}  # fmt: skip
                loss = loss + terms["discriminator"]
            if discriminator is not None and step >= self.adversary.start:
                constants = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
                terms["adversarial"] = -functional_call(discriminator, constants, (reconstruction,)).mean()
                at_output = [torch.autograd.grad(term, reconstruction, retain_graph=True)[0]
                             for term in (of_pixels, terms["adversarial"])]  # fmt: skip
                at_last = torch.stack([weight_gradient(gradient, last, inputs[0]) for gradient in at_output])
                earlier = earlier or Pull()
                if more:
                    earlier.add(terms["adversarial"], at_last, net, reconstruction, at_output[1])
                else:
                    mean = (earlier.at_last + at_last) / (earlier.micro_batches + 1)
                    terms["adaptive_weight"] = adaptive_weight(*mean_over_ranks(mean))
                    adversarial = earlier.on(net) + terms["adversarial"]
                    loss = loss + self.adversary.weight * terms["adaptive_weight"] * adversarial
        return loss, {name: term.detach() for name, term in terms.items()}, out

    def distances(self, perceptual: LPIPS | None, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Of each image (B,) to its reconstruction: `l1`, a mean over its numbers, and `perceptual` where it is on."""
        distances = {"l1": (reconstruction - images).abs().mean(dim=(1, 2, 3))}
        if perceptual is not None:
            distances["perceptual"] = perceptual(reconstruction, images)
        return distances

    def of_pixels(self, distances: dict[str, Tensor]) -> Tensor:
        """The reconstruction loss that `distances` add up to."""
        if "perceptual" not in distances:
            return distances["l1"]
        return distances["l1"] + self.perceptual_weight * distances["perceptual"]


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the module is called with."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def weight_gradient(at_output: Tensor, conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The gradient of a loss at the weights of a convolution of `inputs`, by that at its output, in fp32.

    Under autocast torch's own backward would compute it in bf16.
    """
    return conv2d_weight(inputs.detach().float(), conv.weight.shape, at_output, conv.stride, conv.padding)


class StepCost(NamedTuple):
    """FLOPs of one image: the autoencoder's forward, and a whole step; bytes that the step keeps for its backward."""

    forward_flops: int
    training_flops: int
    saved_bytes: int


def step_cost(objective: Objective, build: Callable[[], Players], channels: int, size: tuple[int, int]) -> StepCost:
    """Counts a step with everything in play on tensors without numbers, since no formula is as short as these nets.

    Bytes are those of fp32; bf16-mixed needs less, but not half: its norms stay in fp32.
    """
    from torch._subclasses import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    batch = 2  # batch norm refuses one image whose features have shrunk to one place
    kept: dict[int, Any] = {}  # by storage: several operations may keep one tensor

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(), torch.device("cpu"):
        players = build()
        net = players.net
        own = {parameter.untyped_storage()._cdata for part in players if part is not None
               for parameter in part.parameters()}  # fmt: skip
        images = torch.zeros(batch, channels, *size)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            latents = net(images).latents
        noise = None if net.kind == "vq" else torch.zeros_like(latents)
        with FlopCounterMode(display=False) as training:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, _, _ = objective(players, images, noise, objective.adversary.start)
            loss.backward()
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    return StepCost(forward.get_total_flops() // batch, training.get_total_flops() // batch, saved // batch)

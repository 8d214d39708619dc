"""DiT's training step against diffusers' DiTTransformer2DModel of the same size, on the same batch."""

from __future__ import annotations

import torch
from torch import nn

from common.benchmark.interleaving import raced
from common.training.optim import Recipe, adamw
from diffusion.dit import DiT
from diffusion.process import GaussianDiffusion

COLUMNS = ("model", "latents", "batch", "ours ms", "diffusers ms", "times as fast (quartiles)")
RECIPE = Recipe(lr=1e-4, weight_decay=0.0)


class Diffusers(nn.Module):
    """Their model with our forward: latents, timesteps and labels in, noise and variance out.

    Its blocks embed timestep and class each by themselves, which is what its users pay for.
    """

    def __init__(self, net: DiT) -> None:
        from diffusers import DiTTransformer2DModel  # costs 4 s

        super().__init__()
        self.model = DiTTransformer2DModel(
            num_attention_heads=net.heads, attention_head_dim=net.width // net.heads, in_channels=net.channels,
            out_channels=net.out_channels, num_layers=net.depth, sample_size=net.input_size[0], attention_bias=True,
            patch_size=net.patch_size, num_embeds_ada_norm=net.classes, norm_eps=1e-6,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drops: torch.Tensor) -> torch.Tensor:
        # It drops labels by torch's generator, while it is training.
        return self.model(x, timestep=t, class_labels=y, return_dict=False)[0]

    def no_weight_decay(self) -> set[str]:
        return set()


class Step:
    """A step of DiT's loss, backward and AdamW on one random batch."""

    def __init__(self, net: nn.Module, latents: tuple[int, ...], classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.net, self.process = net.train(), GaussianDiffusion()
        self.x0 = torch.randn(latents, generator=generator)
        self.noise = torch.randn(latents, generator=generator)
        self.t = torch.randint(self.process.steps, latents[:1], generator=generator)
        self.labels = torch.randint(classes, latents[:1], generator=generator)
        self.drops = torch.rand(latents[:1], generator=generator)
        self.optimizer = adamw(net, RECIPE, RECIPE.lr)

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        output = self.net(self.process.q_sample(self.x0, self.t, self.noise), self.t, self.labels, self.drops)
        mse, bound = self.process.training_losses(output, self.x0, self.t, self.noise)
        loss = (mse + bound).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measure(net: DiT, batch: int, rounds: int) -> tuple[str, ...]:
    """A row of the table; single steps of the two take turns."""
    latents = batch, net.channels, *net.input_size
    ours, theirs, ratio = raced(*(Step(side, latents, net.classes) for side in (net, Diffusers(net))), rounds)
    return (
        f"/{net.patch_size}, {net.depth} x {net.width}", "x".join(map(str, (*net.input_size, net.channels))),
        str(batch), f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{ratio:.3f}",
    )  # fmt: skip

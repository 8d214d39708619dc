"""DiT's training step against diffusers' DiTTransformer2DModel of the same size, on the same batch; and, as it runs by
default on a GPU, against itself in eager fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.benchmark.device import FAST, PLAIN, autocast, start_afresh
from common.benchmark.interleaving import raced
from common.training.compilation import compile_blocks
from common.training.optim import Recipe, adamw
from diffusion.dit import DiT
from diffusion.process import GaussianDiffusion

COLUMNS = ("model", "latents", "batch", "ours", "beside", "ours ms", "beside ms", "times as fast (quartiles)")
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

    def __init__(self, net: nn.Module, latents: tuple[int, ...], classes: int, bf16: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.net, self.process, self.bf16 = net.train(), GaussianDiffusion(), bf16
        self.device = next(net.parameters()).device
        draws = (
            torch.randn(latents, generator=generator), torch.randn(latents, generator=generator),
            torch.randint(self.process.steps, latents[:1], generator=generator),
            torch.randint(classes, latents[:1], generator=generator), torch.rand(latents[:1], generator=generator),
        )  # fmt: skip
        self.x0, self.noise, self.t, self.labels, self.drops = (draw.to(self.device) for draw in draws)
        self.optimizer = adamw(net, RECIPE, RECIPE.lr)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        with autocast(self.device, self.bf16):
            output = self.net(self.process.q_sample(self.x0, self.t, self.noise), self.t, self.labels, self.drops)
        mse, bound = self.process.training_losses(output, self.x0, self.t, self.noise)
        loss = (mse + bound).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def peers_of(net: DiT, fast: bool) -> dict[str, nn.Module]:
    """What the net is measured beside, by name."""
    peers: dict[str, nn.Module] = {f"diffusers, eager {PLAIN}": Diffusers(net)}
    if fast:
        peers[f"ours, eager {PLAIN}"] = copy.deepcopy(net)
    return peers


def measure(net: DiT, batch: int, rounds: int, fast: bool = False) -> Iterator[tuple[str, ...]]:
    """A row of the table for each peer; steps of the two take turns, ours in fp32, or `fast`: compiled and in bf16."""
    start_afresh()
    latents, device = (batch, net.channels, *net.input_size), next(net.parameters()).device
    peers = {name: peer.to(device) for name, peer in peers_of(net, fast).items()}
    if fast:
        compile_blocks(net)
    for name, peer in peers.items():
        ours, theirs, ratio = raced(
            Step(net, latents, net.classes, bf16=fast), Step(peer, latents, net.classes), rounds, device
        )
        yield (
            f"/{net.patch_size}, {net.depth} x {net.width}", "x".join(map(str, (*net.input_size, net.channels))),
            str(batch), FAST if fast else PLAIN, name, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{ratio:.3f}",
        )  # fmt: skip

"""MAE's training step against the same arithmetic through timm's blocks, with the same weights."""

from __future__ import annotations

import copy
import statistics
from functools import partial

import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from common.benchmark.interleaving import interleaved, ratios, timed
from common.model.transformer import LayerNorm
from common.training.optim import Recipe, adamw
from mae.model import MaskedAutoencoder

COLUMNS = ("encoder", "decoder", "image", "batch", "ours ms", "timm ms", "times as fast (quartiles)")
RECIPE = Recipe(lr=1e-4)
WARM_UP = 2  # steps: the first allocates the optimiser's state, the second meets warm caches


class Peer(TimmBlock):
    """timm's block in the place of ours."""

    def forward(self, x: Tensor, *_: None) -> Tensor:
        return super().forward(x)


def through_timm(net: MaskedAutoencoder) -> MaskedAutoencoder:
    """A copy whose blocks are timm's."""
    peer = copy.deepcopy(net)
    for name, width, heads in [("blocks", net.width, net.heads), ("decoder_blocks", net.decoder_width,
                                                                  net.decoder_heads)]:  # fmt: skip
        row = nn.ModuleList(Peer(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in getattr(net, name))
        row.load_state_dict(getattr(net, name).state_dict())
        setattr(peer, name, row)
    return peer


class Step:
    """A step of forward, backward and AdamW on one random batch, with new masks each time."""

    def __init__(self, net: MaskedAutoencoder, batch: int) -> None:
        self.net = net
        self.generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, net.channels, *net.image_size, generator=self.generator)
        self.optimizer = adamw(net, RECIPE, RECIPE.lr)

    def __call__(self) -> float:
        noise = torch.rand(len(self.images), self.net.tokens, generator=self.generator)
        self.optimizer.zero_grad()
        loss, _, _ = self.net(self.images, noise)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measure(net: MaskedAutoencoder, batch: int, rounds: int) -> tuple[str, ...]:
    """A row of the table; single steps of the two take turns."""
    steps = {"ours": Step(net, batch), "timm": Step(through_timm(net), batch)}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times = interleaved({name: timed(partial(step)) for name, step in steps.items()}, rounds)
    return (
        f"/{net.patch_size}, {net.depth} x {net.width}", f"{net.decoder_depth} x {net.decoder_width}",
        "x".join(map(str, net.image_size)), str(batch),
        *(f"{1e3 * statistics.median(values):.1f}" for values in times.values()),
        f"{ratios(times['ours'], times['timm']):.3f}",
    )  # fmt: skip

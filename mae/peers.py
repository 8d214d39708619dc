"""MAE's training step against the same arithmetic through timm's blocks, with the same weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from common.benchmark.device import CPU, start_afresh
from common.benchmark.interleaving import raced
from common.model.transformer import LayerNorm
from common.training.compilation import compile_blocks
from mae.model import MaskedAutoencoder
from mae.step import MASKED, Decoder, Step, autoencoder

COLUMNS = ("encoder", "decoder", "image", "batch", "ours ms", "timm ms", "times as fast (quartiles)")


class Case(NamedTuple):
    """An encoder of the table of sizes, its images (side, channels), its decoder, and the images of a step."""

    size: str
    patch_size: int
    side: int
    channels: int
    decoder: Decoder
    batch: int

    def net(self) -> MaskedAutoencoder:
        return autoencoder(self.size, self.patch_size, self.side, self.channels, self.decoder)


DEMO, NARROW = Decoder(48, 2, 3), Decoder(192, 4, 3)  # the former is that of mae/configs/digits.yaml


def cases(device: torch.device = CPU) -> list[Case]:
    """The demo's size and CIFAR's, on pixels and on patches; on a GPU CIFAR's on pixels alone."""
    if device.type == "cuda":
        return [Case("tiny", 1, 32, 3, NARROW, 256)]
    return [Case("nano", 1, 8, 1, DEMO, 128), Case("nano", 2, 8, 1, DEMO, 128),
            Case("tiny", 1, 32, 3, NARROW, 2), Case("tiny", 2, 32, 3, NARROW, 8)]  # fmt: skip


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


def sides(net: MaskedAutoencoder, fast: bool) -> tuple[MaskedAutoencoder, MaskedAutoencoder]:
    """Ours and timm's, with all blocks compiled where it is to be `fast`."""
    peer = through_timm(net)
    if fast:
        compile_blocks(net)
        for block in (*peer.blocks, *peer.decoder_blocks):  # in which compile_blocks finds no attention of ours
            block.compile(dynamic=False)
    return net, peer


def measure(net: MaskedAutoencoder, batch: int, rounds: int, fast: bool = False) -> tuple[str, ...]:
    """A row of the table; steps of the two take turns, in fp32, or `fast`: compiled and in bf16."""
    start_afresh()
    steps = (partial(Step(side, batch, bf16=fast), MASKED) for side in sides(net, fast))
    ours, theirs, ratio = raced(*steps, rounds, net.pos_embed.device)
    return (
        f"/{net.patch_size}, {net.depth} x {net.width}", f"{net.decoder_depth} x {net.decoder_width}",
        "x".join(map(str, (*net.image_size, net.channels))), str(batch), f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}",
        f"{ratio:.3f}",
    )  # fmt: skip

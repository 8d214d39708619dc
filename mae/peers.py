"""MAE's training step against the same arithmetic through timm's blocks, with the same weights."""

from __future__ import annotations

import copy
from functools import partial

from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from common.benchmark.interleaving import raced
from common.model.transformer import LayerNorm
from mae.benchmark import MASKED, Step
from mae.model import MaskedAutoencoder

COLUMNS = ("encoder", "decoder", "image", "batch", "ours ms", "timm ms", "times as fast (quartiles)")


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


def measure(net: MaskedAutoencoder, batch: int, rounds: int) -> tuple[str, ...]:
    """A row of the table; single steps of the two take turns."""
    ours, theirs, ratio = raced(*(partial(Step(side, batch), MASKED) for side in (net, through_timm(net))), rounds)
    return (
        f"/{net.patch_size}, {net.depth} x {net.width}", f"{net.decoder_depth} x {net.decoder_width}",
        "x".join(map(str, net.image_size)), str(batch), f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{ratio:.3f}",
    )  # fmt: skip

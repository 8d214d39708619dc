"""FLOPs and activation memory of a DiT by formula, for one image; one on the meta device will do."""

from __future__ import annotations

from common.model.flops import BYTES, Precision, block_bytes, block_flops
from diffusion.dit import SINUSOIDS, DiT


def forward_flops(net: DiT) -> int:
    """FLOPs of one image's forward."""
    patches = 2 * net.tokens * net.width * net.patch_size**2 * (net.channels + net.out_channels)
    return patches + net.depth * block_flops(net.tokens, net.width) + conditioning_flops(net)


def conditioning_flops(net: DiT) -> int:
    """FLOPs that an image costs whatever the number of its tokens: the timestep's MLP, and every adaLN modulation."""
    timestep = 2 * (SINUSOIDS + net.width) * net.width
    return timestep + 12 * net.width**2 * net.depth + 4 * net.width**2


def activation_bytes(net: DiT, precision: Precision = "32-true") -> int:
    """Bytes that the blocks keep for the backward of one image.

    Beyond those of a plain block there are per token four vectors of width D: both norms' outputs before they are
    modulated, in the precision of the residual stream, and both branches before they are gated. What belongs to the
    image and not to a token, and the weights' copies under bf16-mixed, is left out. A checkpointed block keeps its
    input alone, but one block at a time is computed again.
    """
    stream, inner = BYTES[precision]
    vectors = net.tokens * net.width
    block = block_bytes(net.tokens, net.width, precision, net.qk_norm) + 2 * vectors * (stream + inner)
    full = max(net.depth - net.checkpoint_blocks, 1)
    return full * block + net.checkpoint_blocks * vectors * stream

"""FLOPs and activation memory of a MaskedAutoencoder by formula; one on the meta device will do.

The encoder runs on the visible tokens and the class token, the decoder on all tokens and the class token.
"""

from __future__ import annotations

from common.model.flops import Precision, block_bytes, block_flops
from mae.model import MaskedAutoencoder


def visible_tokens(net: MaskedAutoencoder, mask_ratio: float) -> int:
    return int(net.tokens * (1 - mask_ratio))


def encoder_flops(net: MaskedAutoencoder, mask_ratio: float) -> int:
    """FLOPs of one image's forward through the patch embedding, of all patches, and the blocks."""
    embedding = 2 * net.tokens * net.patch_size**2 * net.channels * net.width
    return embedding + net.depth * block_flops(1 + visible_tokens(net, mask_ratio), net.width)


def decoder_flops(net: MaskedAutoencoder, mask_ratio: float) -> int:
    """FLOPs of one image's forward from the encoder's output to the predicted pixels."""
    embedding = 2 * (1 + visible_tokens(net, mask_ratio)) * net.width * net.decoder_width
    prediction = 2 * net.tokens * net.decoder_width * net.patch_size**2 * net.channels
    return embedding + net.decoder_depth * block_flops(1 + net.tokens, net.decoder_width) + prediction


def forward_flops(net: MaskedAutoencoder, mask_ratio: float) -> int:
    return encoder_flops(net, mask_ratio) + decoder_flops(net, mask_ratio)


def activation_bytes(net: MaskedAutoencoder, mask_ratio: float, precision: Precision = "32-true") -> int:
    """Bytes that the blocks of both halves keep for the backward of one image."""
    encoder = block_bytes(1 + visible_tokens(net, mask_ratio), net.width, precision, net.qk_norm)
    decoder = block_bytes(1 + net.tokens, net.decoder_width, precision, net.qk_norm)
    return net.depth * encoder + net.decoder_depth * decoder

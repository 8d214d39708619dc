"""Architecture alone: no optimiser, no logging, no distribution."""

from common.model.position import resample_position, sincos_position
from common.model.sizes import SIZES, Size, resolve_size
from common.model.tokens import LinearTokens, patchify, unpatchify
from common.model.transformer import Attention, Block, Mlp
from common.model.vit import VisionTransformer

__all__ = [
    "SIZES",
    "Attention",
    "Block",
    "LinearTokens",
    "Mlp",
    "Size",
    "VisionTransformer",
    "patchify",
    "resample_position",
    "resolve_size",
    "sincos_position",
    "unpatchify",
]

"""Parameters, FLOPs and activation memory of a VisionTransformer by formula; a model on the meta device will do.

One multiply-add is 2 FLOP. Norms, GELU, softmax and residuals are left out: they cost bytes, not FLOPs.
"""

from typing import Literal

from torch import nn

from common.model.vit import VisionTransformer


def parameters(model: VisionTransformer) -> int:
    """Number of trainable numbers; a fixed position table is not among them."""
    return sum(parameter.numel() for parameter in model.parameters())


def block_flops(tokens: int, width: int) -> int:
    """FLOPs of one block's forward on one sample of `tokens` tokens, prefix included."""
    linear = 24 * tokens * width**2  # qkv 6, projection 2, MLP 16
    attention = 4 * tokens**2 * width  # 2 for query times key, 2 for map times value
    return linear + attention


def forward_flops(model: VisionTransformer) -> int:
    """FLOPs of one image's forward."""
    projections = (module.weight for module in model.patch_embed.modules() if isinstance(module, nn.Linear))
    embedding = 2 * model.tokens * sum(weight.numel() for weight in projections)
    blocks = model.depth * block_flops(model.num_prefix_tokens + model.tokens, model.width)
    return embedding + blocks + 2 * model.width * model.classes


def training_flops(model: VisionTransformer) -> int:
    """Model FLOPs of one image's training step: the backward counts twice the forward.

    What kernels and checkpointing compute a second time is not counted, as is the custom for MFU.
    """
    return 3 * forward_flops(model)


Precision = Literal["64-true", "32-true", "bf16-mixed", "bf16-true"]  # Lightning's names

# Of a number of the residual stream, and of one within a branch.
BYTES = {"64-true": (8, 8), "32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}


def block_bytes(tokens: int, width: int, precision: Precision = "32-true", qk_norm: bool = False) -> int:
    """Bytes that a block keeps for the backward, of one sample of `tokens` tokens, without torch.compile.

    Per token 16 vectors of width D: the inputs of both norms, their outputs, q, k, v, the attention's output, and
    4 + 4 around the GELU. Under bf16-mixed the residual stream stays in fp32 and the rest is bf16.
    """
    stream, inner = BYTES[precision]
    return tokens * width * (2 * stream + (16 if qk_norm else 14) * inner)  # q and k before and after their norms


def activation_bytes(model: VisionTransformer, batch: int, precision: Precision = "32-true") -> int:
    """Peak bytes that the blocks keep for the backward of a batch.

    Under bf16-mixed a bf16 copy of the weights is among them. A checkpointed block keeps its input alone, but one
    block at a time is computed again.
    """
    tokens = batch * (model.num_prefix_tokens + model.tokens)
    block = block_bytes(tokens, model.width, precision, model.qk_norm)
    if precision == "bf16-mixed":
        block += 12 * model.width**2 * 2
    full = max(model.depth - model.checkpoint_blocks, 1)
    return full * block + model.checkpoint_blocks * tokens * model.width * BYTES[precision][0]

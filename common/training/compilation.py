"""Compiled blocks: what torch.compile gains, at the places where a net repeats itself."""

from __future__ import annotations

import torch
from torch import nn

from common.model.transformer import block_lists

# Forms that a row of blocks comes in: with dropped paths and without, training and evaluation, and last batches.
FORMS = 32


def compile_blocks(net: nn.Module, backend: str = "inductor") -> None:
    """Compiles the Transformer blocks of a net in place, so that names of parameters stay as they are.

    All blocks of a row share one compiled form for each shape of their input; torch compiles it at its first use, and
    keeps it on disk for the next start. A copy of the net runs as before. Results agree to rounding.
    """
    torch._dynamo.config.recompile_limit = FORMS
    # Blocks are reduced one after the other as they are; for whole nets torch would cut them by DDP's buckets.
    torch._dynamo.config.optimize_ddp = False
    for row in block_lists(net):
        for block in row:
            block.compile(backend=backend, dynamic=False)

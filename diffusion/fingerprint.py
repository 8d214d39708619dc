"""What tells trained nets apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint(net: nn.Module, config: dict[str, Any]) -> str:
    """A hash of a net's weights and buffers, and of what its outputs depend on beside them.

    SHA-256; the 1.8 GB of a DiT-L take some seconds.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

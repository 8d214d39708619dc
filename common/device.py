"""Which device computes, and what it can do: its memory, and its peak."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# Dense bf16 tensor-core peaks by the makers' data sheets.
# The first whose name is part of the device's.
_PEAKS = {"H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
          "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # fmt: skip


def accelerator(asked: str) -> str:
    """Lightning's name of it, where `auto` is a CUDA GPU if there is one, else the CPU.

    Lightning's own `auto` would take Apple's GPU too, which has no float64.
    """
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_flops(name: str) -> float | None:
    """FLOP/s that a GPU of this name could do at most in bf16; None for one that is not in the table."""
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def device_memory(device: torch.device) -> int:
    """Bytes of memory of the device; of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """These numbers as a tensor beside another, in its precision, or in fp32 beside whole numbers; to be read alone.

    To make one on a GPU waits until the GPU has done all that it was asked for; so each is made once.
    """
    return _made(tuple(values), like.dtype if like.is_floating_point() else torch.float32, like.device)


@functools.lru_cache(maxsize=256)
def _made(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what a validation made, a training may use
        return torch.tensor(values, dtype=dtype, device=device)


def has_bf16() -> bool:
    """Whether the CPU multiplies in bf16; others only imitate it, many times slower."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_avx512_bf16() -> bool:
    """Whether the CPU multiplies in bf16 by AVX-512's instructions."""
    return torch.cpu._is_avx512_bf16_supported()


def has_matrix_unit() -> bool:
    """Whether the CPU multiplies in tiles (AMX), and not with its vectors alone."""
    return torch.cpu._is_amx_tile_supported()

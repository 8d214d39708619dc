"""Position tables of shape (1, prefix + h * w, D): fixed sine-cosine ones, and resampling to another grid.

A learned table is a plain parameter of the model. It knows nothing of the grid; resampling it, or starting from sines
and cosines, brings a 2D prior back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError


def sincos_position(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Fixed 2D sine-cosine table (He et al. 2022) for a grid (h, w), square or not.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of
    position / 10000^(k / (D / 4)), k = 0 .. D / 4 - 1. The `prefix` rows in front (the class token's) are zero.
    """
    if width % 4:
        raise InputError(f"position=sincos needs a width divisible by 4, got width={width}")
    h, w = grid
    # In float64, so that the table does not depend on a platform's float32 sines.
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows = _sincos(torch.arange(h, dtype=torch.float64), frequencies)
    columns = _sincos(torch.arange(w, dtype=torch.float64), frequencies)
    both = torch.cat([columns[None].expand(h, w, -1), rows[:, None].expand(h, w, -1)], dim=-1)
    return F.pad(both.reshape(1, h * w, width).float(), (0, 0, prefix, 0))


def _sincos(positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def resample_position(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix: int) -> Tensor:
    """Resample a table (1, prefix + h * w, D) from one grid (h, w) to another; the `prefix` rows stay as they are.

    Antialiased bicubic interpolation in fp32, which treats neighbouring rows as neighbours in the plane: a 2D prior
    that a learned table does not have (paper, section 2.2). The caller says so to the user.
    """
    assert table.shape[1] == prefix + old_grid[0] * old_grid[1], f"{tuple(table.shape)} does not hold {old_grid}"
    if old_grid == new_grid:
        return table
    plane = table[:, prefix:].float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    resampled = F.interpolate(plane, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :prefix], resampled.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)

"""Attention distance and offset. Shapes: B images, H heads, N = prefix + L tokens, L = rows x columns of a grid.

Distance is that of Dosovitskiy et al. (2021), offset that of Walmer et al. (2023); RECIPES 3.4. Both count index steps
on the grid and divide by its longer side, so that they are shares of the image, also where it is not square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Measures(NamedTuple):
    """Of every layer and head, (layers, H), over all queries and images.

    Attributes:
        distance: mean distance between a query and what it attends to, as a share of the image's side K.
        distance_to_last: the same, with indices scaled by K - 1, as published code has it.
        offset: norm of the mean displacement from queries to the centres of their maps, one step being 1 / (K - 1) on a
            canvas of 2K - 1 steps with the query in its middle; directions cancel between queries.
        offset_per_query: mean of the displacements' norms, which do not cancel.
    """

    distance: Tensor
    distance_to_last: Tensor
    offset: Tensor
    offset_per_query: Tensor


def without_prefix(maps: Tensor, prefix: int) -> Tensor:
    """Maps (B, H, N, N) between image tokens alone, (B, H, L, L), each row summing to one again."""
    maps = maps[:, :, prefix:, prefix:]
    return maps / maps.sum(-1, keepdim=True)


class AttentionMeasures:
    """Adds up maps layer by layer, so that no more than one layer's maps of one batch are ever held.

    Args:
        grid: rows and columns of tokens.
        prefix: tokens before those of the image.
    """

    def __init__(self, grid: tuple[int, int], prefix: int) -> None:
        self.prefix, self.side = prefix, max(grid)
        rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
        self.places = torch.stack([rows.flatten(), columns.flatten()], dim=1)  # (L, 2)
        self._distances = torch.cdist(self.places, self.places)
        self._sums: dict[int, list[Tensor]] = {}
        self._images: dict[int, int] = {}

    def update(self, layer: int, maps: Tensor) -> None:
        """Adds the maps (B, H, N, N) of one layer."""
        maps = without_prefix(maps.float(), self.prefix)
        over_images = maps.sum(0)  # distance and offset are linear in the maps
        displacement = maps @ self.places.to(maps) - self.places.to(maps)  # (B, H, L, 2)
        sums = [
            (over_images * self._distances.to(maps)).sum(-1).mean(-1).double(),
            displacement.mean(2).sum(0).double(),
            displacement.norm(dim=-1).mean(2).sum(0).double(),
        ]
        before = self._sums.get(layer)
        self._sums[layer] = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]
        self._images[layer] = self._images.get(layer, 0) + len(maps)

    def compute(self) -> Measures:
        distance, displacement, per_query = (
            torch.stack([self._sums[layer][i] / self._images[layer] for layer in sorted(self._sums)]).cpu()
            for i in range(3)
        )
        last = self.side - 1
        return Measures(distance / self.side, distance / last, displacement.norm(dim=-1) / last, per_query / last)

"""Pixel permutation (paper, section 5, figures 4 and 5): swaps of pixel pairs, the same in every image.

Shapes: B batch, C channels, H x W pixels, P patch, T swaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import InputError
from common.model.vit import patch_grid
from common.randomness import permutation, uniform

Delta = int | Literal["inf"]


@dataclass(frozen=True)
class Permutation:
    """Which pixels change places. No pixel takes part in two swaps, so at most half of the pixels' number are possible.

    Args:
        swaps: T, the number of pairs.
        share: T as a share of all pairs instead, from 0 to 1; rounded.
        delta: how far the two pixels of a pair may be apart: in the window form both offsets are below it, in the
            manhattan form their sum is at most it; inf is any distance. Smaller deltas than 2 allow no pair.
        distance: the form; the paper's words fit both.
        pairs: where a pair may lie: anywhere, within one patch, across two patches; or shared: the same swaps within
            every patch, which only reorders the inputs of the token projection.
        patch_size: of within, across and shared; the model's own where left out.
        seed: of the draw; the run's own where left out.
    """

    swaps: int = 0
    share: float | None = None
    delta: Delta = "inf"
    distance: Literal["window", "manhattan"] = "window"
    pairs: Literal["anywhere", "within", "across", "shared"] = "anywhere"
    patch_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.swaps < 0:
            raise InputError(f"model.permutation.swaps: {self.swaps} is negative; 0 leaves images intact")
        if self.share is not None and self.swaps:
            raise InputError(f"model.permutation.share: {self.share} and model.permutation.swaps: {self.swaps} say the "
                             "same thing twice; give one")
        if self.share is not None and not 0 <= self.share <= 1:
            raise InputError(f"model.permutation.share: {self.share} is not a share of all pairs, from 0 to 1")
        if self.patch_size is not None and self.patch_size < 1:
            raise InputError(f"model.permutation.patch_size: {self.patch_size} is not a positive number of pixels")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"model.permutation.seed: {self.seed} is negative; leave it out for the run's own")
        if self.delta != "inf" and self.delta < 2:
            raise InputError(f"model.permutation.delta: {self.delta} allows no swap; 2 is the least, inf any distance")

    def count(self, pairs: int) -> int:
        """T, of so many pairs in all."""
        return self.swaps if self.share is None else round(self.share * pairs)

    def order(self, size: tuple[int, int], patch_size: int, seed: int) -> Tensor:
        """The source of each pixel, int64 (H * W,), of an image of `size` = (H, W): its own inverse.

        `patch_size` and `seed` are the model's and the run's, for those that are not given. With one seed the pairs of
        fewer swaps are among those of more.

        Raises:
            InputError: more swaps than there are pairs, or than this seed reaches under delta.
        """
        with torch.device("cpu"):  # Lightning builds modules under the GPU's
            return self._order(size, self.patch_size or patch_size, seed if self.seed is None else self.seed)

    def _order(self, size: tuple[int, int], patch_size: int, seed: int) -> Tensor:
        height, width = size
        pairs = height * width // 2
        swaps = self.count(pairs)
        given = f"model.permutation.swaps: {swaps}"
        if swaps > pairs:
            raise InputError(f"{given} are more than the {pairs} pairs of {height}x{width} pixels")
        h, w = (1, 1) if self.pairs == "anywhere" else patch_grid(size, patch_size, self._patch_option)
        copies = h * w if self.pairs == "shared" else 1
        if swaps % copies:
            below = swaps // copies * copies
            near = [n for n in (below, below + copies) if 0 < n <= copies * (patch_size**2 // 2)]
            raise InputError(f"{given} do not divide over {copies} patches of {patch_size}x{patch_size} pixels, which "
                             f"share their swaps; {' or '.join(map(str, near or [0]))} would")
        place = (patch_size, patch_size) if self.pairs == "shared" else size
        patch = None
        if self.pairs in ("within", "across"):
            patch = np.arange(h * w).reshape(h, w).repeat(patch_size, 0).repeat(patch_size, 1)
        found = self._paired(place, swaps // copies, patch, seed)
        if len(found) < swaps // copies:
            raise InputError(f"{given} do not fit into {height}x{width} pixels with delta={self.delta}, "
                             f"distance={self.distance}, pairs={self.pairs}; this seed reaches {copies * len(found)}")
        order = _swapped(found, place[0] * place[1])
        return _tiled(order, (h, w), patch_size) if self.pairs == "shared" else order

    @property
    def _patch_option(self) -> str:
        return "model.patch_size" if self.patch_size is None else "model.permutation.patch_size"

    def _paired(self, size: tuple[int, int], swaps: int, patch: np.ndarray | None, seed: int) -> np.ndarray:
        """At most so many pairs, (T, 2) pixel numbers. `patch` (H, W) numbers the patches where they bind the pairs."""
        height, width = size
        visited = permutation("swapped pixels", seed, n=height * width)
        if self.delta == "inf" and patch is None:
            return visited[: 2 * swaps].view(-1, 2).numpy()  # consecutive ones of a shuffle
        # Greedy: each pixel in a random order takes a random free one within reach.
        draws = uniform("partners", seed, torch.arange(height * width), n=1)[:, 0].tolist()
        reach = self._reach(size)
        high, wide = reach.shape[0] // 2, reach.shape[1] // 2
        free = np.ones(size, bool)
        found: list[tuple[int, int]] = []
        for number in visited.tolist() if swaps else []:
            y, x = divmod(number, width)
            if not free[y, x]:
                continue
            free[y, x] = False  # whether it finds a partner or not: later ones would not find it sooner
            top, left = max(y - high, 0), max(x - wide, 0)
            window = np.s_[top : y + high + 1, left : x + wide + 1]
            allowed = free[window]
            allowed = allowed & reach[top - y + high :, left - x + wide :][: allowed.shape[0], : allowed.shape[1]]
            if patch is not None:
                allowed &= (patch[window] == patch[y, x]) == (self.pairs == "within")
            partners = np.flatnonzero(allowed)
            if len(partners):
                chosen = partners[int(draws[number] * len(partners))]
                row, column = divmod(int(chosen), allowed.shape[1])
                free[top + row, left + column] = False
                found.append((number, (top + row) * width + left + column))
                if len(found) == swaps:
                    break
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def _reach(self, size: tuple[int, int]) -> np.ndarray:
        """Which offsets a partner may have: bool, odd sides, the pixel itself in the middle."""
        furthest = max(size) if self.delta == "inf" else self.delta
        high, wide = (min(furthest, side) for side in size)
        rows, columns = np.abs(np.arange(-high, high + 1))[:, None], np.abs(np.arange(-wide, wide + 1))
        if self.delta == "inf":
            return np.ones((2 * high + 1, 2 * wide + 1), bool)
        if self.distance == "window":
            return (rows < self.delta) & (columns < self.delta)
        return rows + columns <= self.delta


INTACT = Permutation()


def _swapped(pairs: np.ndarray, pixels: int) -> Tensor:
    order = torch.arange(pixels)
    one, other = torch.from_numpy(pairs).unbind(1)
    order[one], order[other] = other, one
    return order


def _tiled(order: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The order of one patch's pixels, in each patch of a grid (h, w)."""
    (h, w), row = grid, torch.div(order, patch_size, rounding_mode="floor")
    row, column = row.view(patch_size, patch_size), (order % patch_size).view(patch_size, patch_size)
    rows = (torch.arange(h) * patch_size)[:, None, None, None] + row[:, None]  # (h, P, 1, P)
    columns = (torch.arange(w) * patch_size)[:, None] + column[:, None]  # (P, w, P)
    return (rows * (w * patch_size) + columns).flatten()


class PixelPermutation(nn.Module):
    """Applies an order of pixels to images (B, C, H, W), whatever their type. A checkpoint keeps it, as a buffer."""

    def __init__(self, order: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("order", order)

    @property
    def moved(self) -> int:
        """Pixels that are not where they were."""
        return int((self.order != torch.arange(len(self.order), device=self.order.device)).sum())

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != self.size:
            height, width = images.shape[2:]
            raise InputError(f"images of {height}x{width} pixels do not fit a permutation of "
                             f"{self.size[0]}x{self.size[1]}")
        return images.flatten(2).index_select(2, self.order).view_as(images)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kept = state_dict.get(prefix + "order")
        if kept is not None and kept.shape != self.order.shape:
            raise InputError(f"the checkpoint's permutation is of {len(kept)} pixels, and data.image_size is "
                             f"{self.size[0]}x{self.size[1]}")
        if kept is not None and not torch.equal(kept.cpu(), self.order.cpu()):
            from lightning.pytorch.utilities import rank_zero_warn

            rank_zero_warn("the checkpoint was trained under another permutation than model.permutation and its seed "
                           "give; the checkpoint's is used")
        super()._load_from_state_dict(state_dict, prefix, *args)

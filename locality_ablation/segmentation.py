"""Images cut into irregular segments, which become tokens (paper, appendix H).

Shapes: B batch, C channels, H x W pixels, S segments.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError

LIMIT = 225  # tokens that the paper allows an image (App. H)


class Segments(NamedTuple):
    """Of one image: the segment of each pixel, uint8 (H, W), numbered by their first pixels from 0 up; and the share of
    the pixels whose segment was merged into another to keep the limit.
    """

    labels: Tensor
    merged: float


class Segmentation:
    """A way to cut an image; what is beyond `limit` segments is merged.

    Args:
        limit: the most segments of an image, at most 255.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        if not 1 <= limit <= 255:
            raise InputError(f"data.segmentation.limit: {limit} segments; 1 to 255 are possible, the paper has {LIMIT}")
        self.limit = limit

    def cut(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, C) in [0, 1] to the segment of each pixel, integers (H, W)."""
        raise NotImplementedError

    def __call__(self, image: Tensor) -> Segments:
        """An image uint8 (C, H, W)."""
        pixels = image.permute(1, 2, 0).numpy().astype(np.float64) / 255
        labels, merged = merge(self.cut(pixels), pixels, self.limit)
        return Segments(torch.from_numpy(labels.astype(np.uint8)), merged)


class Slic(Segmentation):
    """SLIC (Achanta et al. 2012): k-means of colour and place, from a regular grid.

    After few iterations segments are still close to the grid, that is to patches: the first of scikit-image knows no
    colour and leaves the grid as it is, where nothing is too small or too large.

    Args:
        iterations: of k-means.
        segments: that it starts from; 196 is the grid of 16x16 patches at 224 pixels.
        compactness: weight of place against colour.
        limit: the most segments of an image, at most 255.
    """

    def __init__(
        self, iterations: int = 1, segments: int = 196, compactness: float = 10.0, limit: int = LIMIT
    ) -> None:
        super().__init__(limit)
        if iterations < 1 or segments < 1:
            raise InputError(f"data.segmentation: {iterations} iterations from {segments} segments; SLIC needs 1 or "
                             "more of both")
        self.iterations, self.segments, self.compactness = iterations, segments, compactness

    def cut(self, image: np.ndarray) -> np.ndarray:
        from skimage.segmentation import slic

        return slic(image, self.segments, self.compactness, self.iterations, start_label=0)


class Felzenszwalb(Segmentation):
    """Felzenszwalb and Huttenlocher (2004): regions of a graph of pixels, as large as their contrast allows.

    Args:
        scale: the higher, the larger the segments; the paper has 30.
        sigma: of the Gaussian filter before it.
        min_size: smaller segments are merged by the algorithm itself.
        limit: the most segments of an image, at most 255.
    """

    def __init__(self, scale: float = 30.0, sigma: float = 0.8, min_size: int = 20, limit: int = LIMIT) -> None:
        super().__init__(limit)
        for name, value, least in [("scale", scale, 0), ("sigma", sigma, 0), ("min_size", min_size, 1)]:
            if not value >= least:
                raise InputError(f"data.segmentation.{name}: {value} is below {least}")
        self.scale, self.sigma, self.min_size = scale, sigma, min_size

    def cut(self, image: np.ndarray) -> np.ndarray:
        from skimage.segmentation import felzenszwalb

        return felzenszwalb(image, self.scale, self.sigma, self.min_size)


def merge(labels: np.ndarray, image: np.ndarray, limit: int) -> tuple[np.ndarray, float]:
    """Merges the smallest segments until `limit` are left, each into the neighbour whose mean colour is nearest.

    Args:
        labels: integers (H, W).
        image: (H, W, C).

    Returns:
        Labels numbered by their first pixels from 0 up, and the share of pixels that were merged into another segment.
    """
    labels, count = _numbered(labels)
    if count <= limit:
        return labels, 0.0
    size = np.bincount(labels.ravel())
    colour = np.stack([np.bincount(labels.ravel(), channel.ravel()) for channel in np.moveaxis(image, -1, 0)], axis=1)
    neighbours = _neighbours(labels, count)
    into = np.arange(count)  # the segment that each was merged into, or itself
    own = size.copy()  # a segment's pixels before anything was merged into it
    smallest = [(pixels, segment) for segment, pixels in enumerate(size.tolist())]
    heapq.heapify(smallest)
    left = count
    while left > limit:
        pixels, segment = heapq.heappop(smallest)
        if into[segment] != segment or pixels != size[segment]:
            continue  # merged, or grown, since it was put there
        around = sorted(neighbours[segment])
        distance = ((colour[around] / size[around, None] - colour[segment] / size[segment]) ** 2).sum(1)
        target = around[int(distance.argmin())]
        into[segment] = target
        size[target] += size[segment]
        colour[target] += colour[segment]
        neighbours[target] |= neighbours[segment]
        for other in neighbours[segment]:
            neighbours[other] = (neighbours[other] - {segment}) | {target}
        neighbours[target] -= {target, segment}
        heapq.heappush(smallest, (int(size[target]), target))
        left -= 1
    moved = own[into != np.arange(count)].sum()
    while (into != into[into]).any():
        into = into[into]
    return _numbered(into[labels])[0], float(moved / labels.size)


def _numbered(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels (H, W) numbered by their first pixels from 0 up, and how many there are."""
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort()[numbers].reshape(labels.shape), len(first)


def _neighbours(labels: np.ndarray, count: int) -> list[set[int]]:
    """The segments that touch each, side by side or one above the other."""
    pairs = [(labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])]
    borders = [np.stack([a[a != b], b[a != b]], axis=1) for a, b in pairs]
    found: list[set[int]] = [set() for _ in range(count)]
    for one, other in np.unique(np.concatenate(borders), axis=0).tolist():
        found[one].add(other)
        found[other].add(one)
    return found

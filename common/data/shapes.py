"""Pictures that the project renders: a textured shape on a coloured ground, told by its outline or by its surface."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.data.sources import Pictures, Source
from common.errors import InputError
from common.randomness import uniform

LARGEST = 64
PIECE = 256  # pictures rendered at once, so that operands stay in a core's cache


# Outlines: how far a point (x, y), in units of the shape's radius, lies outside; y points down.


def _length(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y)


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 0.9


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.68).abs() - 0.27


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = x.abs() * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
    return torch.maximum(side - 0.52, y - 0.6)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.3, torch.maximum(x, y) - 0.95)


def _star(x: Tensor, y: Tensor) -> Tensor:
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y).remainder(fifth).sub(fifth / 2).abs()  # 0 in a notch, a tenth of a turn on a point
    u, v = _length(x, y) * angle.cos(), _length(x, y) * angle.sin()
    (u0, v0), (u1, v1) = (0.42, 0.0), (math.cos(fifth / 2) * 1.05, math.sin(fifth / 2) * 1.05)
    edge = math.hypot(u1 - u0, v1 - v0)
    return ((u - u0) * (v1 - v0) - (v - v0) * (u1 - u0)) / edge


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_length(x, y) - 0.95, 0.78 - _length(x - 0.42, y))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y, half = x.abs(), y - 0.08, 0.78  # a square on its corner, with half a disc on each of its upper sides
    disc = _length(x - half / 2, y + half / 2) - half * math.sqrt(0.5)
    return torch.minimum(disc, (x + y.abs() - half) * math.sqrt(0.5))


# Textures: a wave of (u, v), in periods of the pattern; the share of the second colour rises with its sign.


def _plain(u: Tensor, v: Tensor) -> Tensor:
    return torch.full_like(u, -1.0)


def _stripes(u: Tensor, v: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * u)


def _checks(u: Tensor, v: Tensor) -> Tensor:
    return torch.sin(math.pi * u) * torch.sin(math.pi * v) * 2


def _dots(u: Tensor, v: Tensor) -> Tensor:
    return 4 * (0.34 - _length((u % 1) - 0.5, (v % 1) - 0.5))


def _grid(u: Tensor, v: Tensor) -> Tensor:
    return 4 * (0.15 - torch.minimum(((u % 1) - 0.5).abs(), ((v % 1) - 0.5).abs()))


def _zigzag(u: Tensor, v: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * (u + 0.8 * ((v * 0.8 % 1) - 0.5).abs()))


def _rings(u: Tensor, v: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * _length(u, v))


def _blotches(u: Tensor, v: Tensor) -> Tensor:
    waves = [(1.0, 0.3, 0.7), (-0.45, 0.9, 2.1), (0.62, -0.71, 4.0), (0.2, 1.3, 5.2), (-1.2, -0.25, 1.3)]
    return sum(torch.sin(math.pi * (a * u + b * v) + c) for a, b, c in waves) / 2


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc, "ring": _ring, "square": _square, "triangle": _triangle,
    "cross": _cross, "star": _star, "crescent": _crescent, "heart": _heart,
}  # fmt: skip
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": _plain, "stripes": _stripes, "checks": _checks, "dots": _dots,
    "grid": _grid, "zigzag": _zigzag, "rings": _rings, "blotches": _blotches,
}  # fmt: skip


class CueConflict(NamedTuple):
    """Pictures whose outline says one class and whose surface another."""

    images: Tensor  # uint8 (N, 3, H, W)
    shapes: Tensor  # int64 (N,), the class of the outline
    textures: Tensor  # int64 (N,), the class of the surface, never the same


class Shapes(Source):
    """RGB pictures of eight shapes with eight textures in any colours, position, size and tilt; a function of the seed.

    Labels are `shape`, under any texture; `texture`, under any shape; or `both`: the shape of class k always wears
    texture k, so that either cue tells the class. A model trained on `both` shows on `cue_conflict` which one it uses.

    Args:
        size: height and width in pixels, 8 to 64.
        label: what the classes are.
        train: training pictures; val and test hold 2000 each.
        seed: of the pictures, so that runs with different seeds still share them.
    """

    name, resident = "shapes", True
    held_out = 2000

    def __init__(
        self, size: int = 32, label: Literal["shape", "texture", "both"] = "shape", train: int = 10_000, seed: int = 0
    ) -> None:
        if not 8 <= size <= LARGEST:
            raise InputError(f"data.source.size: {size} is not between 8 and {LARGEST} pixels")
        if train < 1:
            raise InputError(f"data.source.train: {train} is not a positive number of pictures")
        self.size, self.label, self.train, self.seed = size, label, train, seed

    def title(self, root: Path) -> str:
        return f"{self.name}, by {self.label}"

    def class_names(self, root: Path) -> list[str]:
        if self.label == "both":
            return [f"{shape}, {texture}" for shape, texture in zip(OUTLINES, TEXTURES, strict=True)]
        return list(OUTLINES if self.label == "shape" else TEXTURES)

    def labels(self, root: Path, split: str) -> Tensor:
        # Classes take turns, so that each has its share; the other cue is drawn.
        return torch.arange(self.train if split == "train" else self.held_out) % len(OUTLINES)

    def read(self, root: Path, split: str) -> Pictures:
        label = self.labels(root, split)
        index = torch.arange(len(label))
        other = (uniform(f"shapes/{split}/cue", self.seed, index, n=1)[:, 0] * len(OUTLINES)).long()
        shapes = other if self.label == "texture" else label
        textures = other if self.label == "shape" else label
        return Pictures(self._render(f"shapes/{split}", index, shapes, textures), label)

    def cue_conflict(self, count: int = 1120) -> CueConflict:
        """Pictures of all 56 pairs of a shape and another class's texture, in turn."""
        index = torch.arange(count)
        classes = len(OUTLINES)
        shapes = index % classes
        textures = (shapes + 1 + index // classes % (classes - 1)) % classes
        return CueConflict(self._render("shapes/conflict", index, shapes, textures), shapes, textures)

    def _render(self, stream: str, index: Tensor, shapes: Tensor, textures: Tensor) -> Tensor:
        pieces = zip(*(x.split(PIECE) for x in (index, shapes, textures)), strict=True)
        return torch.cat([render(uniform(stream, self.seed, i, n=DRAWS), s, t, self.size) for i, s, t in pieces])


DRAWS = 22


def render(draws: Tensor, shapes: Tensor, textures: Tensor, size: int) -> Tensor:
    """Pictures uint8 (B, 3, size, size) of shapes and textures (B,), all else from uniform `draws` (B, DRAWS)."""

    def between(column: int, low: float, high: float) -> Tensor:
        return (low + (high - low) * draws[:, column])[:, None, None]

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = axis[None, None, :], axis[None, :, None]
    radius = between(0, 0.5, 0.8)
    spare = 1 - radius
    x, y = x - spare * between(1, -1, 1), y - spare * between(2, -1, 1)
    across, along = _turned(x / radius, y / radius, between(3, -0.35, 0.35))
    outside = _of_each(OUTLINES, shapes, across, along) * radius * size / 2  # in pixels
    coverage = (0.5 - outside).clamp_(0, 1)[:, None]
    # At least five pixels a period: a coarser picture has fewer periods, not a blur.
    frequency = between(4, 1.6, 2.6).clamp(max=size / 2 / 5)
    across, along = _turned(x, y, between(5, 0, 2 * math.pi))
    wave = _of_each(TEXTURES, textures, across * frequency + between(6, 0, 1), along * frequency + between(7, 0, 1))
    second = (0.5 + wave * 2).clamp_(0, 1)[:, None]
    light, dark, ground, slope = _colours(draws[:, 8:21])
    surface = dark + (light - dark) * second
    ground = ground + slope * (x + y)[:, None] / 4
    picture = ground + (surface - ground) * coverage
    return picture.clamp_(0, 1).mul_(255).round_().byte()


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _of_each(
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]], chosen: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """The function `chosen` (B,) by number, of each picture's coordinates (B, H, W)."""
    values = torch.empty_like(x)
    for number, function in enumerate(functions.values()):
        mine = (chosen == number).nonzero()[:, 0]
        values[mine] = function(x[mine], y[mine])
    return values


def _colours(draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A light and a dark colour of the surface, one of the ground between them, and its slope: (B, 3, 1, 1) each."""
    light, dark, ground, slope = (part.reshape(-1, 3, 1, 1) for part in draws[:, :12].split(3, 1))
    # A random hue each, and lightness kept apart: colour says nothing of the class, contrast never vanishes.
    light, dark = 0.7 + 0.3 * light, 0.45 * dark
    ground = 0.3 + 0.4 * ground
    lift = draws[:, 12].reshape(-1, 1, 1, 1) - 0.5
    return light, dark, ground + 0.2 * lift, 0.5 * (slope - 0.5)

"""Rooms: furnished rooms with depth, rendered by the project, so that depth estimation needs no download."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from common.errors import InputError
from common.randomness import uniform
from supervised.depth_data import DepthSource
from supervised.raycast import BRICKS, CHECKS, MOTTLED, PLAIN, PLANKS, STRIPES, Paint, Scenes, Solid, render

CHUNK = 16  # scenes rendered at once: their temporaries stay in the cache
DRAWS = 384
ANY = (PLAIN, STRIPES, CHECKS, MOTTLED)


class Rooms(DepthSource):
    """Box rooms with a sofa, a table, cupboards, lamps, pictures, balls and cartons, in patterned paint and lamplight.

    A scene is a function of (seed, split, index). Depths lie between about 1 and 8 m.

    Args:
        size: (height, width) of the images and depth maps; larger than what the model sees, since images are then
            shrunk with antialiasing.
        train: number of training images; the 2,000 take about 10 s to render on one core, once per start.
        val: number of validation images.
        test: number of test images.
        seed: of the scenes; not that of the run.
    """

    name = "rooms"

    def __init__(
        self, size: tuple[int, int] = (48, 64), train: int = 2000, val: int = 300, test: int = 300, seed: int = 0
    ) -> None:
        self.counts = {"train": train, "val": val, "test": test}
        self.published = train
        for key, value in {**self.counts, "size": min(size)}.items():
            if value < 1:
                raise InputError(f"data.source.{key}: {value} is not positive")
        self.size, self.seed = tuple(size), seed

    def frames(self, split: str, root: Path) -> RoomFrames:
        number = self.counts[split]
        if number * self.size[0] * self.size[1] > 1000 * 48 * 64:
            rank_zero_only(print)(f"rooms: rendering {number:,} images of {split}")
        stream = list(self.counts).index(split)
        chunks = torch.arange(number).split(CHUNK)
        images, depths = zip(*(render(furnish(self.seed, stream, chunk), self.size) for chunk in chunks), strict=True)
        return RoomFrames(torch.cat(images), torch.cat(depths))

    def describe(self, root: Path) -> list[str]:
        height, width = self.size
        return [f"rooms {split}: {number:,} images of {height}x{width}, rendered at the start"
                for split, number in self.counts.items()]


class RoomFrames:
    """A split in memory: images (N, 3, H, W) uint8, depths (N, 1, H, W) in metres."""

    def __init__(self, images: Tensor, depths: Tensor) -> None:
        self.images, self.depths = images, depths

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.depths[index]


class Draws:
    """Uniform draws of a batch of scenes, handed out one (B,) after the other."""

    def __init__(self, seed: int, stream: int, indices: Tensor) -> None:
        self.columns = iter(uniform("rooms", seed, stream, indices, n=DRAWS).unbind(1))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * next(self.columns)

    def paint(self, low: float, high: float, patterns: tuple[int, ...], tint: float = 1.0) -> Paint:
        """Brightness within [low, high]; a `tint` of 0 is grey. The second colour is the first, darker, or another."""
        grey = self(low, high)
        first, other = (torch.stack([grey + tint * (self(low, high) - grey) for _ in range(3)], 1) for _ in range(2))
        second = torch.where(self()[:, None] < 0.5, first * self(0.4, 0.8)[:, None], other)
        pattern = torch.tensor(patterns)[(self() * len(patterns)).long()]
        return Paint(first, second, pattern, self(0.12, 0.5))

    def sign(self) -> Tensor:
        return torch.where(self() < 0.5, -1.0, 1.0)

    def floor_height(self, share: float) -> Tensor:
        """Where a thing stands: on the floor in `share` of the scenes, and else out of sight below it."""
        return torch.where(self() < share, 0.0, -20.0)


def furnish(seed: int, stream: int, indices: Tensor) -> Scenes:
    """The scenes of these indices (B,) in the split `stream`."""
    draw = Draws(seed, stream, indices)
    zero = torch.zeros(len(indices))
    width, height, length = draw(3.2, 5.5), draw(2.4, 3.0), draw(4.0, 7.0)
    side = draw.sign()  # the wall of the sofa
    solids: list[Solid] = []

    def put(kind, x, y, z, half_x, half_y, half_z, turn=zero, paint=None) -> None:
        half = torch.stack([value + zero for value in (half_x, half_y, half_z)], 1)
        paint = paint or draw.paint(0.08, 0.9, ANY)
        solids.append(Solid(kind, torch.stack([x + zero, y + zero, z + zero], 1), half, turn, paint))

    # Sofa: seat, back and cushion along one side wall
    floor, z, reach, cloth = draw.floor_height(0.8), draw(0.0, 0.22) * length, draw(0.6, 1.0), draw.paint(0.1, 0.8, ANY)
    put("box", side * (width / 2 - 0.45), floor + 0.21, z, 0.42, 0.21, reach, paint=cloth)
    put("box", side * (width / 2 - 0.12), floor + 0.45, z, 0.11, 0.45, reach, paint=cloth)
    put("ball", side * (width / 2 - 0.4), floor + 0.55, z + draw(-0.4, 0.4), 0.14, 0.2, 0.22)
    # Table on one leg, with a box or a vase on it
    floor, x, z = draw.floor_height(0.8), -side * draw(0.05, 0.28) * width, draw(0.02, 0.3) * length
    turn, top = draw(-0.4, 0.4), draw(0.5, 0.78)
    board = draw.paint(0.1, 0.7, (PLAIN, PLANKS), 0.5)
    put("box", x, floor + top, z, draw(0.35, 0.65), 0.025, draw(0.3, 0.5), turn, board)
    put("cylinder", x, floor + top / 2, z, (leg := draw(0.04, 0.15)), top / 2, leg)
    put("box", x + draw(-0.15, 0.15), floor + top + 0.13, z, 0.12, 0.11, 0.16, draw(-0.4, 0.4))
    put("cylinder", x + draw(-0.2, 0.2), floor + top + 0.17, z + draw(-0.2, 0.2), (vase := draw(0.05, 0.1)), 0.15, vase)
    # Along the far wall: a cupboard, a picture, a lamp in the corner
    tall, deep = draw(0.35, 1.05), draw(0.18, 0.3)
    wood = draw.paint(0.1, 0.7, (PLAIN, PLANKS, MOTTLED), 0.6)
    put("box", draw(-0.35, 0.35) * width, draw.floor_height(0.85) + tall, length / 2 - deep, draw(0.3, 0.7), tall, deep,
        paint=wood)
    put("box", draw(-0.3, 0.3) * width, draw.floor_height(0.7) + draw(1.4, 1.8), length / 2 - 0.02, draw(0.2, 0.6),
        draw(0.2, 0.45), 0.02)
    floor, x, z = draw.floor_height(0.6), -side * (width / 2 - 0.35), length / 2 - 0.35
    put("cylinder", x, floor + 0.75, z, 0.025, 0.75, 0.025)
    put("ball", x, floor + 1.55, z, 0.2, 0.16, 0.2)
    # On the other side wall: a door and a shelf
    put("box", -side * (width / 2 - 0.02), draw.floor_height(0.6) + 1.0, draw(-0.05, 0.1) * length, 0.02, 1.0, 0.42,
        paint=draw.paint(0.2, 0.8, (PLAIN, PLANKS), 0.5))
    put("box", -side * (width / 2 - 0.14), draw.floor_height(0.6) + draw(1.2, 1.7), draw(0.2, 0.3) * length, 0.14, 0.02,
        draw(0.3, 0.7), paint=wood)
    # On the floor: a rug, a carton, a ball, a stool
    put("box", draw(-0.1, 0.1) * width, draw.floor_height(0.6) + 0.01, draw(0.0, 0.2) * length, draw(0.6, 1.1), 0.01,
        draw(0.5, 1.0), draw(-0.2, 0.2))
    for kind in ("box", "ball", "cylinder"):
        x, floor, z = draw(-0.3, 0.3) * width, draw.floor_height(0.7), draw(-0.15, 0.35) * length
        wide, tall, deep = draw(0.12, 0.3), draw(0.12, 0.35), draw(0.12, 0.35)
        if kind == "box":
            put(kind, x, floor + tall, z, wide, tall, deep, draw(-0.4, 0.4))
        else:
            tall = wide if kind == "ball" else tall
            put(kind, x, floor + tall, z, wide, tall, wide)

    camera = torch.stack([draw(-0.2, 0.2) * width, draw(1.1, 1.7), -length / 2 + draw(0.2, 0.7)], 1)
    light = torch.stack([draw(-0.3, 0.3) * width, height - draw(0.15, 0.5), draw(-0.2, 0.3) * length], 1)
    walls = draw.paint(0.35, 0.9, (PLAIN, PLAIN, STRIPES, BRICKS, MOTTLED), 0.5)
    floor = draw.paint(0.1, 0.6, (CHECKS, PLANKS, PLANKS, MOTTLED, BRICKS), 0.4)
    ceiling = draw.paint(0.75, 0.95, (PLAIN,), 0.1)
    size = torch.stack([width, height, length], 1)
    return Scenes(size, camera, draw(-0.17, 0.17), draw(0.01, 0.13), light, solids, walls, floor, ceiling)

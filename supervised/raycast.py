"""A small ray caster: batches of rooms with solids in them -> images and depth maps.

World: x to the right, y up, z ahead, in metres; the floor is y = 0 and the room is centred on x = z = 0. Every solid
is a unit box, ball or upright cylinder, stretched, turned about y and moved. Shapes: B scenes, P pixels.

Nothing but sums, products, quotients and square roots of single elements is computed, all correctly rounded: a scene's
pixels do not depend on the batch it is in, nor on the machine's vector width. In the loops over solids choices are made
by arithmetic, since torch.where takes 30 times as long as a sum on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

HALF_VIEW = 0.5774  # tangent of half the horizontal field of view: 60 degrees, close to the Kinect's 57
EPSILON = 1e-3  # metres
PLAIN, STRIPES, CHECKS, BRICKS, PLANKS, MOTTLED = range(6)
FAR = 1e6  # metres


class Paint(NamedTuple):
    """A pattern of two colours: colours (B, 3) in linear light, pattern (B,) and its size in metres (B,)."""

    colour: Tensor
    second: Tensor
    pattern: Tensor
    scale: Tensor


class Solid(NamedTuple):
    """A convex body: centre and half size (B, 3) in metres, and the tangent of half its turn about y (B,)."""

    kind: Literal["box", "ball", "cylinder"]
    centre: Tensor
    half: Tensor
    turn: Tensor
    paint: Paint


@dataclass
class Scenes:
    """Rooms of size (B, 3), seen from `camera` (B, 3), lit from `light` (B, 3).

    `yaw` (to the right) and `pitch` (down) are tangents of half the angle, (B,), so that no sine is needed.
    """

    size: Tensor
    camera: Tensor
    yaw: Tensor
    pitch: Tensor
    light: Tensor
    solids: list[Solid]
    walls: Paint
    floor: Paint
    ceiling: Paint


class Vector(NamedTuple):
    """Three components, each broadcast to (B, P)."""

    x: Tensor
    y: Tensor
    z: Tensor

    def dot(self, other: Vector) -> Tensor:
        return self.x * other.x + self.y * other.y + self.z * other.z

    def dominant(self) -> Tensor:
        """The axis of the largest component by size; several times as fast as an argmax over three."""
        x, y, z = (value.abs() for value in self)
        return torch.where((x >= y) & (x >= z), 0, torch.where(y >= z, 1, 2))

    def combine(self, function: Callable[..., Tensor], *others: Vector) -> Vector:
        return Vector(*(function(*parts) for parts in zip(self, *others, strict=True)))


def columns(values: Tensor) -> Vector:
    """(B, 3) -> components (B, 1)."""
    return Vector(*values[:, :, None].unbind(1))


def rotation(half_tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (B, 1)."""
    square = half_tangent * half_tangent
    return ((1 - square) / (1 + square))[:, None], (2 * half_tangent / (1 + square))[:, None]


def render(scenes: Scenes, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) uint8 and depth (B, 1, H, W) in metres along the optical axis."""
    rays, camera = _rays(scenes, size), columns(scenes.camera)
    depth, owner = _first_hit(scenes, camera, rays)
    point = camera.combine(lambda o, d: o + depth * d, rays)
    normal, axis, place, material = _surface(scenes, point, owner)
    albedo = _albedo(scenes, place, axis, material)
    light = _shade(scenes, point, normal, owner)
    # A square root is close to the gamma of a display.
    image = torch.stack([(value * light).clamp(0, 1).sqrt() for value in albedo], 1)
    return (image * 255).round().byte().unflatten(2, size), depth[:, None].unflatten(2, size)


def _rays(scenes: Scenes, size: tuple[int, int]) -> Vector:
    """Directions (B, P) whose component along the optical axis is 1, so that ray lengths are depths."""
    height, width = size
    focal = width / 2 / HALF_VIEW
    right = ((torch.arange(width) + 0.5 - width / 2) / focal).repeat(height)
    up = ((height / 2 - 0.5 - torch.arange(height)) / focal).repeat_interleave(width)
    (cos_pitch, sin_pitch), (cos_yaw, sin_yaw) = rotation(scenes.pitch), rotation(scenes.yaw)
    ahead = up * sin_pitch + cos_pitch
    return Vector(right * cos_yaw + ahead * sin_yaw, up * cos_pitch - sin_pitch, ahead * cos_yaw - right * sin_yaw)


def _local(solid: Solid, origin: Vector, rays: Vector) -> tuple[Vector, Vector]:
    """A ray in the frame in which the solid is of unit size."""
    (cos, sin), half = rotation(solid.turn), columns(solid.half)
    moved = origin.combine(lambda o, c: o - c, columns(solid.centre))

    def turned(v: Vector) -> Vector:
        return Vector(v.x * (cos / half.x) - v.z * (sin / half.x), v.y / half.y,
                      v.x * (sin / half.z) + v.z * (cos / half.z))

    return turned(moved), turned(rays)


def _slab(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Where a ray enters and leaves -1 <= coordinate <= 1."""
    inverse = 1 / ray
    middle, reach = -origin * inverse, inverse.abs()
    return middle - reach, middle + reach


def _quadratic(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of a t^2 + 2 b t + c; where there are none, two equal numbers, an empty interval."""
    root = (b * b - a * c).clamp(min=0).sqrt()
    return (-b - root) / a, (root - b) / a


def _interval(kind: str, origin: Vector, ray: Vector) -> tuple[Tensor, Tensor]:
    """Where a ray enters and leaves a unit solid; it misses where it leaves first."""
    if kind == "ball":
        return _quadratic(ray.dot(ray), ray.dot(origin), origin.dot(origin) - 1)
    near, far = _slab(origin.y, ray.y)
    if kind == "cylinder":
        a = ray.x * ray.x + ray.z * ray.z
        b = ray.x * origin.x + ray.z * origin.z
        side = _quadratic(a, b, origin.x * origin.x + origin.z * origin.z - 1)
        return torch.maximum(near, side[0]), torch.minimum(far, side[1])
    for o, d in ((origin.x, ray.x), (origin.z, ray.z)):
        enter, leave = _slab(o, d)
        near, far = torch.maximum(near, enter), torch.minimum(far, leave)
    return near, far


def _room(scenes: Scenes) -> Solid:
    size = scenes.size
    centre = torch.stack([torch.zeros(len(size)), size[:, 1] / 2, torch.zeros(len(size))], 1)
    return Solid("box", centre, size / 2, torch.zeros(len(size)), scenes.walls)


def _first_hit(scenes: Scenes, origin: Vector, rays: Vector) -> tuple[Tensor, Tensor]:
    """Ray length to the first surface, and whose it is: the room's (0) or a solid's (its place in the list, from 1)."""
    _, length = _interval("box", *_local(_room(scenes), origin, rays))  # seen from within
    owner = torch.zeros_like(length)
    for number, solid in enumerate(scenes.solids, 1):
        near, far = _interval(solid.kind, *_local(solid, origin, rays))
        candidate = near + FAR * ((near >= far) | (near < EPSILON)).float()
        owner = torch.maximum(owner, number * (candidate < length))
        length = torch.minimum(length, candidate)
    return length, owner.long()


def _surface(scenes: Scenes, point: Vector, owner: Tensor) -> tuple[Vector, Tensor, Vector, Tensor]:
    """Normal, its dominant axis, the place on the solid in metres, and the material."""
    solids = [_room(scenes), *scenes.solids]

    def of_owner(values: list[Tensor]) -> Tensor:
        return torch.stack(values, 1).gather(1, owner)

    centre = Vector(*(of_owner([s.centre[:, i] for s in solids]) for i in range(3)))
    half = Vector(*(of_owner([s.half[:, i] for s in solids]) for i in range(3)))
    turns = [rotation(s.turn) for s in solids]
    cos, sin = (of_owner([turn[i][:, 0] for turn in turns]) for i in range(2))
    kinds = torch.tensor([("box", "ball", "cylinder").index(s.kind) for s in solids])
    kind = kinds.expand(len(owner), -1).gather(1, owner)

    away = point.combine(lambda p, c: p - c, centre)
    place = Vector(away.x * cos - away.z * sin, away.y, away.x * sin + away.z * cos)
    unit = place.combine(lambda p, h: p / h, half)
    face = unit.dominant()
    box = Vector(*((face == i) * part.sign() for i, part in enumerate(unit)))
    ball = unit.combine(lambda u, h: u / h, half)
    radius = unit.x * unit.x + unit.z * unit.z
    cap = unit.y * unit.y > radius
    cylinder = Vector(torch.where(cap, 0, unit.x), torch.where(cap, unit.y.sign(), 0), torch.where(cap, 0, unit.z))
    normal = box.combine(lambda b, s, c: torch.where(kind == 0, b, torch.where(kind == 1, s, c)), ball, cylinder)
    room = owner == 0
    inward = 1 - 2 * room.float()
    scale = inward / normal.dot(normal).sqrt()
    normal = normal.combine(lambda n: n * scale)

    axis = normal.dominant()
    material = owner + (room & (axis == 1)) * (len(solids) + (normal.y < 0).long())
    normal = Vector(normal.x * cos + normal.z * sin, normal.y, normal.z * cos - normal.x * sin)
    return normal, axis, place, material


def _albedo(scenes: Scenes, place: Vector, axis: Tensor, material: Tensor) -> list[Tensor]:
    """Red, green and blue of the pattern at a place of a face."""
    paints = [scenes.walls, *(s.paint for s in scenes.solids), scenes.floor, scenes.ceiling]

    def of_material(values: list[Tensor]) -> Tensor:
        return torch.stack(values, 1).gather(1, material)

    scale = of_material([p.scale for p in paints])
    across = torch.where(axis == 0, place.z, place.x) / scale + 0.37
    along = torch.where(axis == 1, place.z, place.y) / scale + 0.37
    share = _pattern(of_material([p.pattern for p in paints]), across, along)
    colours = []
    for i in range(3):
        first, second = (of_material([colour[:, i] for colour in kind]) for kind in
                         ([p.colour for p in paints], [p.second for p in paints]))
        colours.append(first + (second - first) * share)
    return colours


def _pattern(pattern: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Share of the second colour, at coordinates in units of the pattern's size."""
    column, row = u.floor(), v.floor()
    inside, height = u - column, v - row
    shifted = u + row * 0.5
    joint = (shifted - shifted.floor() < 0.06) | (height < 0.1)
    rows = _hash(row, (u / 5 + row * 0.37).floor())
    corners = [_hash(column + i, row + j) for j in (0, 1) for i in (0, 1)]
    lower = corners[0] + (corners[1] - corners[0]) * inside
    upper = corners[2] + (corners[3] - corners[2]) * inside
    shares = [
        torch.zeros_like(u),
        (inside < 0.5).float(),
        ((column + row) / 2 - ((column + row) / 2).floor()) * 2,
        joint.float(),
        rows,
        lower + (upper - lower) * height,
    ]
    return torch.stack(shares).gather(0, pattern[None])[0]


def _hash(i: Tensor, j: Tensor) -> Tensor:
    """A number in [0, 1] for each cell of a lattice."""
    bits = i.int() * 73856093 ^ j.int() * 19349663
    bits = (bits ^ (bits >> 13)) * 1274126177
    return ((bits ^ (bits >> 16)) & 0xFFFF).float() / 0xFFFF


def _shade(scenes: Scenes, point: Vector, normal: Vector, owner: Tensor) -> Tensor:
    """Light that a surface sends back: a lamp with shadows, skylight by direction, and dim edges of the room."""
    # Lifted off its surface, a point does not shade itself.
    point = point.combine(lambda p, n: p + 2 * EPSILON * n, normal)
    to_light = columns(scenes.light).combine(lambda a, b: a - b, point)
    square = to_light.dot(to_light)
    cosine = (normal.dot(to_light) / square.sqrt()).clamp(min=0)
    shadow = torch.zeros_like(square, dtype=torch.bool)
    for solid in scenes.solids:
        near, far = _interval(solid.kind, *_local(solid, point, to_light))
        shadow |= (near < far) & (near > 0) & (near < 1)
    lamp = 1.1 * cosine * (~shadow) / (1 + 0.12 * square)
    sky = 0.30 + 0.10 * normal.y + 0.05 * normal.x - 0.04 * normal.z
    size = columns(scenes.size)
    above = torch.minimum(point.y, size.y - point.y)
    gaps = torch.stack([size.x / 2 - point.x.abs(), above, size.z / 2 - point.z.abs()])
    edge = gaps.sum(0) - gaps.amax(0) - gaps.amin(0)  # the nearest surface but the point's own
    dim = torch.where(owner == 0, 0.7 + 0.3 * (edge / 0.5).clamp(max=1), 1)
    return (lamp + sky) * dim

"""Rendered rooms: geometry against formulas, determinism, and what makes them a data set."""

from pathlib import Path

import pytest
import torch

from common.errors import InputError
from supervised.raycast import HALF_VIEW, PLAIN, Paint, Scenes, Solid, render
from supervised.rooms import Rooms, furnish

SIZE = (48, 64)


def paint(*colour: float) -> Paint:
    shade = torch.tensor([colour or (0.5, 0.5, 0.5)])
    return Paint(shade, shade, torch.tensor([PLAIN]), torch.tensor([0.3]))


def empty_room(*solids: Solid, yaw: float = 0.0) -> Scenes:
    """4 m wide, 3 m high, 6 m long; the camera stands 1.2 m above the floor, 2 m behind the middle."""
    size, camera, light = (torch.tensor([place]) for place in ([4.0, 3.0, 6.0], [0.0, 1.2, -2.0], [0.0, 2.8, 0.0]))
    surfaces = paint(), paint(0.3, 0.2, 0.1), paint(0.9, 0.9, 0.9)
    return Scenes(size, camera, torch.tensor([yaw]), torch.zeros(1), light, list(solids), *surfaces)


def solid(kind: str, centre: tuple, half: tuple, turn: float = 0.0) -> Solid:
    return Solid(kind, torch.tensor([centre]), torch.tensor([half]), torch.tensor([turn]), paint(0.9, 0.1, 0.1))


def rays() -> tuple[torch.Tensor, torch.Tensor]:
    """Right and up per metre of depth, (48, 64) each."""
    right = (torch.arange(64) - 31.5) / 32 * HALF_VIEW
    up = (23.5 - torch.arange(48)) / 32 * HALF_VIEW
    return right.expand(48, -1), up[:, None].expand(-1, 64)


def test_an_empty_room_is_as_deep_as_its_nearest_plane():
    _, depth = render(empty_room(), SIZE)
    right, up = rays()
    planes = [torch.full(SIZE, 5.0), 2.0 / right.abs(), torch.where(up > 0, 1.8, 1.2) / up.abs()]
    torch.testing.assert_close(depth[0, 0], torch.stack(planes).amin(0), rtol=1e-5, atol=1e-5)
    assert depth[0, 0, 24, 32] == pytest.approx(5.0)


def test_a_turned_camera_sees_the_far_wall_slanted():
    half = 0.1
    cosine, sine = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)
    _, depth = render(empty_room(yaw=half), SIZE)
    right, _ = rays()
    row = 5.0 / (cosine - right[24] * sine)  # z advances by cos - right * sin per metre of depth
    torch.testing.assert_close(depth[0, 0, 24, :36], row[:36], rtol=1e-5, atol=1e-5)


def test_solids_are_where_their_equations_say():
    right, up = rays()
    ball = render(empty_room(solid("ball", (0.0, 1.2, 1.0), (0.5, 0.5, 0.5))), SIZE)[1][0, 0]
    a, b, c = right**2 + up**2 + 1, -3.0, 9 - 0.25
    inside = b * b - a * c > 1e-3
    near = (-b - (b * b - a * c).clamp(min=0).sqrt()) / a
    torch.testing.assert_close(ball[inside], near[inside], rtol=1e-4, atol=1e-4)
    box = render(empty_room(solid("box", (0.0, 1.2, 1.0), (0.4, 0.3, 0.5))), SIZE)[1][0, 0]
    front = ((2.5 * right).abs() < 0.39) & ((2.5 * up).abs() < 0.29)
    assert front.any() and torch.allclose(box[front], torch.tensor(2.5))
    cylinder = render(empty_room(solid("cylinder", (0.0, 1.2, 1.0), (0.5, 0.4, 0.5))), SIZE)[1][0, 0]
    a, c = right**2 + 1, 9 - 0.25
    wall = (-b - (b * b - a * c).clamp(min=0).sqrt()) / a
    side = (b * b - a * c > 1e-3) & ((wall * up).abs() < 0.39)
    assert side.any()
    torch.testing.assert_close(cylinder[side], wall[side], rtol=1e-4, atol=1e-4)


def test_a_box_turned_by_a_quarter_swaps_its_sides():
    turned = render(empty_room(solid("box", (0.3, 1.0, 1.0), (0.2, 0.3, 0.6), turn=1.0)), SIZE)[1]
    swapped = render(empty_room(solid("box", (0.3, 1.0, 1.0), (0.6, 0.3, 0.2))), SIZE)[1]
    torch.testing.assert_close(turned, swapped, rtol=1e-4, atol=1e-4)


def test_colours_follow_depth():
    """The red ball's pixels are those that are nearer than the empty room, and it shades what lies behind it."""
    ball = empty_room(solid("ball", (0.4, 0.6, 1.0), (0.5, 0.5, 0.5)))
    image, depth = render(ball, SIZE)
    bare_image, bare = render(empty_room(), SIZE)
    nearer = depth[0, 0] < bare[0, 0] - 1e-3
    red = image[0, 0].int() > 2 * image[0, 1].int()
    assert torch.equal(nearer, red)
    darker = (image[0].int() < bare_image[0].int() - 10).all(0) & ~nearer
    assert darker.sum() > 10


def test_a_scene_is_a_function_of_seed_split_and_index_alone():
    together = render(furnish(3, 0, torch.arange(40, 45)), SIZE)
    for place, index in ((0, 40), (3, 43)):
        alone = render(furnish(3, 0, torch.tensor([index])), SIZE)
        assert all(torch.equal(one[place], other[0]) for one, other in zip(together, alone, strict=True))
    for other in ((4, 0), (3, 1)):
        assert not torch.equal(render(furnish(*other, torch.arange(40, 45)), SIZE)[1], together[1])


def test_the_set_has_depth_in_range_and_its_splits_differ():
    rooms = Rooms(size=(24, 32), train=64, val=20, test=3)
    frames = {split: rooms.frames(split, Path()) for split in ("train", "val", "test")}
    assert [len(split) for split in frames.values()] == [64, 20, 3]
    depths = torch.stack([frames["train"][i][1] for i in range(64)])
    assert 0.2 < depths.min() < 1.5 and 6 < depths.max() < 10
    assert depths.flatten(1).std(1).median() > 0.7  # more than a flat wall
    image, depth = frames["train"][0]
    assert image.dtype == torch.uint8 and image.shape == (3, 24, 32) and depth.shape == (1, 24, 32)
    assert not torch.equal(frames["train"][0][1], frames["val"][0][1])
    assert rooms.describe(Path())[1].startswith("rooms val: 20 images of 24x32")


def test_empty_sets_are_refused():
    with pytest.raises(InputError, match=r"data\.source\.val: 0"):
        Rooms(val=0)

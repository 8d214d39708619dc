"""Swaps of pixel pairs against brute force: how many, how far apart, in which patches, and how they are drawn."""

import re
import time
from collections import Counter
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import InputError
from locality_ablation.permutation import Permutation, PixelPermutation

SIZES = [(6, 6), (5, 7), (4, 12), (9, 3), (1, 8)]
PHOTO = (224, 224)
LARGEST = re.compile(r"this seed reaches (\d+)$")


def order(size: tuple[int, int], model_patch: int = 1, run_seed: int = 0, **options) -> list[int]:
    return Permutation(**options).order(size, model_patch, run_seed).tolist()


def pairs_of(found: list[int]) -> set[tuple[int, int]]:
    """Pixel numbers that changed places, the lower one first."""
    return {(pixel, source) for pixel, source in enumerate(found) if pixel < source}


def patch_of(pixel: int, width: int, patch_size: int) -> tuple[int, int]:
    return pixel // width // patch_size, pixel % width // patch_size


def reached(size: tuple[int, int], model_patch: int = 1, run_seed: int = 0, **options) -> int:
    """The most swaps that a seed reaches, as the refusal of more names it."""
    pairs = size[0] * size[1] // 2
    try:
        order(size, model_patch, run_seed, swaps=pairs, **options)
    except InputError as error:
        return int(LARGEST.search(str(error))[1])
    return pairs


# How many, and how far


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("delta, distance", [("inf", "window"), (2, "window"), (3, "window"), (2, "manhattan"),
                                             (3, "manhattan"), (99, "window"), (99, "manhattan")])  # fmt: skip
def test_an_involution_of_as_many_pixels_within_delta(size, delta, distance):
    height, width = size
    options = {"delta": delta, "distance": distance, "run_seed": 5}
    for swaps in {0, 1, reached(size, **options) // 2, reached(size, **options)}:
        found = order(size, swaps=swaps, **options)
        assert sorted(found) == list(range(height * width))
        assert all(found[source] == pixel for pixel, source in enumerate(found))
        assert sum(pixel != source for pixel, source in enumerate(found)) == 2 * swaps
        for pixel, source in pairs_of(found):
            rows, columns = abs(pixel // width - source // width), abs(pixel % width - source % width)
            if delta != "inf":
                assert rows + columns <= delta if distance == "manhattan" else max(rows, columns) < delta


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_most_swaps_at_any_distance_leave_at_most_one_pixel(size):
    pixels = size[0] * size[1]
    assert reached(size) == reached(size, delta=99) == pixels // 2
    with pytest.raises(InputError, match=rf"swaps: {pixels // 2 + 1} are more than the {pixels // 2} pairs of "
                                         rf"{size[0]}x{size[1]} pixels"):  # fmt: skip
        order(size, swaps=pixels // 2 + 1)


@pytest.mark.parametrize("delta, distance, offsets", [
    (2, "window", {(0, 1), (1, 0), (1, 1)}),
    (2, "manhattan", {(0, 1), (1, 0), (1, 1), (0, 2), (2, 0)}),
    (3, "window", {(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2)}),
    (3, "manhattan", {(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0)}),
])  # fmt: skip
def test_every_offset_within_delta_occurs(delta, distance, offsets):
    found = pairs_of(order((40, 40), swaps=700, delta=delta, distance=distance))
    assert {(abs(a // 40 - b // 40), abs(a % 40 - b % 40)) for a, b in found} == offsets


@pytest.mark.parametrize("options", [{}, {"delta": 4}, {"pairs": "within"}, {"pairs": "across"}, {"pairs": "shared"}],
                         ids=str)  # fmt: skip
def test_none_is_the_identity(options):
    for nothing in ({"swaps": 0}, {"share": 0.0}):
        assert order((12, 8), 4, **nothing, **options) == list(range(96))


# Where pairs lie


@pytest.mark.parametrize("size, patch_size", [((12, 12), 4), ((12, 20), 4), ((9, 15), 3), ((8, 12), 2)], ids=str)
@pytest.mark.parametrize("pairs", ["within", "across"])
@pytest.mark.parametrize("delta, distance", [("inf", "window"), (2, "window"), (3, "manhattan")])
def test_pairs_within_or_across_patches(size, patch_size, pairs, delta, distance):
    options = {"pairs": pairs, "delta": delta, "distance": distance}
    most = reached(size, patch_size, **options)
    width = size[1]
    for swaps in (3, most):
        found = pairs_of(order(size, patch_size, swaps=swaps, **options))
        assert len(found) == swaps
        stays = {patch_of(a, width, patch_size) == patch_of(b, width, patch_size) for a, b in found}
        assert stays == {pairs == "within"}
    if pairs == "within" and delta == "inf":  # an odd patch leaves one pixel
        assert most == (size[0] // patch_size) * (size[1] // patch_size) * (patch_size**2 // 2)


@pytest.mark.parametrize("size, patch_size", [((12, 12), 4), ((12, 20), 4), ((9, 15), 3), ((48, 64), 16)], ids=str)
@pytest.mark.parametrize("delta", ["inf", 2])
def test_shared_swaps_are_the_same_in_every_patch(size, patch_size, delta):
    height, width = size
    patches = height * width // patch_size**2
    swaps = 3 * patches
    found = order(size, patch_size, swaps=swaps, pairs="shared", delta=delta)
    assert len(pairs_of(found)) == swaps
    inside = set()
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            sources = [found[(top + y) * width + left + x] for y in range(patch_size) for x in range(patch_size)]
            assert {patch_of(s, width, patch_size) for s in sources} == {(top // patch_size, left // patch_size)}
            inside.add(tuple((source // width - top) * patch_size + source % width - left for source in sources))
    assert len(inside) == 1
    if delta == 2:
        assert all(max(abs(a // width - b // width), abs(a % width - b % width)) < 2 for a, b in pairs_of(found))


def test_every_form_moves_the_same_number_of_pixels():
    counts = {pairs: len(pairs_of(order((48, 64), 16, swaps=240, pairs=pairs)))
              for pairs in ("anywhere", "within", "across", "shared")}  # fmt: skip
    assert set(counts.values()) == {240}


def test_the_form_says_which_patches_and_else_the_model():
    given = order((12, 12), 2, swaps=36, pairs="within", patch_size=6)
    assert given == order((12, 12), 6, swaps=36, pairs="within") != order((12, 12), 2, swaps=36, pairs="within")
    assert len({patch_of(a, 12, 2) == patch_of(b, 12, 2) for a, b in pairs_of(given)}) == 2
    with pytest.raises(InputError, match="patch_size=5 does not divide image_size=12x12"):
        order((12, 12), 2, swaps=4, pairs="within", patch_size=5)


# What is drawn


@pytest.mark.parametrize("options", [{"delta": "inf"}, {"delta": 2}, {"delta": 3, "distance": "manhattan"},
                                     {"pairs": "within"}, {"pairs": "across", "delta": 3}], ids=str)  # fmt: skip
def test_fewer_swaps_are_among_more(options):
    most = reached((12, 20), 4, **options)
    nested = [pairs_of(order((12, 20), 4, swaps=swaps, **options)) for swaps in range(0, most + 1, 7)]
    assert all(fewer < more for fewer, more in zip(nested, nested[1:], strict=False))


def test_shared_swaps_are_nested_too():
    nested = [pairs_of(order((12, 20), 4, swaps=15 * inside, pairs="shared")) for inside in range(9)]
    assert all(fewer < more for fewer, more in zip(nested, nested[1:], strict=False))


@pytest.mark.parametrize("options", [{"delta": "inf"}, {"delta": 2}, {"pairs": "shared"}], ids=str)
def test_a_seed_of_its_own_and_else_the_runs(options):
    draws = [order((12, 12), 6, seed, swaps=24, **options) for seed in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert order((12, 12), 6, 9, swaps=24, seed=2, **options) == draws[2]
    assert order((12, 12), 6, 2, swaps=24, **options) == draws[2]


@cache
def distribution(free: frozenset[int], left: frozenset[int], width: int, reach: int, swaps: int) -> dict:
    """Sets of pairs with their probability, where pixels are visited in any order and take any free one in reach."""
    if not swaps or not left:
        return {frozenset(): Fraction(1)}
    total: dict[frozenset, Fraction] = {}
    for pixel in left:
        near = [other for other in free - {pixel}
                if max(abs(other // width - pixel // width), abs(other % width - pixel % width)) < reach]  # fmt: skip
        for other in near or [None]:
            gone = {pixel, other} if near else {pixel}
            found = {frozenset({pixel, other})} if near else set()
            after = distribution(free - gone, left - gone, width, reach, swaps - len(found))
            for rest, probability in after.items():
                key = rest | found
                total[key] = total.get(key, Fraction(0)) + probability / (len(left) * max(len(near), 1))
    return total


@pytest.mark.parametrize("size, delta, swaps", [((2, 3), 2, 2), ((2, 4), 3, 1), ((1, 6), 3, 2), ((2, 3), "inf", 3)])
def test_each_allowed_partner_is_as_likely(size, delta, swaps):
    """Over seeds, against the exact probabilities of the rule (RECIPES 5), by chi squared at a level of 1e-4."""
    pixels, seeds = frozenset(range(size[0] * size[1])), 3000
    exact = distribution(pixels, pixels, size[1], 99 if delta == "inf" else delta, swaps)
    exact = {pairs: probability for pairs, probability in exact.items() if len(pairs) == swaps}
    assert sum(exact.values()) == 1
    counts = Counter(
        frozenset(frozenset(pair) for pair in pairs_of(order(size, swaps=swaps, delta=delta, run_seed=seed)))
        for seed in range(seeds)
    )
    assert set(counts) == set(exact)
    expected = {pairs: float(probability) * seeds for pairs, probability in exact.items()}
    chi_squared = sum((counts[pairs] - number) ** 2 / number for pairs, number in expected.items())
    freedom = len(exact) - 1
    assert chi_squared < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson, Hilferty


@pytest.mark.parametrize("pairs", ["within", "across"])
def test_each_partner_of_a_patch_form_is_as_likely(pairs):
    seeds, together = 3000, pairs == "within"
    allowed = {(a, b) for a in range(8) for b in range(a) if (a % 4 // 2 == b % 4 // 2) == together}
    counts = Counter(next(iter(pairs_of(order((2, 4), 2, seed, swaps=1, pairs=pairs)))) for seed in range(seeds))
    assert set(counts) == {(b, a) for a, b in allowed}
    assert max(abs(count - seeds / len(allowed)) for count in counts.values()) < 4.5 * (seeds / len(allowed)) ** 0.5


# The paper's size


@pytest.mark.parametrize("distance, delta, thousands", [
    ("window", 2, 23.6), ("window", 4, 24.8), ("window", 8, 25.0),
    ("manhattan", 2, 24.0), ("manhattan", 4, 24.7), ("manhattan", 8, 25.0),
])  # fmt: skip
def test_what_224_pixels_allow(distance, delta, thousands):
    """The largest number of swaps (RECIPES 5), and the time that they take."""
    most = reached(PHOTO, delta=delta, distance=distance)
    assert most == pytest.approx(1000 * thousands, abs=100)
    started = time.process_time()
    found = order(PHOTO, swaps=most, delta=delta, distance=distance)
    assert time.process_time() - started < 2
    assert len(pairs_of(found)) == most


@pytest.mark.parametrize("delta", [2, 4, 8])
def test_how_many_swaps_leave_a_patch_of_the_paper(delta):
    """About 9, 21 and 41 % of few (RECIPES 5), less what the image's edges take; more would find partners scarce."""
    near = [[other for other in range(224) if abs(other - place) < delta] for place in range(224)]
    all_of_them = np.array([len(others) for others in near])
    staying = np.array([sum(other // 16 == place // 16 for other in others) for place, others in enumerate(near)])
    expected = 1 - ((np.outer(staying, staying) - 1) / (np.outer(all_of_them, all_of_them) - 1)).mean()
    found = pairs_of(order(PHOTO, swaps=2000, delta=delta))
    leaving = sum(patch_of(a, 224, 16) != patch_of(b, 224, 16) for a, b in found)
    assert leaving / 2000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


def test_25000_swaps_of_the_paper():
    started = time.process_time()
    found = order(PHOTO, swaps=25_000)
    assert time.process_time() - started < 2
    assert sum(pixel != source for pixel, source in enumerate(found)) == 50_000
    assert pairs_of(order(PHOTO, swaps=10_000)) < pairs_of(order(PHOTO, swaps=20_000)) < pairs_of(found)


# Shares


@pytest.mark.parametrize("size, share, swaps", [
    ((8, 8), 1.0, 32), ((8, 8), 0.5, 16), ((5, 7), 1.0, 17), ((5, 7), 0.5, 8), ((48, 64), 0.25, 384), ((8, 8), 0.01, 0),
])  # fmt: skip
def test_a_share_is_of_all_pairs(size, share, swaps):
    assert len(pairs_of(order(size, share=share))) == swaps


def test_a_percentage_of_100_pairs_is_that_many_swaps():
    """Products just below a whole number, such as 0.29 * 100, are rounded up to it."""
    swapped = {percent: len(pairs_of(order((10, 20), share=percent / 100))) for percent in range(101)}
    assert {percent: swaps for percent, swaps in swapped.items() if percent != swaps} == {}


# Refusals


@pytest.mark.parametrize("options, message", [
    ({"delta": 1}, "model.permutation.delta: 1 allows no swap; 2 is the least"),
    ({"delta": 0}, "model.permutation.delta: 0 "), ({"delta": -3}, "model.permutation.delta: -3 "),
    ({"swaps": -1}, "model.permutation.swaps: -1 is negative"),
    ({"swaps": 3, "share": 0.5}, "model.permutation.share: 0.5 and model.permutation.swaps: 3"),
    ({"share": 1.5}, "model.permutation.share: 1.5 "), ({"share": -0.1}, "model.permutation.share: -0.1 "),
    ({"share": float("nan")}, "model.permutation.share: nan "),
])  # fmt: skip
def test_impossible_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Permutation(**options)


@pytest.mark.parametrize("options", [
    {"delta": 2}, {"delta": 2, "distance": "manhattan"}, {"pairs": "within"}, {"delta": 4, "pairs": "across"},
    {"delta": 2, "pairs": "across"}, {"delta": 2, "pairs": "within"},
], ids=str)  # fmt: skip
def test_what_a_seed_does_not_reach_is_named_and_the_number_named_works(options):
    size, patch_size = (15, 45), 3
    with pytest.raises(InputError, match="model.permutation.swaps: 337 do not fit into 15x45 pixels with delta="):
        order(size, patch_size, swaps=337, **options)
    most = reached(size, patch_size, **options)
    assert len(pairs_of(order(size, patch_size, swaps=most, **options))) == most
    with pytest.raises(InputError, match=f"swaps: {most + 1} do not fit .* this seed reaches {most}$"):
        order(size, patch_size, swaps=most + 1, **options)


def test_where_no_pair_is_possible_none_is_named():
    assert reached((6, 6), 6, pairs="across") == 0
    assert reached((6, 6), 1, pairs="within") == 0


@pytest.mark.parametrize("run_seed", [0, 9])
def test_the_number_that_is_named_of_shared_swaps_works(run_seed):
    """It is of the whole image, as the swaps are, and not of the one patch that they are drawn in."""
    options = {"pairs": "shared", "delta": 2, "run_seed": run_seed}
    most = reached((12, 20), 4, **options)
    assert most < 120
    assert len(pairs_of(order((12, 20), 4, swaps=most, **options))) == most


def test_shared_swaps_that_do_not_divide_over_the_patches_name_those_that_do():
    with pytest.raises(InputError, match="swaps: 20 do not divide over 15 patches of 4x4 pixels.*; 15 or 30 would"):
        order((12, 20), 4, swaps=20, pairs="shared")
    for swaps in (15, 30):
        assert len(pairs_of(order((12, 20), 4, swaps=swaps, pairs="shared"))) == swaps


@pytest.mark.parametrize("size, patch_size, swaps", [((9, 9), 3, 40), ((8, 8), 1, 3), ((5, 5), 5, 0)], ids=str)
def test_every_number_that_is_named_of_shared_swaps_exists(size, patch_size, swaps):
    """Where a patch has an odd number of pixels, the next multiple may be more than there are pairs."""
    try:
        order(size, patch_size, swaps=swaps, pairs="shared")
    except InputError as error:
        named = re.search(r"; ([\d or]+) would$", str(error))[1].split(" or ")
        for number in named:
            order(size, patch_size, swaps=int(number), pairs="shared")


# On images


def swapped_by_hand(images: torch.Tensor, found: list[int]) -> torch.Tensor:
    height, width = images.shape[-2:]
    result = images.clone()
    for pixel, source in enumerate(found):
        result[..., pixel // width, pixel % width] = images[..., source // width, source % width]
    return result


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16, torch.float64])
def test_pixels_change_places_whatever_their_type(size, dtype):
    found = Permutation(swaps=10).order(size, 1, 0)
    images = torch.randint(256, (3, 2, *size), generator=torch.Generator().manual_seed(0)).to(dtype)
    permuted = PixelPermutation(found, size)
    assert permuted.moved == 20
    assert permuted(images).dtype == dtype
    assert permuted(images).equal(swapped_by_hand(images, found.tolist()))
    assert permuted(permuted(images)).equal(images)


@pytest.mark.parametrize("shape", [(8, 6), (6, 7), (48, 1)], ids=str)
def test_images_of_another_size_are_refused(shape):
    permuted = PixelPermutation(Permutation(swaps=3).order((6, 8), 1, 0), (6, 8))
    with pytest.raises(InputError, match=f"images of {shape[0]}x{shape[1]} pixels do not fit a permutation of 6x8"):
        permuted(torch.zeros(2, 3, *shape))


def built(size: tuple[int, int], **options) -> nn.Module:
    return nn.ModuleDict({"permuted": PixelPermutation(Permutation(swaps=9, **options).order(size, 1, 0), size)})


def test_a_checkpoint_keeps_its_permutation_and_says_where_it_differs(recwarn):
    saved, same, other = built((6, 8), seed=1), built((6, 8), seed=1), built((6, 8), seed=2)
    assert list(saved.state_dict()) == ["permuted.order"]
    same.load_state_dict(saved.state_dict())
    assert not recwarn.list
    with pytest.warns(UserWarning, match="trained under another permutation.*the checkpoint's is used"):
        other.load_state_dict(saved.state_dict())
    images = torch.rand(2, 3, 6, 8)
    assert other["permuted"](images).equal(swapped_by_hand(images, saved["permuted"].order.tolist()))


@pytest.mark.parametrize("size", [(8, 8), (6, 7)], ids=str)
def test_a_checkpoint_of_another_image_size_is_refused(size):
    pixels = size[0] * size[1]
    with pytest.raises(InputError, match=f"permutation is of {pixels} pixels, and data.image_size is 6x8"):
        built((6, 8)).load_state_dict(built(size).state_dict())


@pytest.mark.parametrize("options", [{}, {"swaps": 9}, {"swaps": 9, "delta": 2}, {"swaps": 9, "pairs": "within"},
                                     {"swaps": 8, "pairs": "shared"}], ids=str)  # fmt: skip
def test_an_order_is_drawn_on_the_cpu_whatever_the_default_device(options):
    """Lightning builds modules with the GPU as the default device; meta stands in for it here."""
    expected = Permutation(**options).order((8, 8), 4, 0)
    with torch.device("meta"):
        found = Permutation(**options).order((8, 8), 4, 0)
    assert found.device.type == "cpu" and np.array_equal(found.numpy(), expected.numpy())

"""Segments against scikit-image's own, and their merging against hand-made maps and a slow, literal merging."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import label as components
from skimage import data as photographs
from skimage.segmentation import felzenszwalb, slic

from common.errors import InputError
from locality_ablation.segmentation import Felzenszwalb, Segmentation, Slic, merge

PHOTOGRAPHS = ["astronaut", "coffee", "cat"]  # which scikit-image brings along


def photograph(name: str, size: int = 224) -> torch.Tensor:
    """uint8 (3, size, size)."""
    picture = Image.fromarray(getattr(photographs, name)())
    side = min(picture.size)
    square = picture.crop((0, 0, side, side)).resize((size, size), Image.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def noise(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (channels, height, width), np.uint8))


def numbered(labels: np.ndarray) -> np.ndarray:
    """Renamed in the order in which they are first met, row by row."""
    names: dict[int, int] = {}
    return np.array([names.setdefault(label, len(names)) for label in labels.ravel().tolist()]).reshape(labels.shape)


def pieces(labels: np.ndarray, corners: bool = False) -> int:
    """Connected pieces of all segments; `corners` joins over a corner, too."""
    structure = np.ones((3, 3)) if corners else None
    return sum(components(labels == label, structure)[1] for label in np.unique(labels))


# The algorithms


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("iterations, segments, compactness", [(1, 196, 10.0), (2, 196, 10.0), (10, 100, 1.0)])
def test_slic_is_scikit_images(name, iterations, segments, compactness):
    image = photograph(name)
    theirs = slic(image.permute(1, 2, 0).numpy(), n_segments=segments, max_num_iter=iterations, compactness=compactness,
                  channel_axis=-1)  # fmt: skip
    assert 20 < len(np.unique(theirs)) <= 225
    ours, merged = Slic(iterations, segments, compactness)(image)
    assert ours.dtype == torch.uint8 and merged == 0.0
    assert np.array_equal(ours.numpy(), numbered(theirs))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("scale, sigma, min_size", [(300.0, 0.8, 50), (100.0, 1.5, 100)])
def test_felzenszwalb_is_scikit_images(name, scale, sigma, min_size):
    image = photograph(name)
    theirs = felzenszwalb(image.permute(1, 2, 0).numpy(), scale=scale, sigma=sigma, min_size=min_size, channel_axis=-1)
    assert 20 < len(np.unique(theirs)) <= 225
    ours, merged = Felzenszwalb(scale, sigma, min_size)(image)
    assert ours.dtype == torch.uint8 and merged == 0.0
    assert np.array_equal(ours.numpy(), numbered(theirs))


def test_the_defaults_are_the_papers():
    """Scale 30 and 225 tokens (RECIPES 2.2); the rest is scikit-image's, and 196 the grid of 16x16 patches."""
    image = photograph("cat").permute(1, 2, 0).numpy() / 255
    assert np.array_equal(Felzenszwalb().cut(image), felzenszwalb(image, scale=30))
    assert np.array_equal(Slic().cut(image), slic(image, n_segments=196, max_num_iter=1, start_label=0))
    assert Felzenszwalb().limit == Slic().limit == 225


@pytest.mark.parametrize("way", [Slic(2, 9), Felzenszwalb(3.0, 0.5, 2)], ids=["slic", "felzenszwalb"])
@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (1, 12, 7), (3, 5, 16), (3, 1, 9)])
def test_any_channels_and_shapes_are_cut(way, channels, height, width):
    labels = way(noise(channels, height, width)).labels
    assert labels.shape == (height, width)
    assert np.array_equal(labels.numpy(), numbered(labels.numpy()))


# Photographs


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, "noise"])
@pytest.mark.parametrize("limit", [225, 40, 1])
def test_a_photograph_keeps_the_limit(name, limit):
    image = noise(3, 56, 56).repeat_interleave(4, 1).repeat_interleave(4, 2) if name == "noise" else photograph(name)
    way = Felzenszwalb(limit=limit)
    before = felzenszwalb(image.permute(1, 2, 0).numpy(), scale=30)
    assert len(np.unique(before)) > 250
    labels, merged = (part if isinstance(part, float) else part.numpy() for part in way(image))
    assert len(np.unique(labels)) == limit
    assert np.array_equal(labels, numbered(labels))
    assert len(np.unique(np.stack([before, labels]).reshape(2, -1), axis=1).T) == len(np.unique(before))  # none is cut
    assert pieces(labels, corners=True) == limit  # the algorithm's own are joined over corners
    sizes = [np.unique(before[labels == label], return_counts=True)[1] for label in range(limit)]
    low, high = (sum(size.sum() - survivor(size) for size in sizes) / before.size for survivor in (np.max, np.min))
    assert 0 < low <= merged <= high < 1  # of each one went nowhere


def test_slic_beyond_the_limit_stays_connected():
    labels, merged = Slic(10, 400, limit=100)(photograph("astronaut"))
    assert len(labels.unique()) == 100 == pieces(labels.numpy()) and 0 < merged < 1


@pytest.mark.parametrize("limit", [0, 256, -1, 1000])
def test_limits_that_a_byte_cannot_number_are_refused(limit):
    for way in (Slic, Felzenszwalb, Segmentation):
        with pytest.raises(InputError, match=f"data.segmentation.limit: {limit} segments; 1 to 255"):
            way(limit=limit)


@pytest.mark.parametrize("limit", [1, 255])
def test_the_limits_of_a_byte(limit):
    labels = Felzenszwalb(limit=limit)(photograph("astronaut")).labels
    assert int(labels.max()) == limit - 1


@pytest.mark.parametrize("options", [{"iterations": 0}, {"segments": 0}, {"iterations": -2}])
def test_slic_without_iterations_or_segments_is_refused(options):
    with pytest.raises(InputError, match="data.segmentation: .*SLIC needs 1 or more of both"):
        Slic(**options)


# Merging


def grey(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=float)[..., None]


def test_segments_within_the_limit_are_only_numbered():
    labels = np.array([[7, 7, 2], [7, 5, 2], [9, 5, 2]])
    for limit in (4, 5, 255):
        found, merged = merge(labels, np.zeros((3, 3, 1)), limit)
        assert found.tolist() == [[0, 0, 1], [0, 2, 1], [3, 2, 1]] and merged == 0.0


def test_the_smallest_goes_to_the_neighbour_of_the_nearest_colour():
    """Segment 2 is one pixel of 0.5, between 0.1 and 0.8; 3 has its colour, and is elsewhere."""
    labels = np.array([[0, 2, 1], [0, 1, 1], [0, 1, 3], [0, 1, 3]])
    image = grey([[0.1, 0.5, 0.8], [0.1, 0.8, 0.8], [0.1, 0.8, 0.5], [0.1, 0.8, 0.5]])
    found, merged = merge(labels, image, 3)
    assert found.tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 2], [0, 1, 2]] and merged == pytest.approx(1 / 12)


def test_a_corner_is_no_neighbour():
    labels = np.array([[0, 1, 1], [1, 1, 2], [1, 1, 2]])
    image = grey([[0.0, 0.9, 0.9], [0.9, 0.9, 0.0], [0.9, 0.9, 0.0]])
    labels[1, 1], image[1, 1] = 2, 0.0  # touches the first over a corner alone, in the very same colour
    found, merged = merge(labels, image, 2)
    assert found.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1]] and merged == pytest.approx(1 / 9)


def test_colours_are_compared_in_all_channels():
    image = np.zeros((1, 5, 3))
    image[0, :2], image[0, 2], image[0, 3:] = (0.5, 0.5, 0.0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.7)
    assert merge(np.array([[0, 0, 1, 2, 2]]), image, 2)[0].tolist() == [[0, 0, 1, 1, 1]]
    image[0, 3:] = (0.9, 0.9, 0.5)  # 0.57 away, and 0.5 on the other side
    assert merge(np.array([[0, 0, 1, 2, 2]]), image, 2)[0].tolist() == [[0, 0, 0, 1, 1]]


def test_chains_by_hand():
    """Sizes 1, 2, 3 and 6 in a row: the first goes to the second, both to the third, all three to the last."""
    labels, image = np.array([[0, 1, 1, 2, 2, 2] + [3] * 6]), grey([[0.0, 0.1, 0.1, 0.2, 0.2, 0.2] + [0.3] * 6])
    steps = {4: ([0, 1, 1, 2, 2, 2] + [3] * 6, 0), 3: ([0, 0, 0, 1, 1, 1] + [2] * 6, 1),
             2: ([0, 0, 0, 0, 0, 0] + [1] * 6, 1 + 2), 1: ([0] * 12, 1 + 2 + 3)}  # fmt: skip
    for limit, (expected, moved) in steps.items():
        found, merged = merge(labels, image, limit)
        assert found.tolist() == [expected] and merged == pytest.approx(moved / 12), limit


def test_a_merged_segment_has_the_size_and_colour_of_both():
    """A, 1 pixel, makes B 3 pixels of mean 0.4, which is then larger than C of 2 and nearest to what C is."""
    labels = np.array([[0, 1, 1, 2, 2, 3, 3, 3, 3, 3]])
    image = grey([[0.6, 0.3, 0.3, 0.62, 0.62] + [0.82] * 5])  # to 0.3 C would be further than to 0.82
    found, merged = merge(labels, image, 3)
    assert found.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2, 2]] and merged == pytest.approx(0.1)
    found, merged = merge(labels, image, 2)
    assert found.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]] and merged == pytest.approx(0.3)
    image[0, 3:5] = 0.6  # 0.2 from the mean of A and B, 0.22 from D, 0.3 from B alone
    found, merged = merge(labels, image, 2)
    assert found.tolist() == [[0] * 5 + [1] * 5] and merged == pytest.approx(0.3)


def test_numbers_follow_first_pixels_after_merging():
    labels = np.array([[5, 3, 3], [1, 3, 3], [1, 1, 1], [0, 0, 0]])
    image = grey([[0.9, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    assert merge(labels, image, 3)[0].tolist() == [[0, 1, 1], [0, 1, 1], [0, 0, 0], [2, 2, 2]]


def merged_slowly(labels: np.ndarray, image: np.ndarray, limit: int) -> tuple[np.ndarray, float]:
    """The rule taken literally: sizes, colours and neighbours are counted anew from the pixels before every merging."""
    original = labels = numbered(labels)
    while len(names := np.unique(labels)) > limit:
        smallest = min(names, key=lambda name: (labels == name).sum())  # the lowest number of equals
        inside = np.pad(labels == smallest, 1)
        border = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
        around = np.unique(labels[border & (labels != smallest)])
        colour = image[labels == smallest].mean(0)
        target = min(around, key=lambda name: ((image[labels == name].mean(0) - colour) ** 2).sum())
        labels = np.where(labels == smallest, target, labels)
    return numbered(labels), float((labels != original).mean())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("regions", ["blocks", "slic", "pixels"])
def test_merging_equals_a_slow_and_literal_one(seed, regions):
    random = np.random.default_rng(seed)
    height, width = random.integers(6, 13, 2)
    image = random.random((height, width, random.choice([1, 3])))
    labels = {
        "blocks": lambda: np.add.outer(np.arange(height) // 3 * 10, np.arange(width) // 2)[::-1],
        "slic": lambda: slic(random.random((height, width, 3)), n_segments=30, max_num_iter=3),
        "pixels": lambda: random.permutation(height * width).reshape(height, width),
    }[regions]()
    count = len(np.unique(labels))
    for limit in {count - 1, count // 2, count // 4, 3, 1} - {0}:
        ours, theirs = merge(labels, image, limit), merged_slowly(labels, image, limit)
        assert np.array_equal(ours[0], theirs[0]) and ours[1] == pytest.approx(theirs[1]), limit
        assert len(np.unique(ours[0])) == pieces(ours[0]) == min(limit, count)


def test_a_way_of_ones_own_is_given_intensities_in_0_to_1():
    given: list[np.ndarray] = []

    class Own(Segmentation):
        def cut(self, image: np.ndarray) -> np.ndarray:
            given.append(image)
            return np.arange(image[..., 0].size).reshape(image.shape[:2])

    image = noise(3, 4, 5)
    labels, merged = Own(limit=3)(image)
    assert np.array_equal(given[0], image.permute(1, 2, 0).numpy() / 255)
    assert len(labels.unique()) == 3 and merged > 0.5


def test_the_share_is_of_pixels_and_not_of_segments():
    """The larger of two goes nowhere: of 10 pixels, 1 moves."""
    labels = np.zeros((2, 5), int)
    labels[1, 4] = 1
    assert merge(labels, np.random.default_rng(0).random((2, 5, 3)), 1)[1] == pytest.approx(0.1)

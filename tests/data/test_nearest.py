"""Single-pixel downsizing (paper, appendix G) against PIL, and bicubic against what it must not be mistaken for."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from common.data import Augment, ImageData, ImageFolder, Shapes
from common.data.crop import Boxes, crop, crop_one, fit, fit_one
from common.data.loader import Draw
from common.data.preparation import TrainingPreparation

RAND = {"crop_scale": (0.5, 1.0), "interpolation": "nearest", "rand_augment": "rand-m9-mstd0.5-inc1"}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def cropped(image: torch.Tensor, box: tuple[int, ...], size: tuple[int, int], how: int = Image.NEAREST) -> torch.Tensor:
    """By PIL: the box (top, left, height, width) is cut out, then resized."""
    top, left, height, width = box
    return tensor(pil(image).crop((left, top, left + width, top + height)).resize(size[::-1], how))


def fitted(image: torch.Tensor, size: tuple[int, int], share: float, how: int = Image.NEAREST) -> torch.Tensor:
    """By PIL: the side that binds becomes int(size / share), the other keeps the shape, the centre remains."""
    picture = pil(image)
    high, wide = (int(side / share) for side in size)
    if high * picture.width >= wide * picture.height:
        wide = high * picture.width // picture.height
    else:
        high = wide * picture.height // picture.width
    left, top = round((wide - size[1]) / 2), round((high - size[0]) / 2)
    return tensor(picture.resize((wide, high), how).crop((left, top, left + size[1], top + size[0])))


def tied(length: int, size: int) -> bool:
    """Whether a resized pixel's centre falls on the border of two pixels, where PIL takes either by its rounding."""
    return any((2 * i + 1) * length % (2 * size) == 0 for i in range(size))


def batch_crop(image: torch.Tensor, box: tuple[int, ...], size: tuple[int, int]) -> torch.Tensor:
    boxes = Boxes(*(torch.tensor([side]) for side in box))
    return (crop(image[None] / 255, boxes, size, "nearest")[0] * 255).round().byte()


# Crops and fits


def sizes_without_ties(n: int) -> list[tuple[int, int, int]]:
    """Source, box and result along one side."""
    random, found = np.random.default_rng(0), []
    while len(found) < n:
        source = int(random.integers(1, 400))
        length, size = int(random.integers(1, source + 1)), int(random.choice([1, 3, 14, 28, 32, 64, 73, 224]))
        if not tied(length, size):
            found.append((source, length, size))
    return found


@pytest.mark.parametrize("part", range(4))
def test_a_crop_equals_pils(part):
    """Enlarged and reduced, each side by a factor of its own; 400 boxes."""
    random = np.random.default_rng(part)
    high, wide = (sizes_without_ties(400)[start + part :: 8] for start in (0, 4))
    for (height, h, size_h), (width, w, size_w) in zip(high, wide, strict=True):
        image, size = noise(3, height, width, seed=height), (size_h, size_w)
        box = int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
        expected = cropped(image, box, size)
        assert torch.equal(batch_crop(image, box, size), expected), (box, size)
        assert torch.equal(crop_one(image, box, size, "nearest"), expected), (box, size)


def test_boxes_of_a_batch_are_their_own_and_flips_mirror():
    images, size, random = noise(24, 3, 45, 37), (13, 11), np.random.default_rng(1)
    boxes = []
    for _ in images:
        height, width = 1 + 2 * random.integers(0, 22), 1 + 2 * random.integers(0, 18)  # odd sides have no ties
        boxes.append((random.integers(46 - height), random.integers(38 - width), height, width))
    flip = torch.arange(24) % 3 == 0
    found = crop(images / 255, Boxes(*torch.tensor(np.array(boxes)).T), size, "nearest", flip)
    for image, box, mirrored, ours in zip(images, boxes, flip, (found * 255).round().byte(), strict=True):
        expected = cropped(image, box, size)
        assert torch.equal(ours, expected.flip(-1) if mirrored else expected), box


@pytest.mark.parametrize("shape, size, share", [
    ((37, 51), (28, 28), 0.875), ((51, 37), (14, 14), 0.875), ((375, 499), (28, 28), 0.875),
    ((333, 499), (224, 224), 0.875),
    ((45, 61), (12, 20), 1.0), ((9, 7), (32, 32), 1.0), ((101, 33), (8, 8), 0.7), ((480, 640), (48, 64), 1.0),
], ids=str)  # fmt: skip
def test_a_fit_equals_pils(shape, size, share):
    images = noise(3, 3, *shape)
    expected = torch.stack([fitted(image, size, share) for image in images])
    assert torch.equal((fit(images / 255, size, share, "nearest") * 255).round().byte(), expected)
    flip = torch.tensor([True, False, True])
    flipped = (fit(images / 255, size, share, "nearest", flip) * 255).round().byte()
    assert torch.equal(flipped, torch.stack([expected[0].flip(-1), expected[1], expected[2].flip(-1)]))
    assert torch.equal(torch.stack([fit_one(image, size, share, "nearest") for image in images]), expected)


def test_every_value_is_one_of_the_image_and_none_a_mean():
    images = noise(2, 3, 61, 47) // 2 * 2  # a mean of two would be odd at times
    for found in (fit(images / 255, (9, 9), 1.0, "nearest") * 255, fit(images / 255, (90, 90), 1.0, "nearest") * 255):
        assert torch.equal(found.round() % 2, torch.zeros_like(found)) and (found - found.round()).abs().max() < 1e-4
    bilinear = (fit(images / 255, (9, 9), 1.0, "bilinear") * 255).round()
    assert (bilinear % 2).any()


def test_a_size_that_is_a_divisor_takes_single_pixels():
    """Of 224 to 28 pixel 4 of each eight: PIL's centre lies on the border of the fourth and the fifth."""
    images = noise(1, 3, 224, 224)
    for found in ((fit(images / 255, (28, 28), 1.0, "nearest") * 255).round().byte()[0],
                  fit_one(images[0], (28, 28), 1.0, "nearest"), fitted(images[0], (28, 28), 1.0)):  # fmt: skip
        assert torch.equal(found, images[0, :, 4::8, 4::8])


# Ties


TIES = [(length, size) for size in (7, 14, 28, 42, 56, 224) for length in range(1, 400) if tied(length, size)]


def column(length: int, size: int, start: int, path: Callable) -> list[int]:
    """Which of up to 400 pixels each resized one is."""
    numbers = torch.arange(start + length)
    image = torch.stack([numbers % 20, numbers // 20, 0 * numbers]).to(torch.uint8)[:, None]
    found = path(image, (0, start, 1, length), (1, size))[:, 0].int()
    return (found[0] + 20 * found[1]).tolist()


def single(image: torch.Tensor, box: tuple[int, ...], size: tuple[int, int]) -> torch.Tensor:
    return crop_one(image, box, size, "nearest")


@pytest.mark.parametrize("path", [batch_crop, single])
def test_where_two_pixels_are_as_near_one_of_them_is_taken(path):
    for length, size in TIES:
        for start in (0, 57):
            for i, taken in enumerate(column(length, size, start, path)):
                centre = (2 * i + 1) * length  # in halves of a resized pixel
                exact, tie = start + centre // (2 * size), centre % (2 * size) == 0
                assert taken in ((exact - 1, exact) if tie else (exact,)), (length, size, start, i)


def test_ties_fall_alike_in_batches_and_one_by_one():
    """In float32 some centres would be below the border in one path and on it in the other."""
    differing = [(length, size, start) for length, size in TIES for start in (0, 57, 139)
                 if column(length, size, start, batch_crop) != column(length, size, start, single)]  # fmt: skip
    assert differing == []


@pytest.mark.parametrize("path", [batch_crop, single])
def test_ties_fall_as_pils(path):
    """PIL adds up the scale in float64, and takes the lower pixel where its sum has fallen short."""
    differing = [(length, size) for length, size in TIES
                 if column(length, size, 0, path) != column(length, size, 0, cropped)]  # fmt: skip
    assert differing == []


@pytest.mark.parametrize("path", ["batch", "one by one"])
def test_the_commonest_photograph_of_imagenet_is_fitted_as_by_pil(path):
    """The long side of 375x500 becomes 42 pixels, two of whose centres are ties."""
    image = noise(3, 375, 500)
    if path == "batch":
        found = (fit(image[None] / 255, (28, 28), 0.875, "nearest")[0] * 255).round().byte()
    else:
        found = fit_one(image, (28, 28), 0.875, "nearest")
    assert (found != fitted(image, (28, 28), 0.875)).any(0).any(0).nonzero()[:, 0].tolist() == []


# Bicubic is antialiased, and nothing between it and nearest is used


@pytest.mark.parametrize("shape, size", [((224, 224), (28, 28)), ((100, 75), (32, 24)), ((61, 61), (14, 14))], ids=str)
def test_bicubic_is_pils_antialiased_and_not_torchs_plain(shape, size):
    image = noise(3, *shape)
    whole, box = (0, 0, *shape), Boxes(*(torch.tensor([side]) for side in (0, 0, *shape)))
    expected = cropped(image, whole, size, Image.BICUBIC)
    plain = F.interpolate(image[None] / 255, size, mode="bicubic", antialias=False)[0].clamp(0, 1) * 255
    paths = {
        "crop": crop(image[None] / 255, box, size, "bicubic")[0].clamp(0, 1) * 255,
        "fit": fit(image[None] / 255, size, 1.0, "bicubic")[0].clamp(0, 1) * 255,
        "crop_one": crop_one(image, whole, size, "bicubic"), "fit_one": fit_one(image, size, 1.0, "bicubic"),
    }  # fmt: skip
    for name, found in paths.items():
        assert (found.float() - expected.float()).abs().max() <= 1.51, name  # rounded once or twice
        assert (found.float() - plain).abs().mean() > 20, name
    nearest = cropped(image, whole, size).float()
    assert (plain - nearest).abs().mean() > 20 and (expected.float() - nearest).abs().mean() > 20


# The recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """6 PNGs of noise, 33x51 pixels, in two classes."""
    for i in range(6):
        path = tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pil(noise(3, 33, 51, seed=i)).save(path)
    (tmp_path / "pictures" / "val").symlink_to("train")
    return tmp_path / "pictures"


@pytest.mark.parametrize("source", ["memory", "files"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_data_are_downsized_by_single_pixels_in_training_and_evaluation(source, split, folder):
    images = Shapes(33, train=6) if source == "memory" else ImageFolder(str(folder))
    data = ImageData(images, 10, 4, augment=Augment(interpolation="nearest", flip=0.5), eval_interpolation="nearest",
                     eval_crop=0.875 if split == "val" else 1.0, mean=[0.0], std=[1.0])  # fmt: skip
    data.trainer = SimpleNamespace(seed=3, training=split == "train", predicting=False,
                                   strategy=SimpleNamespace(root_device=torch.device("cpu")))
    data.sets[split] = data.load(split)
    which = [[Draw(1, index, index) for index in range(6)]]
    loader = DataLoader(data.sets[split], batch_sampler=which, collate_fn=lambda batch: batch)
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    raw = images.read(Path(), split).images
    flips = 0
    for i, found in enumerate((batch["image"] * 255).round().byte()):
        whole = raw[i] if source == "memory" else tensor(Image.open(raw[i]))
        expected = fitted(whole, (10, 10), 0.875 if split == "val" else 1.0)
        mirrored = torch.equal(found, expected.flip(-1)) and not torch.equal(found, expected)
        assert mirrored or torch.equal(found, expected)
        flips += mirrored
    assert (0 < flips < 6) == (split == "train")


def test_a_random_crop_takes_the_image_at_random_places_only_as_it_is():
    """The pixels of a random crop are the image's own, in rows and columns that ascend."""
    numbers = torch.arange(60 * 60).view(60, 60)
    image = torch.stack([numbers % 60, numbers // 60, 0 * numbers]).to(torch.uint8)
    recipe = Augment(crop_scale=(0.2, 1.0), interpolation="nearest")
    prepare = TrainingPreparation(recipe, (14, 14), 0, (0.5,))
    together = recipe.batch(image.expand(20, -1, -1, -1), recipe.draws(0, 1, torch.arange(20)), (14, 14),
                            torch.zeros(3), torch.ones(3))  # fmt: skip
    for index in range(20):
        for found in (prepare([image], [Draw(1, index, 0)])[0], (together[index] * 255).round().byte()):
            columns, rows = found[0].int(), found[1].int()
            assert (columns == columns[:1]).all() and (rows == rows[:, :1]).all() and not found[2].any()
            assert (columns[0].diff() > 0).all() and (rows[:, 0].diff() > 0).all()


BICUBIC, BILINEAR, NEAREST = (int(how) for how in (Image.BICUBIC, Image.BILINEAR, Image.NEAREST))


@pytest.mark.parametrize("options, resampling", [
    ({}, BICUBIC), ({"rand_augment_interpolation": "bilinear"}, BILINEAR),
    ({"rand_augment_interpolation": "nearest"}, NEAREST), ({"interpolation": "bilinear"}, BILINEAR),
    ({"interpolation": "bilinear", "rand_augment_interpolation": "bicubic"}, BICUBIC),
    ({"interpolation": "bicubic", "rand_augment_interpolation": "nearest"}, NEAREST),
    ({"interpolation": "adm", "crop_scale": None, "rand_augment_interpolation": "bilinear"}, BILINEAR),
], ids=str)  # fmt: skip
def test_rand_augment_resamples_as_it_is_told(options, resampling):
    """Bicubically where the crop is nearest: only the downsizing is ablated."""
    operator = TrainingPreparation(Augment(**{**RAND, **options}), (32, 32), 0, (0.5,)).rand_augment
    assert {int(op.kwargs["resample"]) for op in operator.ops} == {resampling}


def test_rand_augment_still_turns_smoothly():
    """A rotated edge has greys between black and white, unless its own interpolation is nearest, too."""
    edge = torch.zeros(3, 32, 32, dtype=torch.uint8)
    edge[:, :, 16:] = 255
    greys = {}
    for how in (None, "bicubic", "nearest"):
        recipe = Augment(interpolation="nearest", rand_augment="rand-m9-n2-mstd0.5", rand_augment_interpolation=how)
        prepare = TrainingPreparation(recipe, (32, 32), 0, (0.0,))
        prepare.rand_augment.ops = [op for op in prepare.rand_augment.ops if op.name in ("Rotate", "ShearX", "ShearY")]
        found = prepare([edge] * 12, [Draw(0, index, 0) for index in range(12)])
        greys[how] = found[(found > 0) & (found < 255)]
    assert len(greys[None]) > 200 and torch.equal(greys[None], greys["bicubic"]) and len(greys["nearest"]) == 0


@pytest.mark.parametrize("options, message", [
    ("--data.augment.interpolation=closest", "data.augment.interpolation"),
    ("--data.eval_interpolation=Nearest", "data.eval_interpolation"),
    ("--data.augment.rand_augment_interpolation=adm", "data.augment.rand_augment_interpolation"),
])  # fmt: skip
def test_other_words_are_refused(command: Callable, options, message):
    outcome = command("check", options)
    assert outcome.code == 2 and message in outcome.err

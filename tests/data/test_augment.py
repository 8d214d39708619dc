"""The recipe: what an image becomes depends on (seed, epoch, index) and on nothing else."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.data import colour
from common.data.augment import FLIP, Augment
from common.data.crop import adm_crop
from common.data.loader import Draw
from common.data.preparation import TrainingPreparation
from common.data.throughput import MOCO_CIFAR, augmentation_throughput
from common.errors import InputError

MEAN, STD = torch.zeros(3), torch.ones(3)
RAND = Augment(crop_scale=(0.5, 1.0), flip=0.5, interpolation="bicubic", rand_augment="rand-m9-mstd0.5-inc1")


def batch(images: torch.Tensor, epoch: int, index: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return MOCO_CIFAR.batch(images[index], MOCO_CIFAR.draws(seed, epoch, index), (16, 16), MEAN, STD)


def test_a_batch_does_not_depend_on_its_company() -> None:
    images = torch.randint(256, (300, 3, 16, 16), dtype=torch.uint8)
    all_of_them = batch(images, 3, torch.arange(300))
    some = torch.tensor([250, 7, 131, 90, 8])
    torch.testing.assert_close(batch(images, 3, some), all_of_them[some], atol=1e-6, rtol=0)


def test_seed_and_epoch_change_all_images() -> None:
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    index = torch.arange(8)
    first = batch(images, 0, index)
    for other in (batch(images, 1, index), batch(images, 0, index, seed=1)):
        assert ((first - other).abs().amax((1, 2, 3)) > 0.05).all()


def test_images_of_a_batch_have_parameters_of_their_own() -> None:
    same = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8).expand(64, -1, -1, -1)
    assert len(batch(same, 0, torch.arange(64)).flatten(1).unique(dim=0)) == 64


def test_probabilities() -> None:
    draws = MOCO_CIFAR.draws(0, 0, torch.arange(20_000))
    assert abs((draws[:, FLIP] < 0.5).float().mean() - 0.5) < 0.015
    image = torch.rand(1, 3, 6, 6).expand(2000, -1, -1, -1)
    grey = Augment(grayscale=0.2)
    result = grey.batch((image * 255).byte(), grey.draws(0, 0, torch.arange(2000)), (6, 6), MEAN, STD)
    colourless = (result.amax(1) - result.amin(1)).amax((1, 2)) < 1e-5
    assert abs(colourless.float().mean() - 0.2) < 0.04


def test_jitter_has_its_reach_its_probability_and_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's ColorJitter: factors uniform about 1, of hue about 0, and the operations in any order."""
    taken = []
    monkeypatch.setattr(colour, "jitter", lambda images, *drawn: taken.append(drawn) or images)
    recipe = Augment(jitter=(0.4, 0.3, 0.2, 0.1), jitter_probability=0.8)
    draws = recipe.draws(0, 0, torch.arange(20_000))
    recipe.colour(torch.zeros(20_000, 3, 1, 1), draws)
    [(factors, order)] = taken
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    jittered = factors[(factors != neutral).any(1)] - neutral
    assert len(jittered) / 20_000 == pytest.approx(0.8, abs=0.015)
    reach = torch.tensor([0.4, 0.3, 0.2, 0.1])
    torch.testing.assert_close(jittered.amax(0), reach, atol=1e-3, rtol=0)
    torch.testing.assert_close(jittered.amin(0), -reach, atol=1e-3, rtol=0)
    assert (jittered.mean(0) / reach).abs().max() < 0.03 and (jittered.std(0) / reach - 3**-0.5).abs().max() < 0.02
    orders, times = order.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (times / 20_000 * 24 - 1).abs().max() < 0.15
    mixed = torch.cat([factors, order.float(), draws[:, FLIP, None]], 1).T.corrcoef()
    assert mixed[:4, 4:].abs().max() < 0.03 and mixed[4:8, 8].abs().max() < 0.03


def test_the_default_only_fits() -> None:
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    plain = Augment()
    result = plain.batch(images, plain.draws(0, 0, torch.arange(5)), (8, 8), MEAN[:1], STD[:1])
    torch.testing.assert_close(result, images / 255)


@pytest.mark.parametrize("scale, interpolation", [(None, "bicubic"), ((0.1, 1.0), "bicubic"), (None, "adm")])
def test_one_by_one_equals_the_batch_but_for_rounding(scale: tuple[float, float] | None, interpolation: str) -> None:
    recipe = Augment(crop_scale=scale, flip=0.5, interpolation=interpolation)
    smooth = torch.nn.functional.interpolate(torch.rand(12, 3, 4, 4), size=(30, 24), mode="bilinear")
    images = (smooth * 255).round().byte()
    draws = recipe.draws(0, 2, torch.arange(12))
    together = recipe.batch(images, draws, (16, 16), MEAN, STD)
    for i, image in enumerate(images):
        alone = TrainingPreparation(recipe, (16, 16), 0, (0.5,))([image], [Draw(2, i, 0)])[0]
        assert alone.dtype == torch.uint8
        torch.testing.assert_close(alone / 255, together[i], atol=2 / 255, rtol=0)


def test_training_by_adm_halves_then_flips() -> None:
    image = torch.randint(256, (3, 130, 150), dtype=torch.uint8)
    expected = adm_crop(image, 32)
    plain, adm = (TrainingPreparation(Augment(flip=0.5, interpolation=how), (32, 32), 0, (0.5,))
                  for how in ("bicubic", "adm"))  # fmt: skip
    flips = []
    for index in range(16):
        result, other = (prepare([image], [Draw(0, index, 0)])[0] for prepare in (adm, plain))
        assert (result.int() - other.int()).abs().max() > 8
        flips.append(result.equal(expected.flip(-1)))
        assert flips[-1] or result.equal(expected)
    assert 0 < sum(flips) < 16


def test_rand_augment_is_a_function_of_its_keys_and_leaves_the_generators_alone() -> None:
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    prepare = TrainingPreparation(RAND, (32, 32), 5, (0.485, 0.456, 0.406))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    results = {(epoch, index): prepare([image], [Draw(epoch, index, 0)])[0]
               for epoch in range(3) for index in range(6)}
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert len({result.numpy().tobytes() for result in results.values()}) == 18
    again = TrainingPreparation(RAND, (32, 32), 5, (0.485, 0.456, 0.406))
    for (epoch, index), result in reversed(results.items()):
        assert again([image], [Draw(epoch, index, 99)])[0].equal(result)
    draws = [Draw(1, index, 0) for index in range(6)]
    together = again([image] * 6, draws)
    assert all(together[index].equal(results[1, index]) for index in range(6))


@pytest.mark.parametrize("recipe", [RAND, replace(RAND, crop_scale=None, interpolation="adm")], ids=["bicubic", "adm"])
def test_rand_augment_has_the_papers_operators_and_fill(recipe: Augment) -> None:
    operator = TrainingPreparation(recipe, (32, 32), 0, (0.485, 0.456, 0.406)).rand_augment
    names = {op.name for op in operator.ops}
    assert operator.num_layers == 2 and len(names) == 15
    assert {"PosterizeIncreasing", "SolarizeAdd", "TranslateXRel", "BrightnessIncreasing"} <= names
    for op in operator.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert op.kwargs["fillcolor"] == (124, 116, 104)
        assert int(op.kwargs["resample"]) == 3  # PIL's bicubic


@pytest.mark.parametrize("wrong", [
    {"flip": 1.5}, {"crop_scale": (0.5, 0.1)}, {"crop_scale": (0.0, 1.0)}, {"crop_ratio": (-1.0, 1.0)},
    {"jitter": (0.4, 0.4, 0.4, 0.6)}, {"jitter": (-0.1, 0.0, 0.0, 0.0)}, {"grayscale": -1.0},
    {"interpolation": "adm", "crop_scale": (0.3, 1.0)},
], ids=str)  # fmt: skip
def test_a_wrong_value_is_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Augment(**wrong)


@pytest.mark.parametrize("text", ["augmix-m3", "rand-x9", "rand-mfoo1"])
def test_a_description_that_timm_does_not_read_is_named(text: str) -> None:
    with pytest.raises(InputError, match=f"rand_augment.*{text}"):
        TrainingPreparation(Augment(rand_augment=text), (8, 8), 0, (0.5,))


def test_throughput_measures_both_pipelines() -> None:
    result = augmentation_throughput(torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8), rounds=2)
    assert set(result) == {"batched", "pil", "ratio"} and min(result.values()) > 0

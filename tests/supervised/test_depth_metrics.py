"""Depth errors against numbers worked out by hand."""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from supervised.depth_metrics import DepthErrors
from supervised.nyu import EIGEN_CROP

RANGE = (0.001, 10.0)


def images(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)[:, None, None]


def scores(prediction: torch.Tensor, truth: torch.Tensor, **options) -> dict[str, float]:
    metric = DepthErrors(RANGE, **options)
    metric.update(prediction, truth)
    return {name: float(value) for name, value in metric.compute().items()}


def test_per_image_pooled_and_textbook_errors_by_hand():
    truth = images([1.0, 2.0, 4.0, 0.0], [2.0, 2.0, 4.0, 4.0])  # the first image's last pixel is unknown
    prediction = images([2.0, 2.0, 4.0, 9.0], [2.0, 2.0, 4.0, 8.0])
    found = scores(prediction, truth)
    expected = {
        "rmse": (math.sqrt(1 / 3) + math.sqrt(16 / 4)) / 2,
        "rmse_pooled": math.sqrt(17 / 7),
        "rae": ((1 / 3) + (1 / 4)) / 2,
        "rae_pooled": 2 / 7,
        "relative_absolute_error": (1 + 4) / ((4 / 3 + 1 / 3 + 5 / 3) + 4),
        "delta1": (2 / 3 + 3 / 4) / 2,
        "delta2": (2 / 3 + 3 / 4) / 2,
        "delta3": (2 / 3 + 3 / 4) / 2,
        "log10": (math.log10(2) / 3 + math.log10(2) / 4) / 2,
    }
    assert found == pytest.approx(expected)
    assert found["rmse"] < found["rmse_pooled"]


def test_delta_thresholds_are_powers_of_a_quarter_more_either_way():
    truth = images([1.0] * 6)
    prediction = images([1.24, 1 / 1.24, 1.26, 1 / 1.5, 1.6, 2.0])
    found = scores(prediction, truth)
    assert [found[f"delta{k}"] for k in (1, 2, 3)] == pytest.approx([2 / 6, 4 / 6, 5 / 6])


def test_prediction_is_clamped_and_truth_outside_the_range_left_out():
    assert scores(images([30.0, 5.0, 5.0]), images([9.0, 10.0, 0.001]))["rmse"] == pytest.approx(1.0)


def test_an_image_without_a_known_pixel_is_left_out():
    truth = images([1.0, 1.0], [0.0, 0.0])
    assert scores(images([3.0, 3.0], [9.0, 9.0]), truth)["rmse"] == pytest.approx(2.0)


def test_any_batches_give_the_same_errors():
    generator = torch.Generator().manual_seed(0)
    truth, prediction = (10.5 * torch.rand(7, 1, 6, 8, generator=generator) for _ in range(2))
    whole, parts = DepthErrors(RANGE), DepthErrors(RANGE)
    whole.update(prediction, truth)
    for chunk in ([0, 1, 2, 3], [4], [5, 6]):
        parts.update(prediction[chunk], truth[chunk])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value, rtol=1e-12, atol=0)


def test_eigen_crop_scores_its_426_by_560_pixels_and_no_other():
    truth = torch.full((1, 1, 480, 640), 2.0)
    prediction = torch.full_like(truth, 7.0)
    prediction[:, :, 45:471, 41:601] = 3.0
    metric = DepthErrors(RANGE, crop=EIGEN_CROP)
    metric.update(prediction, truth)
    assert metric.pixels == 426 * 560
    assert float(metric.compute()["rmse"]) == pytest.approx(1.0)


def test_low_size_takes_the_nearest_truth_and_leaves_holes_alone():
    truth = torch.ones(1, 1, 6, 6)
    truth[..., 1, 1] = 3.0  # the centre of the first 3x3 block
    truth[..., 4, 4] = 0.0
    metric = DepthErrors(RANGE, size=(2, 2), suffix="_low")
    metric.update(torch.ones(1, 1, 2, 2), truth)
    assert metric.pixels == 3
    assert float(metric.compute()["rmse_low"]) == pytest.approx(math.sqrt(4 / 3))


def test_a_smaller_prediction_is_enlarged_bilinearly():
    prediction = torch.tensor([[1.0, 3.0]]).view(1, 1, 1, 2)
    assert scores(prediction, torch.tensor([1.0, 1.5, 2.5, 3.0]).view(1, 1, 1, 4))["rmse"] == pytest.approx(0, abs=1e-6)


def test_both_sizes_in_one_collection_keep_their_names():
    collection = MetricCollection({"full": DepthErrors(RANGE), "low": DepthErrors(RANGE, size=(1, 2), suffix="_low")},
                                  compute_groups=False)
    collection.update(images([1.0, 2.0]), images([1.0, 2.0]))
    assert {"rmse", "rae", "rmse_low", "rae_low"} <= set(collection.compute())

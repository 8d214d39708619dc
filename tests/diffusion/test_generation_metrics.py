"""FID, Inception score, precision and recall against closed forms, plain loops and torch-fidelity."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.linalg import sqrtm
from torch import Tensor

from common.errors import InputError
from diffusion import metrics
from diffusion.features import Extracted
from diffusion.metrics import (
    FeatureSums,
    InceptionScore,
    Measurement,
    ReconstructionDistance,
    Statistics,
    frechet_distance,
    precision_recall,
    refuse_few,
    squared_radii,
)


def features(images: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, skewed features with a mean, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return (torch.randn(images, width, generator=generator) @ mixing + 0.3).relu() + 0.1 * seed


def statistics(rows: Tensor) -> Statistics:
    sums = FeatureSums(rows.shape[1])
    sums.update(rows)
    return sums.compute()


def as_dict(one: Statistics) -> dict[str, np.ndarray]:
    return {"mu": one.mean.numpy(), "sigma": one.covariance.numpy()}


# Fréchet distance


def test_statistics_are_numpys_mean_and_unbiased_covariance():
    rows = features(50, 7) + 10  # a mean that is large beside the deviations
    mean, covariance = statistics(rows)
    exact = rows.double().numpy()
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-12)


def test_distance_of_gaussians_on_a_line_is_known():
    one = Statistics(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    other = Statistics(torch.tensor([4.0]).double(), torch.tensor([[25.0]]).double())
    assert frechet_distance(one, other) == pytest.approx((4 - 1) ** 2 + (5 - 2) ** 2)


def test_distance_of_gaussians_with_common_axes_is_known():
    axes = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()).Q
    deviations = torch.tensor([[1.0, 2, 3, 4, 5], [2.0, 2, 0, 1, 9]]).double()  # one axis of the second has no width
    means = torch.tensor([[0.0, 0, 0, 0, 0], [1.0, 0, 2, 0, 0]]).double()
    covariances = axes @ deviations.square().diag_embed() @ axes.T
    one, other = map(Statistics, means, covariances)
    assert frechet_distance(one, other) == pytest.approx(5 + 1 + 0 + 9 + 9 + 16, rel=1e-6)


def test_distance_is_that_of_scipys_matrix_root_and_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    one, other = statistics(features(400, 60)), statistics(features(300, 60, seed=1))
    root = sqrtm(one.covariance.numpy() @ other.covariance.numpy()).real
    traces = np.trace(one.covariance.numpy() + other.covariance.numpy() - 2 * root)
    found = frechet_distance(one, other)
    assert found == pytest.approx(float((one.mean - other.mean).square().sum()) + traces, rel=1e-9)
    theirs = fid_statistics_to_metric(as_dict(one), as_dict(other), verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(found, rel=1e-9)


class Shown(torch.nn.Module):
    """Features of images that are their own numbers, as torchmetrics asks an extractor for them."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_distance_and_score_are_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as TheirScore

    one, other = features(400, 12), features(300, 12, seed=1)
    theirs = FrechetInceptionDistance(Shown()).set_dtype(torch.float64)
    for rows, real in [(one, False), (other, True)]:
        for part in rows.double().split(70):
            theirs.update(part.view(-1, 3, 2, 2), real=real)
    assert frechet_distance(statistics(one), statistics(other)) == pytest.approx(theirs.compute().item(), rel=1e-6)

    score, whole = TheirScore(Shown(), splits=1), InceptionScore(400, 12)  # theirs shuffles: one split of 5000
    score.update(one.view(-1, 3, 2, 2))
    whole.update(one, torch.arange(400))
    assert whole.compute()[0] == pytest.approx(score.compute()[0].item(), rel=1e-5)


def test_fewer_images_than_features_still_give_a_finite_distance_as_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    one, other = statistics(features(20, 60)), statistics(features(30, 60, seed=1))
    theirs = fid_statistics_to_metric(as_dict(one), as_dict(other), verbose=False)["frechet_inception_distance"]
    assert frechet_distance(one, other) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_too_few_images_are_refused_with_the_number_that_is_enough():
    refuse_few(61, 60, "samples.npz")
    with pytest.raises(InputError, match=r"samples\.npz: 60 images for 60 .* at least 61, .* --allow-few-samples"):
        refuse_few(60, 60, "samples.npz")


def test_features_that_are_not_finite_are_no_statistics():
    rows = features(9, 3)
    rows[4, 1] = math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        statistics(rows)


# Inception score


def loops(logits: Tensor, split: int) -> list[float]:
    """The score of each split, one image and one class after the other."""
    probabilities = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits.double().tolist()]
    found = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split]
        mean = [sum(column) / len(part) for column in zip(*part, strict=True)]
        divergences = [sum(p * math.log(p / q) for p, q in zip(row, mean, strict=True)) for row in part]
        found.append(math.exp(sum(divergences) / len(part)))
    return found


def test_score_is_the_mean_over_unshuffled_splits_the_shorter_last_one_included(monkeypatch):
    monkeypatch.setattr(metrics, "SPLIT", 8)
    logits = 3 * torch.randn(21, 5, generator=torch.Generator().manual_seed(0))
    logits[:8, 0] += 6  # the first split is of one class: an order that mixes the splits would score higher
    score = InceptionScore(21, 5)
    score.update(logits, torch.arange(21))
    expected = loops(logits, 8)
    assert score.compute() == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


def test_score_is_torch_fidelitys_without_its_shuffle(monkeypatch):
    from torch_fidelity.metric_isc import isc_features_to_metric

    monkeypatch.setattr(metrics, "SPLIT", 30)
    logits = 3 * torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    logits[:, 3] -= 2000  # a class that no image has: its probability is 0 in double precision too
    score = InceptionScore(300, 20)
    score.update(logits, torch.arange(300))
    logits[:, 3] = -700
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert score.compute() == pytest.approx(expected, rel=1e-9)


def test_splits_are_of_5000_images():
    assert InceptionScore(12_000, 3).sizes == [5000, 5000, 2000]


def test_a_score_of_images_that_were_counted_twice_or_never_is_refused():
    score = InceptionScore(4, 3)
    score.update(torch.zeros(5, 3), torch.tensor([0, 1, 2, 3, 3]))
    with pytest.raises(AssertionError, match="5"):
        score.compute()


# Several processes


class Widths:
    features, spatial_features, classes = 4, 3, 5


def measurement(places: Tensor) -> Measurement:
    """Of the images at `places` of eleven."""
    generator = torch.Generator().manual_seed(0)
    pooled, spatial, logits = (torch.randn(11, width, generator=generator) for width in (4, 3, 5))
    found = Measurement(Widths, 11, ["fd", "sfd", "classifier_score", "precision"])
    for some in places.split(2):
        found.update(Extracted(pooled[some], spatial[some], logits[some]), some)
    return found


class Pixels(torch.nn.Module):
    """An extractor whose features are the pixels."""

    features, channels, name, tags = 12, 3, "pixels", {"fd": "fd_pixels"}

    def forward(self, images: Tensor) -> Extracted:
        return Extracted(images.flatten(1).float(), None, None)


def reconstruction_distance(index: Tensor) -> float:
    """Of these of eleven images, in two batches."""
    images = torch.randint(256, (2, 11, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    distance = ReconstructionDistance(Pixels())
    for some in index.split(3):
        distance.update(*images[:, some])
    return distance.compute().item()


def every_other_image(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # a fork must not use its parent's pool
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = torch.arange(rank, 11, 2)
    torch.save(measurement(mine).compute() | {"rfd": reconstruction_distance(mine)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_that_share_the_images_measure_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "SPLIT", 6)
    mp.start_processes(every_other_image, (str(tmp_path),), nprocs=2, start_method="fork")
    whole = measurement(torch.arange(11)).compute()
    assert whole["classifier_score"][1] > 0  # two splits
    rfd = reconstruction_distance(torch.arange(11))
    assert rfd != pytest.approx(reconstruction_distance(torch.arange(0, 11, 2)), rel=0.01)  # of one rank's share
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for key in ("fd", "sfd"):
            torch.testing.assert_close(found[key], whole[key], rtol=1e-13, atol=1e-15)
        assert found["classifier_score"] == pytest.approx(whole["classifier_score"], rel=1e-13)
        assert found["rfd"] == pytest.approx(rfd, rel=1e-6)
        order = torch.cat([torch.arange(0, 11, 2), torch.arange(1, 11, 2)])  # rows, in which precision sees no order
        torch.testing.assert_close(found["rows"], whole["rows"][order], rtol=0, atol=0)


# Precision and recall


def brute_force(samples: Tensor, references: Tensor) -> tuple[float, float]:
    """Sorted distances of each point, one by one; no matrix product."""

    def inside(points: list[np.ndarray], centres: list[np.ndarray]) -> float:
        radii = [sorted(((a - b) ** 2).sum() for b in centres)[3] for a in centres]
        hits = [any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    points, others = list(samples.double().numpy()), list(references.double().numpy())
    return inside(points, others), inside(others, points)


def test_precision_and_recall_by_hand():
    samples = torch.tensor([[0.0], [1], [2], [3], [100]])
    references = torch.tensor([[-2.0], [1], [4], [7]])
    assert squared_radii(samples).sqrt().tolist() == [3, 2, 2, 3, 99]
    assert squared_radii(references).sqrt().tolist() == [9, 6, 6, 9]
    # Sample 100 alone is outside the references' balls; its own ball reaches from 1 on, and so to reference 7.
    assert precision_recall(samples, references) == (4 / 5, 1.0)
    # Reference -3 lies on the edge of sample 0's ball, which is closed; the others lie outside of every ball.
    samples, references = samples[:4], torch.tensor([[-3.0], [-4], [-20], [-40], [-60]])
    assert precision_recall(samples, references)[1] == 1 / 5
    assert precision_recall(references, samples)[0] == 1 / 5


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_precision_and_recall_are_brute_forces_and_torch_fidelitys_in_any_blocks(block):
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, references = features(60, 6, seed=1), features(33, 6)
    found = precision_recall(samples, references, block)
    assert found == pytest.approx((0.6, 0.697), abs=1e-3)  # neither is trivial, and they are not each other
    assert found == pytest.approx(brute_force(samples, references), abs=1e-12)
    theirs = prc_features_to_metric(samples, references, prc_neighborhood=3, prc_batch_size=20, save_cpu_ram=True,
                                    verbose=False)
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_distances_of_features_far_from_the_origin_keep_their_precision():
    samples, references = features(40, 6, seed=1).double(), features(30, 6).double()
    assert precision_recall(samples + 3000, references + 3000) == precision_recall(samples, references)


def test_no_third_neighbour_is_an_error():
    with pytest.raises(InputError, match="references: 3 images.* at least 4"):
        precision_recall(torch.zeros(4, 2), torch.zeros(3, 2))

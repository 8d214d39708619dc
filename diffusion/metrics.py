"""FID, sFID, Inception score, precision and recall as ADM's evaluator defines them (Dhariwal and Nichol 2021).

A metric is a small function of what `Measurement` collects of a set of images: sums, and rows for precision and recall.
The sums are exact over any batches and processes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from common.errors import InputError
from diffusion.features import Extracted, Extractor

SPLIT = 5000  # images of one split of the Inception score
NEIGHBOUR = 3  # whose distance is a ball's radius


class Statistics(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, in double precision."""

    mean: Tensor
    covariance: Tensor


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), without an epsilon on the diagonals.

    The root's trace is that of the eigenvalues of sqrt(S1) S2 sqrt(S1), which are those of S1 S2 but come from a
    symmetric matrix: real, and 2048 features take seconds. Where a covariance is singular, ADM's own matrix root adds
    1e-6 to the diagonals or fails.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.mT @ other.covariance @ root).clamp(min=0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return float((one.mean - other.mean).square().sum() + traces - 2 * trace)


def refuse_few(images: int, features: int, whose: str) -> None:
    """InputError where the covariance of so many features is singular, and their Fréchet distance far too large."""
    if images <= features:
        raise InputError(f"{whose}: {images:,} images for {features:,} features, whose covariance is then singular; "
                         f"give at least {features + 1:,}, or take the number as it is with --allow-few-samples "
                         "(where `test` measures: --model.evaluation.allow_few_samples true)")


def precision_recall(samples: Tensor, references: Tensor, block: int = 2000) -> tuple[float, float]:
    """Shares of samples (N, D) in the references' manifold, and of references (M, D) in the samples'.

    A manifold is a union of closed balls around its images; the third neighbour lies on a ball's edge (Kynkäänniemi et
    al. 2019). The shares depend on N and M: ADM's are of 50,000 samples and 10,000 references.

    Squared distances are in double precision, in blocks of `block` x `block`. ADM's norms, products and distances are
    in fp16, and in fp32 where one overflows; that rounding, imitated on 5000 synthetic features of Inception's scale
    against 1000, moved precision by 0.0002. 50,000 against 10,000 are 13 TFLOP: 7 minutes on a core of 30 GFLOP/s.

    Raises:
        InputError: a set that has no third neighbour.
    """
    for name, rows in [("samples", samples), ("references", references)]:
        if len(rows) <= NEIGHBOUR:
            raise InputError(f"{name}: {len(rows)} images; precision and recall need at least {NEIGHBOUR + 1}")
    sample_radii, reference_radii = squared_radii(samples, block), squared_radii(references, block)
    sample_in = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_in = torch.zeros(len(references), dtype=torch.bool, device=samples.device)
    for i in range(0, len(samples), block):
        for j in range(0, len(references), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            distances = _squared_distances(samples[rows], references[columns])
            sample_in[rows] |= (distances <= reference_radii[columns]).any(1)
            reference_in[columns] |= (distances <= sample_radii[rows, None]).any(0)
    return float(sample_in.double().mean()), float(reference_in.double().mean())


def squared_radii(features: Tensor, block: int = 2000) -> Tensor:
    """Squared distance (N,) of each of (N, D) features to its third neighbour: index 3 of the sorted row that begins
    with its own distance, 0.
    """
    radii = []
    for rows in features.split(block):
        nearest = rows.new_empty(len(rows), 0, dtype=torch.double)
        for columns in features.split(block):
            nearest = torch.cat([nearest, _squared_distances(rows, columns)], dim=1)
            nearest = nearest.topk(min(NEIGHBOUR + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    rows, columns = rows.double(), columns.double()
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return torch.addmm(norms, rows, columns.mT, alpha=-2).clamp_(min=0)


class FeatureSums(Metric):
    """Statistics of features from double-precision sums of x and x x^T.

    Args:
        features: D; the state takes 8 D^2 bytes, 34 MB for 2048.
    """

    full_state_update = False

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros(features, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(features, features, dtype=torch.double), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Features (B, D)."""
        features = features.double()
        self.images += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.mT, features)

    def compute(self) -> Statistics:
        mean = self.sum / self.images
        covariance = self.outer.addr(mean, mean * -self.images).div_(self.images - 1)
        if not covariance.sum().isfinite():
            raise FloatingPointError("features are not finite, or of one image alone")
        return Statistics(mean, covariance)


class ReconstructionDistance(Metric):
    """The Fréchet distance of reconstructions from the images themselves, by an extractor's features: rFID.

    Args:
        extractor: whose features are compared.
    """

    full_state_update = False

    def __init__(self, extractor: Extractor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extractor = [extractor]  # in a list: no part of the metric, whose `to` it would follow
        self.made, self.truth = FeatureSums(extractor.features), FeatureSums(extractor.features)

    def update(self, made: Tensor, truth: Tensor) -> None:
        """Reconstructions and images, uint8 (B, C, H, W)."""
        extractor = self.extractor[0].to(made.device)
        for sums, images in [(self.made, made), (self.truth, truth)]:
            sums.update(extractor(images.expand(-1, extractor.channels, -1, -1)).pooled)

    def compute(self) -> Tensor:
        return torch.tensor(frechet_distance(self.made.compute(), self.truth.compute()))


class InceptionScore(Metric):
    """exp of the mean KL divergence of images' class probabilities from their split's mean (Salimans et al. 2016).

    Splits are runs of 5000 images in the set's order, not shuffled; the last one may be shorter and counts as much.
    An image's index tells its split, so that ranks may take the images in any order.

    Args:
        images: of the whole set.
        classes: of the network; logits are without bias where ADM's are.
    """

    full_state_update = False

    def __init__(self, images: int, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes = [min(SPLIT, images - start) for start in range(0, images, SPLIT)]
        splits = torch.zeros(len(self.sizes), dtype=torch.double)
        self.add_state("images", splits.long(), dist_reduce_fx="sum")
        self.add_state("negentropy", splits, dist_reduce_fx="sum")
        self.add_state("probability", splits[:, None].repeat(1, classes), dist_reduce_fx="sum")

    def update(self, logits: Tensor, index: Tensor) -> None:
        """Logits (B, classes) of the images at `index` (B,) of the set."""
        logits, split = logits.double(), index // SPLIT
        probability = logits.softmax(1)
        self.images.index_add_(0, split, torch.ones_like(split))
        self.negentropy.index_add_(0, split, (probability * logits.log_softmax(1)).sum(1))
        self.probability.index_add_(0, split, probability)

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation (n in the denominator) over the splits."""
        assert self.images.tolist() == self.sizes, f"splits of {self.images.tolist()} images, not {self.sizes}"
        mean = self.probability / self.images[:, None]
        scores = (self.negentropy / self.images - torch.xlogy(mean, mean).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


class FeatureRows(Metric):
    """All features (N, D) of a set, as they came: 410 MB for 50,000 images of 2048."""

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        """Features (B, D)."""
        self.rows.append(features)

    def compute(self) -> Tensor:
        return torch.cat(self.rows) if isinstance(self.rows, list) else self.rows  # a tensor once gathered


class Measurement(nn.Module):
    """Collects what the metrics need of a set of images.

    Not to be kept on a LightningModule, whose checkpoints it would enter, and whose bf16-true rounds its sums.

    Args:
        extractor: whose features are collected.
        images: of the whole set, over all processes.
        metrics: keys of `extractor.tags`.
    """

    def __init__(self, extractor: Extractor, images: int, metrics: Collection[str]) -> None:
        super().__init__()
        self.features = extractor.features
        self.parts = nn.ModuleDict()
        if "fd" in metrics:
            self.parts["fd"] = FeatureSums(extractor.features)
        if "sfd" in metrics:
            self.parts["sfd"] = FeatureSums(extractor.spatial_features)
        if "classifier_score" in metrics:
            self.parts["classifier_score"] = InceptionScore(images, extractor.classes)
        if "precision" in metrics or "recall" in metrics:
            self.parts["rows"] = FeatureRows()
        if "agreement" in metrics:
            self.parts["agreement"] = MulticlassAccuracy(extractor.classes, average="micro")

    def update(self, extracted: Extracted, index: Tensor, labels: Tensor | None = None) -> None:
        """What was extracted of the images at `index` (B,) of the set; `agreement` needs the classes (B,) that they
        were asked to be.
        """
        inputs = {"fd": (extracted.pooled,), "sfd": (extracted.spatial,), "rows": (extracted.pooled,),
                  "classifier_score": (extracted.logits, index), "agreement": (extracted.logits, labels)}
        for name, part in self.parts.items():
            part.update(*inputs[name])

    def compute(self) -> dict[str, Any]:
        """Of the images of all processes: `fd` and `sfd` are Statistics, `rows` (N, D) features."""
        rows = self.parts["rows"] if "rows" in self.parts else None
        if rows is not None and not rows.rows:  # of a process that no image was left for; the others wait for its rows
            rows.update(torch.zeros(0, self.features, device=rows.device))
        return {name: part.compute() for name, part in self.parts.items()}


def scores(samples: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The metrics that two measurements allow, by their keys in `Extractor.tags`."""
    values = {key: frechet_distance(samples[key], reference[key]) for key in ("fd", "sfd") if key in samples}
    if "classifier_score" in samples:
        values["classifier_score"], spread = samples["classifier_score"]
        if spread:  # 0 of a single split
            values["classifier_score_std"] = spread
    if "rows" in samples:
        values["precision"], values["recall"] = precision_recall(samples["rows"], reference["rows"])
    if "agreement" in samples:
        values["agreement"] = 100 * float(samples["agreement"])
    return values

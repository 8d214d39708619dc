"""How generated images are judged: options, the metrics of one set against another, and the record of how it was done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics import Metric

from common.data import ImageData
from common.errors import InputError
from diffusion.features import INCEPTION_FILE, Extractor, Inception, load_classifier, sha256
from diffusion.image_sets import ImageSet, Prepared, keys, open_images, pixels, stored_statistics
from diffusion.metrics import NEIGHBOUR, Measurement, ReconstructionDistance, Statistics, refuse_few, scores


@dataclass
class Reconstruction:
    """How `test` judges reconstructions by their features; it does not tell runs apart.

    Args:
        extractor: whose features are compared: `inception`, whose weights lie below data.root, or the run folder of a
            classifier of the suite; none compares none.
        allow_few_samples: take fewer images than features, of which the distances are far too large.
    """

    extractor: str | None = None
    allow_few_samples: bool = False

    def load(self, data: ImageData) -> Extractor | None:
        if self.extractor is None:
            return None
        extractor = load_extractor(self.extractor, data.root / INCEPTION_FILE)
        if not self.allow_few_samples:
            refuse_few(len(data.sets["test"]), extractor.features, f"the test images of {data.dataset}")
        return extractor

    def distance(self, extractor: Extractor) -> dict[str, Metric]:
        """The Fréchet distance of reconstructions from the test images, by its tag."""
        return {f"r{extractor.tags['fd']}": ReconstructionDistance(extractor)}

    def record(self, extractor: Extractor, data: ImageData) -> dict[str, Any]:
        """How it was measured, under the names of `evaluate`."""
        reference = Prepared(data, "test")
        return {
            "samples": reference.images,
            "image_size": pixels(data.image_size),
            "rounding": "uint8, rounded",
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "reference": reference.name,
            "reference_sha256": reference.digest(),
            "reference_images": reference.images,
            "reference_statistics": "of its images",
        }


@dataclass
class Evaluation:
    """How `test` judges samples; it does not tell runs apart.

    Args:
        extractor: whose features are compared: `inception`, whose weights lie below data.root, or the run folder of a
            classifier of the suite.
        reference: what samples are compared with, a folder of images or an .npz file; none takes the training images.
        allow_few_samples: take fewer images than features, of which the distances are far too large.
    """

    extractor: str = "inception"
    reference: str | None = None
    allow_few_samples: bool = False


UNJUDGED, BY_INCEPTION = Reconstruction(), Evaluation()
OF_SAMPLES = ("classifier_score", "agreement")  # metrics that need no reference


def load_extractor(name: str, inception: Path) -> Extractor:
    """`inception`, whose weights are that file, or the classifier of a run folder, which has its own."""
    return Inception(inception) if name == "inception" else load_classifier(Path(name))


def evaluate(
    samples: ImageSet,
    reference: ImageSet | Path,
    extractor: Extractor,
    metrics: Collection[str],
    batch: int = 64,
    allow_few: bool = False,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
    beat: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics by their tags, and the record of how they were measured: the same on every rank.

    What the headers of the files forbid is refused before the first image goes through the extractor.

    Args:
        reference: images, or the path of a folder or an .npz file; where that holds statistics of Inception's features,
            these stand in for those of its images.
        metrics: keys of `extractor.tags`.
        batch: images at once.
        allow_few: take fewer images than features.
        device: where the extractor is.
        rank: of `ranks` processes, which share the images.
        beat: called after every batch, a sign of life.
    """
    asked = Asked(samples.name, samples.images, samples.size, samples.labels() if "agreement" in metrics else None)
    images, stored = compared(asked, reference, extractor, metrics, allow_few)
    needed = [key for key in metrics if key not in (*stored, *OF_SAMPLES)]
    stored = {key: Statistics(*(array.to(device) for array in arrays)) for key, arrays in stored.items()}
    record = {
        "samples": samples.images,
        "image_size": pixels(samples.size),
        "rounding": "uint8, as stored",
        **{key: value for key, value in samples.record().items() if key != "samples"},
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "reference": images.name if images else str(reference),
        "reference_sha256": images.digest() if images else None if reference.is_dir() else sha256(reference),
        "reference_images": images.images if images else 0,
        "reference_statistics": "stored" if stored else "of its images",
    }
    share = batch, device, rank, ranks, beat
    of_samples = _measured("samples", samples, extractor, metrics, *share)
    of_reference = _measured("reference", images, extractor, needed, *share) if images else {}
    values = scores(of_samples, of_reference | stored)
    tags = {key + end: tag + end for key, tag in extractor.tags.items() for end in ("", "_std") if key in metrics}
    return {tags[key]: value for key, value in values.items() if key in tags}, record


class Asked(NamedTuple):
    """What there is to know of samples before they are there: labels (N,) where classes were asked for."""

    name: str
    images: int
    size: tuple[int, int]
    labels: Tensor | None


def compared(
    samples: Asked, reference: ImageSet | Path, extractor: Extractor, metrics: Collection[str], allow_few: bool
) -> tuple[ImageSet | None, dict[str, Statistics]]:
    """The images of the reference, where any are needed, and its stored statistics.

    Raises:
        InputError: what can be told of them from their headers forbids the comparison.
    """
    images, stored = reference, {}
    if isinstance(reference, Path):
        stored = _stored(reference, extractor, metrics)
        needs_images = any(key not in (*stored, *OF_SAMPLES) for key in metrics)
        images = open_images(reference, extractor.channels) if needs_images else None
    elif images.channels != extractor.channels:
        raise InputError(f"{images.name}: of {images.channels} channel(s), and the extractor {extractor.name} takes "
                         f"{extractor.channels}; name a reference of such images")
    for label in [] if samples.labels is None else samples.labels.aminmax():
        if not 0 <= label < extractor.classes:
            raise InputError(f"{samples.name}: of class {label}, counted from 0, where the extractor {extractor.name} "
                             f"knows {extractor.classes} classes")
    if images and samples.size != images.size:
        raise InputError(f"{samples.name}: images of {pixels(samples.size)} pixels, where {images.name} has "
                         f"{pixels(images.size)}; bring both to one size")
    counts = [(samples.name, samples.images, ()), *([(images.name, images.images, stored)] if images else [])]
    for name, count, known in counts:
        if {"precision", "recall"} & set(metrics) and count <= NEIGHBOUR:
            raise InputError(f"{name}: {count} images; precision and recall need at least {NEIGHBOUR + 1}")
        for key, features in [("fd", extractor.features), ("sfd", extractor.spatial_features)]:
            if key in metrics and key not in known and not allow_few:
                refuse_few(count, features, name)
    return images, stored


def as_json(metrics: dict[str, float], record: dict[str, Any]) -> str:
    return json.dumps({"metrics": metrics, "evaluation": record}, indent=2, ensure_ascii=False) + "\n"


def _stored(reference: Path, extractor: Extractor, metrics: Collection[str]) -> dict[str, Statistics]:
    """The statistics in an ADM reference, which are of Inception's features and mean nothing to another extractor."""
    if "mu" not in keys(reference) or extractor.tags["fd"] != "fid":
        return {}
    wanted = [("fd", "", extractor.features), ("sfd", "_s", extractor.spatial_features)]
    return {key: stored_statistics(reference, end, features) for key, end, features in wanted if key in metrics}


def _measured(
    title: str, images: ImageSet, extractor: Extractor, metrics: Collection[str], batch: int,
    device: torch.device | str, rank: int, ranks: int, beat: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    measurement = Measurement(extractor, images.images, metrics).to(device)
    labels = images.labels() if "agreement" in metrics else None
    batches = -(-images.images // (batch * ranks))
    console = Console(stderr=True, quiet=rank > 0)
    for place, pictures in track(images.batches(batch, rank, ranks), title, batches, console=console):
        index = torch.arange(place.start, place.stop, device=device)
        measurement.update(extractor(pictures.to(device)), index, None if labels is None else labels[place].to(device))
        beat()
    return measurement.compute()

"""How generated images are judged: options, the metrics of one set against another, and the record of how it was done.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torchmetrics import Metric

from common.data import ImageData
from common.errors import InputError
from diffusion.features import INCEPTION_FILE, Extractor, Inception, load_classifier, sha256
from diffusion.image_sets import ImageSet, keys, open_images, pixels, stored_statistics
from diffusion.metrics import Measurement, ReconstructionDistance, Statistics, refuse_few, scores


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

    def distance(self, data: ImageData) -> dict[str, Metric]:
        """The Fréchet distance of reconstructions from the test images, by its tag."""
        if self.extractor is None:
            return {}
        extractor = load_extractor(self.extractor, data.root / INCEPTION_FILE)
        if not self.allow_few_samples:
            refuse_few(len(data.sets["test"]), extractor.features, f"the test images of {data.dataset}")
        return {f"r{extractor.tags['fd']}": ReconstructionDistance(extractor)}


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
    """
    stored = _stored(reference, extractor, metrics, device) if isinstance(reference, Path) else {}
    needed = [key for key in metrics if key not in (*stored, *OF_SAMPLES)]
    images = reference
    if isinstance(reference, Path):
        images = open_images(reference, extractor.channels) if needed else None
    if "agreement" in metrics and (labels := samples.labels()).max() >= extractor.classes:
        raise InputError(f"{samples.name}: of class {labels.max()}, counted from 0, where the extractor "
                         f"{extractor.name} knows {extractor.classes} classes")
    if images and samples.size != images.size:
        raise InputError(f"{samples.name}: images of {pixels(samples.size)} pixels, where {images.name} has "
                         f"{pixels(images.size)}; bring both to one size")
    for key, features in [("fd", extractor.features), ("sfd", extractor.spatial_features)]:
        if key in metrics and not allow_few:
            refuse_few(samples.images, features, samples.name)
        if key in needed and not allow_few:
            refuse_few(images.images, features, images.name)
    record = {
        "samples": samples.images,
        "image_size": pixels(samples.size),
        "rounding": "uint8, as stored",
        **{key: value for key, value in samples.record().items() if key != "samples"},
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "reference": images.name if images else str(reference),
        "reference_sha256": images.digest() if images else sha256(reference),
        "reference_images": images.images if images else 0,
        "reference_statistics": "stored" if stored else "of its images",
    }
    share = batch, device, rank, ranks
    of_samples = _measured("samples", samples, extractor, metrics, *share)
    of_reference = _measured("reference", images, extractor, needed, *share) if images else {}
    values = scores(of_samples, of_reference | stored)
    tags = {key + end: tag + end for key, tag in extractor.tags.items() for end in ("", "_std") if key in metrics}
    return {tags[key]: value for key, value in values.items() if key in tags}, record


def as_json(metrics: dict[str, float], record: dict[str, Any]) -> str:
    return json.dumps({"metrics": metrics, "evaluation": record}, indent=2, ensure_ascii=False) + "\n"


def _stored(
    reference: Path, extractor: Extractor, metrics: Collection[str], device: torch.device | str
) -> dict[str, Any]:
    """The statistics in an ADM reference, which are of Inception's features and mean nothing to another extractor."""
    if "mu" not in keys(reference) or extractor.tags["fd"] != "fid":
        return {}
    wanted = [("fd", "", extractor.features), ("sfd", "_s", extractor.spatial_features)]
    found = {key: stored_statistics(reference, end, features) for key, end, features in wanted if key in metrics}
    return {key: Statistics(*(array.to(device) for array in arrays)) for key, arrays in found.items()}


def _measured(
    title: str, images: ImageSet, extractor: Extractor, metrics: Collection[str], batch: int,
    device: torch.device | str, rank: int, ranks: int,
) -> dict[str, Any]:  # fmt: skip
    measurement = Measurement(extractor, images.images, metrics).to(device)
    labels = images.labels() if "agreement" in metrics else None
    batches = -(-images.images // (batch * ranks))
    console = Console(stderr=True, quiet=rank > 0)
    for place, pictures in track(images.batches(batch, rank, ranks), title, batches, console=console):
        index = torch.arange(place.start, place.stop, device=device)
        measurement.update(extractor(pictures.to(device)), index, None if labels is None else labels[place].to(device))
    return measurement.compute()

"""python -m diffusion.evaluate SAMPLES REFERENCE: FID, sFID, Inception score, precision and recall of images.

Samples and reference are folders of images, or .npz files with arr_0, uint8 (N, H, W, 3), as ADM's evaluator reads
them. Where the reference also holds mu, sigma, mu_s and sigma_s, FID and sFID take these, and its images serve
precision and recall alone: published numbers are of 50,000 samples against such statistics and 10,000 images.

FID is of Inception's features; with --extractor RUN_FOLDER, a classifier trained by this suite, the distance is called
fd_RUN, and compares with distances of the same classifier alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from common.command import run_command
from common.errors import InputError
from common.training.run import write_atomically
from diffusion.features import INCEPTION_FILE, Extractor, Inception, load_classifier
from diffusion.image_sets import ImageSet, digest, keys, open_images, pixels, stored_statistics
from diffusion.metrics import Measurement, Statistics, refuse_few, scores


def load_extractor(name: str, weights: Path | None) -> Extractor:
    """`inception`, or the classifier of a run folder, which has its own weights."""
    if name == "inception":
        return Inception(weights or Path("data") / INCEPTION_FILE)
    if weights:
        raise InputError(f"--weights: {weights} goes with --extractor inception; the run folder {name} holds its own")
    return load_classifier(Path(name))


def chosen(metrics: str | None, extractor: Extractor) -> list[str]:
    """The keys of `extractor.tags` that --metrics names, all of them by default."""
    if metrics is None:
        return list(extractor.tags)
    known = {name: key for key, tag in extractor.tags.items() for name in (key, tag)}
    for name in metrics.split(","):
        if name not in known:
            own = " (fid is of Inception's features alone)" if name == "fid" else ""
            raise InputError(f"--metrics: {name} is not measured with the extractor {extractor.name}{own}; choose "
                             f"among {','.join(extractor.tags.values())}")
    return [known[name] for name in dict.fromkeys(metrics.split(","))]


def evaluate(
    samples_path: Path,
    reference_path: Path,
    extractor: Extractor,
    metrics: Collection[str],
    batch: int = 64,
    allow_few: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics by their tags, and the record of how they were measured.

    What the headers of the files forbid is refused before the first image goes through the extractor.

    Args:
        metrics: keys of `extractor.tags`.
        batch: images at once.
        allow_few: take fewer images than features.
        device: where the extractor is.
    """
    samples = open_images(samples_path, extractor.channels)
    stored = _stored(reference_path, extractor, metrics, device)
    needed = [key for key in metrics if key not in stored and key != "classifier_score"]
    reference = open_images(reference_path, extractor.channels) if needed else None
    if reference and samples.size != reference.size:
        raise InputError(f"{samples_path}: images of {pixels(samples.size)} pixels, where {reference_path} has "
                         f"{pixels(reference.size)}; bring both to one size")
    for key, features in [("fd", extractor.features), ("sfd", extractor.spatial_features)]:
        if key in metrics and not allow_few:
            refuse_few(samples.images, features, str(samples_path))
        if key in needed and not allow_few:
            refuse_few(reference.images, features, str(reference_path))
    record = {
        "samples": samples.images,
        "image_size": pixels(samples.size),
        "rounding": "uint8, as stored",
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "reference": str(reference_path),
        "reference_sha256": digest(reference_path),
        "reference_images": reference.images if reference else 0,
        "reference_statistics": "stored" if stored else "of its images",
    }
    of_samples = _measured(samples, extractor, metrics, batch, device, "samples")
    of_reference = _measured(reference, extractor, needed, batch, device, "reference") if reference else {}
    values = scores(of_samples, of_reference | stored)
    tags = {key + end: tag + end for key, tag in extractor.tags.items() for end in ("", "_std") if key in metrics}
    return {tags[key]: value for key, value in values.items() if key in tags}, record


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
    images: ImageSet, extractor: Extractor, metrics: Collection[str], batch: int, device: torch.device | str, title: str
) -> dict[str, Any]:
    measurement = Measurement(extractor, images.images, metrics).to(device)
    start = 0
    for pictures in track(images.batches(batch), title, -(-images.images // batch), console=Console(stderr=True)):
        index = torch.arange(start, start + len(pictures), device=device)
        measurement.update(extractor(pictures.to(device)), index)
        start += len(pictures)
    return measurement.compute()


def print_table(values: dict[str, float], record: dict[str, Any]) -> None:
    """The metrics, and what they are of."""
    table = Table("metric", "value", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for tag, value in values.items():
        if not tag.endswith("_std"):
            spread = f" ± {values[tag + '_std']:.2f}" if values.get(tag + "_std") else ""  # 0: of a single split
            table.add_row(Text(tag), f"{value:.4f}{spread}")
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)
    statistics = "stored statistics and " if record["reference_statistics"] == "stored" else ""
    note = (f"{record['samples']:,} samples of {record['image_size']} pixels against {statistics}"
            f"{record['reference_images']:,} images of {record['reference']}; features: {record['extractor']}")
    console.print(Text(note, "dim"), soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m diffusion.evaluate", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="a folder of images, or an .npz file")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="likewise")
    parser.add_argument("--extractor", default="inception", metavar="NAME",
                        help="inception, or the run folder of a classifier; default: inception")
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help=f"Inception's, as torch-fidelity publishes them; default: data/{INCEPTION_FILE}")
    parser.add_argument("--metrics", metavar="TAG,...", help="default: fid,sfid,inception_score,precision,recall, or "
                        "fd,classifier_score,precision,recall of a classifier")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once; default: 64")
    parser.add_argument("--allow-few-samples", action="store_true",
                        help="take fewer images than features, of which the distances are far too large")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the metrics, and the record of how they were taken")
    return parser


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.batch_size < 1:
        raise InputError(f"--batch-size: {options.batch_size} is not a positive number of images")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor(options.extractor, options.weights).to(device)
    metrics = chosen(options.metrics, extractor)
    values, record = evaluate(options.samples, options.reference, extractor, metrics, options.batch_size,
                              options.allow_few_samples, device)
    print_table(values, record)
    if options.json:
        content = {"metrics": {f"test/{tag}": value for tag, value in values.items()}, "evaluation": record}
        write_atomically(options.json, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    run_command(main)

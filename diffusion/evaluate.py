"""python -m diffusion.evaluate SAMPLES REFERENCE: FID, sFID, Inception score, precision and recall of images.

Samples and reference are folders of images, or .npz files with arr_0, uint8 (N, H, W, 3), as ADM's evaluator reads
them. Where the reference also holds mu, sigma, mu_s and sigma_s, FID and sFID take these, and its images serve
precision and recall alone: published numbers are of 50,000 samples against such statistics and 10,000 images.

FID is of Inception's features; with --extractor RUN_FOLDER, a classifier trained by this suite, the distance is called
fd_RUN, and compares with distances of the same classifier alone. agreement_RUN is the share of samples, in percent,
that the classifier takes for the class they were asked to be.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.advice import quieten
from common.command import Parser, run_command
from common.errors import InputError
from common.files import write_atomically
from diffusion.evaluation import as_json, evaluate, load_extractor
from diffusion.features import INCEPTION_FILE, Extractor
from diffusion.image_sets import ImageSet, open_images


def chosen(metrics: str | None, extractor: Extractor, samples: ImageSet) -> list[str]:
    """The keys of `extractor.tags` that --metrics names; by default all that the samples allow."""
    classes_known = "agreement" in extractor.tags and samples.labels() is not None
    if metrics is None:
        return [key for key in extractor.tags if key != "agreement" or classes_known]
    known = {name: key for key, tag in extractor.tags.items() for name in (key, tag)}
    for name in metrics.split(","):
        if name not in known:
            own = " (fid is of Inception's features alone)" if name == "fid" else ""
            raise InputError(f"--metrics: {name} is not measured with the extractor {extractor.name}{own}; choose "
                             f"among {','.join(extractor.tags.values())}")
        if known[name] == "agreement" and not classes_known:
            raise InputError(f"--metrics: {name} needs the classes that {samples.name} was asked for; a folder "
                             "that `predict` wrote tells them, and so does arr_1 of an .npz file")
    return [known[name] for name in dict.fromkeys(metrics.split(","))]


def print_table(values: dict[str, float], record: dict[str, Any]) -> None:
    """The metrics, and what they are of."""
    table = Table("metric", "value", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for tag, value in values.items():
        if not tag.endswith("_std"):
            spread = f" ± {values[tag + '_std']:.2f}" if tag + "_std" in values else ""
            table.add_row(Text(tag), f"{value:.4f}{spread}")
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)
    statistics = "stored statistics and " if record["reference_statistics"] == "stored" else ""
    note = (f"{record['samples']:,} samples of {record['image_size']} pixels against {statistics}"
            f"{record['reference_images']:,} images of {record['reference']}; features: {record['extractor']}")
    said = ("samples", "image_size", "reference", "reference_images", "reference_statistics", "extractor")
    rest = (f"{key} {value}" for key, value in record.items() if key not in said and value is not None)
    console.print(Text(f"{note}\n{'; '.join(rest)}", "dim"), soft_wrap=True)


def _parser() -> Parser:
    parser = Parser("python -m diffusion.evaluate", __doc__)
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="a folder of images, or an .npz file")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="likewise")
    parser.add_argument("--extractor", default="inception", metavar="NAME",
                        help="inception, or the run folder of a classifier; default: inception")
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help=f"Inception's, as torch-fidelity publishes them; default: data/{INCEPTION_FILE}")
    parser.add_argument("--metrics", metavar="TAG,...", help="default: fid,sfid,inception_score,precision,recall, or "
                        "fd,classifier_score,precision,recall of a classifier, and agreement where classes are known")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once; default: 64")
    parser.add_argument("--allow-few-samples", action="store_true",
                        help="take fewer images than features, of which the distances are far too large")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the metrics, and the record of how they were taken")
    return parser


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.batch_size < 1:
        raise InputError(f"--batch-size: {options.batch_size} is not a positive number of images")
    if options.weights and options.extractor != "inception":
        raise InputError(f"--weights: {options.weights} goes with --extractor inception; the run folder "
                         f"{options.extractor} holds its own")
    quieten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor(options.extractor, options.weights or Path("data") / INCEPTION_FILE).to(device)
    samples = open_images(options.samples, extractor.channels)
    metrics = chosen(options.metrics, extractor, samples)
    values, record = evaluate(samples, options.reference, extractor, metrics, options.batch_size,
                              options.allow_few_samples, device)
    print_table(values, record)
    if options.json:
        write_atomically(options.json, as_json({f"test/{tag}": value for tag, value in values.items()}, record))
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    run_command(main)

"""What judging costs: FID's statistics beside torch-fidelity's, and the memory of precision, recall and attention maps.

Memory is what a process of its own holds at its peak, beyond what it held before the work began.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.advice import quieten
from common.attention.__main__ import examine
from common.benchmark.growth import clocked
from common.benchmark.interleaving import interleaved, ratios
from common.data import ImageData, Shapes
from common.model import VisionTransformer
from common.training.module import Experiment
from common.training.optim import Recipe
from common.training.trained import Trained
from common.training.trainer import Trainer
from diffusion.features import Extractor, Inception
from diffusion.metrics import FeatureRows, Measurement, Statistics, precision_recall

SIDES = (299, 32)  # pixels: as Inception takes them, and as it first has to enlarge them
BATCH = 64  # images at once, by the default of torch-fidelity and of diffusion.evaluate
FEATURES = 2048
ATTENDING, ATTENDED = "base", 32  # most heads among the sizes of 12 layers; pixels of a side, 1,025 tokens
LIMIT = 4e9  # bytes
FID_COLUMNS = ("images", "pixels", "torch-fidelity images/s", "suite images/s", "times as fast (quartiles)")
MEMORY_COLUMNS = ("analysis", "of", "seconds", "peak GB", f"share of {LIMIT / 1e9:.0f} GB")


# Time: features by Inception, their mean and covariance


class Pictures(Dataset):
    """Images (N, 3, H, W) as torch-fidelity takes a data set: an item is an image."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        return self.images[place]


def random_inception(file: Path) -> None:
    """Writes weights under which features neither vanish nor explode, as torch-fidelity publishes the trained ones."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # slow to import

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any) -> None:
            """It keeps its initial weights."""

    torch.save({}, file)
    net = Untrained("untrained", ["2048"], str(file))
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), file)


def extractors(file: Path) -> tuple[nn.Module, Inception]:
    """torch-fidelity's extractor as it is made for FID alone, and the suite's, with the weights in `file`."""
    from torch_fidelity.utils import create_feature_extractor

    with warnings.catch_warnings(action="ignore"):  # these are not the published weights
        return create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, verbose=False,
                                        feature_extractor_weights_path=str(file)), Inception(file)  # fmt: skip


def fidelity_statistics(extractor: nn.Module, images: Tensor) -> dict[str, Any]:
    """`mu` and `sigma` by torch-fidelity; without processes that load, for which images in memory would only wait."""
    from torch_fidelity.metric_fid import fid_input_id_to_statistics

    return fid_input_id_to_statistics(1, extractor, "2048", input1=Pictures(images), batch_size=BATCH, cuda=False,
                                      save_cpu_ram=True, cache=False, verbose=False)  # fmt: skip


def suite_statistics(extractor: Extractor, images: Tensor) -> Statistics:
    measurement = Measurement(extractor, len(images), ["fd"])
    for place, batch in zip(torch.arange(len(images)).split(BATCH), images.split(BATCH), strict=True):
        measurement.update(extractor(batch), place)
    return measurement.compute()["fd"]


def measure_statistics(side: int, images: int, rounds: int) -> tuple[str, ...]:
    """A row of the table; a round is all images by both.

    Both spend nearly all their time in the same network, and a round takes a minute: on one thread it is the
    processor's time that is compared, which other work on the machine disturbs least.
    """
    pictures = torch.randint(256, (images, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        random_inception(file)
        theirs, ours = extractors(file)
    sides = {"torch-fidelity": partial(fidelity_statistics, theirs), "suite": partial(suite_statistics, ours)}
    for compute in sides.values():
        compute(pictures[:2])  # imports and first calls are over before the clock runs
    seconds = interleaved({name: clocked(partial(compute, pictures)) for name, compute in sides.items()}, rounds)
    speeds = (f"{images / statistics.median(values):.2f}" for values in seconds.values())
    return str(images), f"{side}x{side}", *speeds, f"{ratios(seconds['suite'], seconds['torch-fidelity']):.3f}"


# Memory


def alone(work: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """What `work` returns in a fresh process, of as many threads as this one, and the bytes of its peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(observed, torch.get_num_threads(), work, *arguments).result()


def observed(threads: int, work: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """What `work` returns, and the bytes by which this process at its peak exceeded what it held before.

    By /proc: the peak of getrusage cannot be set back, and in a new process begins with that of its parent.
    """
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = _resident("VmRSS")
    value = work(*arguments)
    return value, _resident("VmHWM") - before


def _resident(which: str) -> int:
    """Resident bytes of this process: VmRSS as of now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = (line.split()[1] for line in lines if line.startswith(f"{which}:"))
    return 1024 * int(kilobytes)


def gather(side: int, images: int) -> float:
    """Seconds of FID's statistics of random images, by Inception with random weights, whose making holds less."""
    pictures = torch.randint(256, (images, 3, side, side), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        random_inception(file)
        with warnings.catch_warnings(action="ignore"):  # these are not the published weights
            net = Inception(file)
    start = time.perf_counter()
    suite_statistics(net, pictures)
    return time.perf_counter() - start


def judge(samples: int, references: int, features: int) -> float:
    """Seconds of precision and recall; the features are collected before, in batches as an extractor gives them."""
    torch.manual_seed(0)
    rows = [_collected(count, features) for count in (samples, references)]
    start = time.perf_counter()
    precision_recall(*rows)
    return time.perf_counter() - start


def _collected(images: int, features: int) -> Tensor:
    rows = FeatureRows()
    for place in torch.arange(images).split(BATCH):
        rows.update(torch.randn(len(place), features))
    return rows.compute()


def attend(size: str, side: int, images: int) -> float:
    """Seconds that common.attention takes over a model with random weights whose tokens are the pixels of shapes."""
    quieten()
    data = ImageData(Shapes(side), side, batch_size=BATCH)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer.seed, data.trainer.datamodule = 0, data
    net = VisionTransformer(side, 1, classes=data.classes, size=size).eval()
    run = Trained(Experiment(Recipe(lr=0.0)), net, data, Path())
    start = time.perf_counter()
    examine(run, None, images, [(0, layer) for layer in range(3)])  # the maps that are shown by default
    return time.perf_counter() - start


def measure_gathering(side: int, images: int) -> tuple[str, ...]:
    """A row of the table, of a single run."""
    return _row("FID's statistics", f"{images:,} images of {side}x{side}", gather, side, images)


def measure_precision_recall(samples: int, references: int, features: int) -> tuple[str, ...]:
    """A row of the table, of a single run."""
    what = f"{samples:,} x {references:,} features of {features:,}"
    return _row("precision and recall", what, judge, samples, references, features)


def measure_attention(size: str, side: int, images: int) -> tuple[str, ...]:
    """A row of the table, of a single run."""
    with torch.device("meta"):
        net = VisionTransformer(side, 1, size=size)
    what = (f"{size}/1, {net.num_prefix_tokens + net.tokens:,} tokens, {net.depth} layers, {net.heads} heads, "
            f"{images} images")
    return _row("attention", what, attend, size, side, images)


def _row(analysis: str, what: str, work: Callable[..., float], *arguments: Any) -> tuple[str, ...]:
    print(f"{analysis} of {what}", file=sys.stderr)
    seconds, peak = alone(work, *arguments)
    return analysis, what, f"{seconds:,.1f}", f"{peak / 1e9:.2f}", f"{peak / LIMIT:.0%}"

"""Training images of 28x28 from photographs on disk: decoded by PIL, by the suite, and cropped from its store, also by
the GPU that holds it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.benchmark.device import CPU
from common.benchmark.interleaving import interleaved, ratios, timed
from common.data.augment import Augment
from common.data.folders import ImageFolder, decode
from common.data.loader import Draw
from common.data.preparation import TrainingPreparation
from common.data.sets import AT_ONCE
from common.data.store import CROP, differences, make
from common.data.stored import Store

COLUMNS = ("pipeline", "images/s per core", "times as fast (quartiles)", "mean difference to the files, of 255")
SIZE, BATCH = (CROP, CROP), 256
RECIPE = Augment(crop_scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
RANDOMISED = replace(RECIPE, rand_augment="rand-m9-mstd0.5-inc1")  # of supervised/configs/imagenet28.yaml


def measure(
    folder: str | None, side: int, images: int, rounds: int, device: torch.device = CPU
) -> list[tuple[str, ...]]:
    """The rows of the table, for so many draws of the photographs of `folder`, or of those that scikit-image ships; one
    more where the device is a GPU.
    """
    with tempfile.TemporaryDirectory() as root:
        source = ImageFolder(folder or photographs(Path(root) / "photographs"))
        files, labels = source.read(Path(root), "train")
        store = Store(make(source, Path(root), side, workers=1), files, labels)
        chosen = torch.arange(images) % len(files)
        sides = {"PIL, image by image": _pil(files, chosen), "the suite's, image by image": _files(files, chosen),
                 f"the suite's, from a store of {side}x{side}": _stored(store, chosen),
                 "the suite's, from that store, and RandAugment": _randomised(store, chosen)}
        timers = {name: timed(run) for name, run in sides.items()}
        if device.type == "cuda":
            timers["the suite's, by a GPU that holds that store"] = timed(_held(store, chosen, device), device)
        times = interleaved(timers, rounds)
        off = differences(store, files, source.channels)["mean"]
    first, *others = times
    rows = [(first, f"{images / statistics.median(times[first]):,.0f}", "", "")]
    # A GPU's, who multiplies in TF32, is not measured.
    for name, difference in zip(others, ("0.00", f"{off:.2f}", f"{off:.2f}", ""), strict=False):
        faster = ratios(times[name], times[first])
        rows.append((name, f"{images / statistics.median(times[name]):,.0f}", f"{faster:.2f}", difference))
    return rows


def photographs(folder: Path) -> str:
    """Writes those that scikit-image ships as JPEG files, a class each; the folder."""
    from PIL import Image
    from skimage import data

    for name in ("astronaut", "chelsea", "coffee"):
        (folder / "train" / name).mkdir(parents=True)
        Image.fromarray(getattr(data, name)()).save(folder / "train" / name / "0.jpg", quality=95)
    return str(folder)


def _pil(files: list[str], chosen: torch.Tensor) -> Callable[[], None]:
    from PIL import Image
    from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    recipe = Compose([RandomResizedCrop(SIZE, RECIPE.crop_scale, interpolation=InterpolationMode.BICUBIC),
                      RandomHorizontalFlip(RECIPE.flip), ToTensor()])

    def run() -> None:
        for some in chosen.split(BATCH):
            pictures = [Image.open(files[i]).convert("RGB") for i in some.tolist()]
            torch.stack([recipe(picture) for picture in pictures])

    return run


def _files(files: list[str], chosen: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for some in chosen.split(AT_ONCE):
            images = [decode(files[i], 3) for i in some.tolist()]
            RECIPE.place_each(images, RECIPE.draws(0, 0, some), SIZE).float().div_(255)

    return run


def _stored(store: Store, chosen: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Each call gives the crops of the last batch."""

    def run() -> torch.Tensor:
        for some in chosen.split(BATCH):
            images, shapes = store.take(some.tolist())
            crops = RECIPE.place_squares(images, shapes, RECIPE.draws(0, 0, some), SIZE)
        return crops

    return run


def _held(store: Store, chosen: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
    """The same by a device that holds all images."""
    images, shapes = store.images(device), torch.from_numpy(store.shapes).to(device)
    chosen = chosen.to(device)

    def run() -> torch.Tensor:
        for some in chosen.split(BATCH):
            drawn = RECIPE.draws(0, 0, some)
            crops = RECIPE.place_squares(images.index_select(0, some), shapes.index_select(0, some), drawn, SIZE)
        return crops

    return run


def _randomised(store: Store, chosen: torch.Tensor) -> Callable[[], None]:
    prepare = TrainingPreparation(RANDOMISED, SIZE, 0, (0.5,))

    def run() -> None:
        for some in chosen.split(BATCH):
            prepare.squares(*store.take(some.tolist()), [Draw(0, i, place) for place, i in enumerate(some.tolist())])

    return run

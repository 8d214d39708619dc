"""The LightningDataModule of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.augment import PLAIN, Augment
from common.data.colour import normalised
from common.data.crop import Interpolation, fit
from common.data.folders import SUFFIXES, decode, is_image
from common.data.inventory import describe
from common.data.loader import GlobalBatchData
from common.data.preparation import EvaluationPreparation, TrainingPreparation
from common.data.sets import FileSet, HeldSet, ResidentSet, StoredSet
from common.data.sources import Source
from common.data.stored import Store, location
from common.device import constant, device_memory
from common.errors import InputError


class ImageData(GlobalBatchData):
    """Images of one size (C, H, W) with labels, augmented in training, normalised always.

    A batch is a dict: `image` (B, C, H, W), uint8 as loaded and float after the transfer to the device; int64 (B,)
    `label`, `index` (in the data set), `place` (in the global batch) and `epoch`. Prediction has no labels, but `file`,
    the names of the images. Small sources are held in memory and cropped on the device; files are decoded and cropped
    by the loader's processes. Colour and normalisation are the device's work for both.

    Args:
        source: where the images come from.
        image_size: of the model's input, one number or (H, W).
        root: the folder of all data sets.
        augment: the training recipe.
        mean: per channel, or one for all, of images in [0, 1]; the default maps them to [-1, 1].
        std: likewise.
        eval_crop: share of the side that the central crop of an evaluation keeps: the image is first resized so that
            its short side is int(image_size / eval_crop).
        eval_interpolation: of that resizing, as in Augment; adm needs an eval_crop of 1 and squares.
        store: side of the squares of a store (python -m common.data.store), from which training images are cropped in
            place of the files: much faster, and a little blurred. Validation and test read the files.
        on_device: keep the training images of a small source or of a store on the device, so that nothing but indices
            goes there; left out, on a GPU where they take no more than a quarter of its memory.
        max_unreadable: training images that may be unreadable and are replaced; more of them stop the run.
        images: a folder of images to predict, its subfolders included.
        **kwargs: see GlobalBatchData.
    """

    def __init__(
        self,
        source: Source,
        image_size: int | tuple[int, int],
        batch_size: int,
        root: str = "data",
        augment: Augment = PLAIN,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        eval_crop: float = 1.0,
        eval_interpolation: Interpolation = "bicubic",
        store: int | None = None,
        on_device: bool | None = None,
        max_unreadable: int = 0,
        images: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self.source, self.root, self.augment = source, Path(root), augment
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.mean, self.std = self._per_channel("mean", mean), self._per_channel("std", std)
        self.eval_crop, self.eval_interpolation = eval_crop, eval_interpolation
        self.store, self.on_device = store, on_device
        self.max_unreadable, self.images = max_unreadable, images
        self.held: dict[str, Tensor] = {}  # the training images, where the device has them all
        if min(self.image_size) < 1:
            raise InputError(f"data.image_size: {image_size} is not a positive number of pixels")
        if min(self.std) <= 0:
            raise InputError(f"data.std: {list(std)} must be positive")
        if not 0 < eval_crop <= 1:
            raise InputError(f"data.eval_crop: {eval_crop} is not a share in (0, 1]")
        if eval_interpolation == "adm" and eval_crop != 1:
            raise InputError(f"data.eval_interpolation: adm keeps the whole short side, but data.eval_crop is "
                             f"{eval_crop}; set that to 1, or interpolate by bicubic")
        if self.image_size[0] != self.image_size[1]:
            self._refuse_adm("augment.interpolation", augment.interpolation)
            self._refuse_adm("eval_interpolation", eval_interpolation)
        if store is not None:
            self._refuse_unstorable()
        if max_unreadable < 0:
            raise InputError(f"data.max_unreadable: {max_unreadable} is negative; 0 allows none")
        if augment.needs_colour and self.channels != 3:
            raise InputError(f"data.augment: jitter, grayscale and rand_augment need RGB images; {source.name} has "
                             f"{self.channels} channel(s)")

    def _per_channel(self, name: str, values: Sequence[float]) -> tuple[float, ...]:
        if len(values) not in (1, self.channels):
            raise InputError(f"data.{name}: {len(values)} values for {self.channels} channel(s) of {self.source.name}")
        return tuple(values) * (self.channels // len(values))

    def _refuse_unstorable(self) -> None:
        if self.store < 1:
            raise InputError(f"data.store: {self.store} is not a side in pixels, such as 96")
        if self.augment.interpolation in ("adm", "nearest"):
            raise InputError(f"data.store: {self.augment.interpolation} needs the files' own pixels; leave the store "
                             "out, or interpolate by bicubic")
        if self.source.resident:
            raise InputError(f"data.store: {self.source.name} is held in memory as it is; leave the store out")

    def _refuse_adm(self, name: str, interpolation: Interpolation) -> None:
        if interpolation == "adm":
            raise InputError(f"data.{name}: adm makes squares, but data.image_size is {list(self.image_size)}; set "
                             f"that to one number, or interpolate by bicubic")

    @cached_property
    def class_names(self) -> list[str]:
        return self.source.class_names(self.root)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def dataset(self) -> str:
        """What results are reported on."""
        return self.source.title(self.root)

    def describe(self) -> list[str]:
        """Printable lines: classes, and images of each split."""
        return describe(self.source, self.root)

    def without_files(self) -> int:
        if self.source.published is None:
            return len(self.source.labels(self.root, "train"))
        images, classes = self.source.published
        self.class_names = [str(number) for number in range(classes)]
        return images

    def random_batch(self, images: int) -> dict[str, Tensor]:
        return {**super().random_batch(images), "label": torch.arange(images) % self.classes}

    def load(self, split: str) -> Dataset:
        if split == "predict":
            return FileSet(self._files_to_predict(), None, self.channels, self._preparation(split))
        if split == "train" and self.on_device and not self._on_device("train"):
            raise InputError("data.on_device: true is for crops that a device can take of what is in memory or in a "
                             "store; files, rand_augment and segments are the work of the loader's processes")
        pictures = self.source.read(self.root, split)
        prepare = self._preparation(split)
        if self.source.resident:
            images = _in_memory(pictures.images, self.channels)
            if split == "train" and self._holds(images.nbytes):
                return self._held(pictures.labels, image=images)
            return ResidentSet(images, pictures.labels, prepare)
        if self.store is not None and split == "train":
            store = Store(location(self.source, self.root, self.store), *pictures)
            if self._holds(store.nbytes):
                device = self.trainer.strategy.root_device
                return self._held(store.labels, image=store.images(device), shape=torch.from_numpy(store.shapes))
            return StoredSet(store, prepare)
        return FileSet(*pictures, self.channels, prepare, exact=split != "train", max_unreadable=self.max_unreadable)

    def _holds(self, size: int) -> bool:
        """Whether the device is to keep training images of so many bytes."""
        if self.on_device is not None or not self._on_device("train"):
            return bool(self.on_device)
        device = self.trainer.strategy.root_device
        return device.type == "cuda" and 4 * size <= device_memory(device)

    @property
    def held_bytes(self) -> int:
        return sum(values.nbytes for values in self.held.values())

    def _held(self, labels: Tensor, **images: Tensor) -> HeldSet:
        device = self.trainer.strategy.root_device
        self.held = {name: values.to(device) for name, values in images.items()}
        return HeldSet(labels)

    def _files_to_predict(self) -> list[str]:
        if self.images is None or not Path(self.images).is_dir():
            raise InputError(f"data.images: {self.images} is not a folder; name one with the images to predict")
        files = sorted(str(path) for path in Path(self.images).rglob("*") if is_image(path) and path.is_file())
        if not files:
            raise InputError(f"data.images: {self.images} holds no images ({', '.join(SUFFIXES)})")
        return files

    def _preparation(self, split: str) -> TrainingPreparation | EvaluationPreparation | None:
        """What a split's images need before they are a batch; None leaves it to the device."""
        if self._on_device(split):
            return None
        if split == "train":
            return TrainingPreparation(self.augment, self.image_size, self.trainer.seed, self.mean)
        return EvaluationPreparation(self.image_size, self.eval_crop, self.eval_interpolation)

    def _on_device(self, split: str) -> bool:
        """Whether a split's images are cropped in batches on the device: those in memory or in a store, but for what
        needs PIL.
        """
        if split == "train":
            return (self.source.resident or self.store is not None) and not self.augment.rand_augment
        return self.source.resident and split != "predict"

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        trainer = self.trainer
        if "image" not in batch:
            batch = {**batch, **{name: held.index_select(0, batch["index"]) for name, held in self.held.items()}}
        images = batch["image"]
        mean, std = constant(self.mean, images), constant(self.std, images)
        if trainer.training:
            draws = self.augment.draws(trainer.seed, batch["epoch"], batch["index"])
            size = self.image_size if self._on_device("train") else None
            images = self.augment.batch(images, draws, size, mean, std, batch.pop("shape", None))
        else:
            images = images.float() / 255
            if self._on_device("predict" if trainer.predicting else "val"):
                images = fit(images, self.image_size, self.eval_crop, self.eval_interpolation).clamp(0, 1)
            images = normalised(images, mean, std)
        return {**batch, "image": images}


def _in_memory(images: Tensor | list[str], channels: int) -> Tensor:
    if isinstance(images, Tensor):
        return images
    decoded = []
    for file in images:
        decoded.append(decode(file, channels))
        if decoded[-1].shape != decoded[0].shape:
            sizes = [tuple(image.shape[1:]) for image in (decoded[-1], decoded[0])]
            raise InputError(f"{file}: {sizes[0]} pixels, where the images before it have {sizes[1]}")
    return torch.stack(decoded)

"""Images with depth maps: sources, splits, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.data.loader import Draw, GlobalBatchData
from common.device import constant
from common.errors import InputError
from common.randomness import uniform
from supervised.depth_augment import DRAWS, augment, resize_depth, resize_image

# ImageNet's statistics, as DINOv2 normalises.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png")
Crop = tuple[slice, slice]  # rows, columns


class Frames(Protocol):
    """A split of a source: pairs of an image (3, H, W) uint8 and its depth (1, H, W) in metres, 0 where unknown."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


class DepthSource:
    """Where images with depth come from; swapped by `class_path`. All depth maps of a source are of one size."""

    name: str
    training_crop: Crop | None = None  # of the full image, before the augmentation
    evaluation_crop: Crop | None = None  # of the full depth map: the pixels that are scored
    published: int | None = None  # training images, for what a run costs without the files

    def frames(self, split: str, root: Path) -> Frames:
        """The split train, val or test, from files below `root`."""
        raise NotImplementedError

    def describe(self, root: Path) -> list[str]:
        """Printable lines: what each split is and how many images it has."""
        raise NotImplementedError


class DepthSet(Dataset):
    """Batches of a split: `image` (B, 3, h, w) in [0, 1], `depth` (B, 1, H, W) in metres.

    In training both are augmented and of the model's size; in evaluation the whole image is resized to that size and
    the depth map stays as it is.

    Args:
        crop: what training sees of an image.
        seed: of the augmentation; None is evaluation.
    """

    def __init__(
        self, frames: Frames, image_size: tuple[int, int], crop: Crop | None = None, seed: int | None = None
    ) -> None:
        self.frames, self.image_size, self.crop, self.seed = frames, image_size, crop, seed

    def __len__(self) -> int:
        return len(self.frames)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        pairs = [self._pair(draw) for draw in draws]
        batch = {name: torch.tensor([getattr(draw, name) for draw in draws]) for name in Draw._fields}
        return {"image": torch.stack([pair[0] for pair in pairs]), "depth": torch.stack([pair[1] for pair in pairs]),
                **batch}

    def _pair(self, draw: Draw) -> tuple[Tensor, Tensor]:
        image, depth = self.frames[draw.index]
        image = image.float() / 255
        if self.seed is not None:
            if self.crop is not None:
                image, depth = image[(..., *self.crop)], depth[(..., *self.crop)]
            image, depth = augment(image, depth, uniform("depth", self.seed, draw.epoch, draw.index, n=DRAWS))
            depth = resize_depth(depth, self.image_size)
        return resize_image(image, self.image_size), depth


class ImageSet(Dataset):
    """Images of a folder without depth, each resized to the model's size; `file` and `size` (H, W) say what it was."""

    def __init__(self, folder: Path, image_size: tuple[int, int]) -> None:
        self.folder, self.image_size = folder, image_size
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise InputError(f"data.images: {folder} holds no images ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        files = [self.files[draw.index] for draw in draws]
        images = [read_image(path).float() / 255 for path in files]
        return {
            "image": torch.stack([resize_image(image, self.image_size) for image in images]),
            "size": torch.tensor([image.shape[1:] for image in images]),
            "file": [path.relative_to(self.folder).as_posix() for path in files],
        }


def read_image(path: Path, mode: str | None = "RGB") -> Tensor:
    """An image (C, H, W) in one of Pillow's modes; None leaves the file's, which keeps the 16 bits of a depth map."""
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert(mode) if mode else file)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say that a file is damaged
        raise InputError(f"{path}: not readable as an image ({str(error).splitlines()[0]})") from error
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


class DepthData(GlobalBatchData):
    """Training, validation and test images with depth, or a folder of images to predict.

    Args:
        source: where they come from, `supervised.Rooms` or `supervised.Nyu`.
        image_size: (height, width) of what the model sees. Training is scored at this size; evaluation at the full
            size of the depth maps, and at this one.
        batch_size: the global batch.
        root: folder of all data sets.
        images: the folder of images for `predict`.
        batch_per_device: the most images that a device may hold at once.
        workers: loader processes per device.
        eval_batch_size: images per device in evaluation; each takes 16 scores per pixel and bin.
    """

    channels = 3
    mean, std = MEAN, STD

    def __init__(
        self,
        source: DepthSource,
        image_size: tuple[int, int],
        batch_size: int,
        root: str = "data",
        images: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(batch_size, **loading)
        self.source, self.image_size, self.root, self.images = source, tuple(image_size), Path(root), images

    @property
    def dataset(self) -> str:
        return self.source.name

    def describe(self) -> list[str]:
        return self.source.describe(self.root)

    def without_files(self) -> int:
        return self.source.published or len(self.source.frames("train", self.root))

    def random_batch(self, images: int) -> dict[str, Tensor]:
        return {**super().random_batch(images), "depth": 1 + torch.rand(images, 1, *self.image_size)}

    def load(self, split: str) -> Dataset:
        if split == "predict":
            if self.images is None or not Path(self.images).is_dir():
                raise InputError(f"data.images: {self.images} is not a folder; name one with the images to predict")
            return ImageSet(Path(self.images), self.image_size)
        frames = self.source.frames(split, self.root)
        if split == "train":
            return DepthSet(frames, self.image_size, self.source.training_crop, self.trainer.seed)
        return DepthSet(frames, self.image_size)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        mean, std = (constant(values, batch["image"]).view(3, 1, 1) for values in (MEAN, STD))
        return {**batch, "image": (batch["image"] - mean) / std}

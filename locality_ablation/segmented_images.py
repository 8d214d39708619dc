"""Images that come with their segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data import ImageData
from common.data.loader import Draw
from common.errors import InputError
from locality_ablation.segmentation import Segmentation


class SegmentedSet(Dataset):
    """A set whose images are segmented as they leave it, in the loader's processes: `segments` uint8 (B, H, W), and the
    share of `merged` pixels, (B,).
    """

    def __init__(self, images: Dataset, segmentation: Segmentation) -> None:
        self.images, self.segmentation = images, segmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        batch = self.images.__getitems__(draws)
        labels, merged = zip(*map(self.segmentation, batch["image"]), strict=True)
        return {**batch, "segments": torch.stack(labels), "merged": torch.tensor(merged)}


class SegmentedImages(ImageData):
    """Images with the segments of what augmentation has made of them.

    Segments cost far more than a model's step: see `python -m locality_ablation.benchmark`, and give it `workers`.

    Args:
        segmentation: the way to cut an image.
        **kwargs: see ImageData; colour jitter and grayscale, which would follow on the device, must be off.
    """

    def __init__(self, segmentation: Segmentation, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.segmentation = segmentation
        if any(self.augment.jitter) or self.augment.grayscale:
            raise InputError("data.augment: jitter and grayscale change images on the device, after they were "
                             "segmented; set both to 0, or use rand_augment")

    def load(self, split: str) -> Dataset:
        module = self.trainer.lightning_module
        if not issubclass(module.data_class, SegmentedImages):
            raise InputError(f"data.class_path: SegmentedImages does not go with {type(module).__name__}, which has no "
                             "use for segments; set model to locality_ablation.SegmentClassification")
        return SegmentedSet(super().load(split), self.segmentation)

    def random_batch(self, images: int) -> dict[str, Tensor]:
        """As many segments as an image may have, of pixels that lie anywhere."""
        segments = torch.randint(self.segmentation.limit, (images, *self.image_size))
        return {**super().random_batch(images), "segments": segments, "merged": torch.zeros(images)}

    def _on_device(self, split: str) -> bool:
        return False

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return {**batch, "segments": batch["segments"].long()}

"""From files to batches."""

from common.data.augment import Augment
from common.data.cifar import Cifar10, Cifar100
from common.data.folders import Flowers102, ImageFolder, ImageNet
from common.data.images import ImageData
from common.data.loader import GlobalBatchData
from common.data.shapes import Shapes
from common.data.sources import Digits, Source

__all__ = [
    "Augment", "Cifar10", "Cifar100", "Digits", "Flowers102", "GlobalBatchData", "ImageData", "ImageFolder",
    "ImageNet", "Shapes", "Source",
]  # fmt: skip

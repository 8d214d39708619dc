"""Sets of images, in batches: folders, the .npz files of ADM's evaluator, and a data set as a model sees it."""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data import ImageData
from common.data.folders import SUFFIXES, decode, is_image
from common.data.preparation import EvaluationPreparation
from common.data.stored import fingerprint
from common.errors import InputError
from common.files import read_json, whole
from diffusion.features import sha256
from diffusion.metrics import Statistics

RECORD = "record.json"
ROUNDING = "127.5 x + 128, clamped to 0-255, truncated"
# What the readers of zip files and arrays meet in a damaged file.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError, OSError)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pixels, rounded as DiT does (`ROUNDING`); ADM's (x + 1) 127.5 is half a grey level lower."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        name: for messages and records.
        images: how many.
        size: (H, W) in pixels.
    """

    name: str
    images: int
    size: tuple[int, int]

    @abstractmethod
    def batches(self, images: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """A rank's share of the images in their order: places in the set, and uint8 (`images` or fewer, C, H, W)."""

    def places(self, images: int, rank: int, ranks: int) -> Iterator[slice]:
        """The places of a rank's batches, each of `images` or fewer."""
        for start in range(rank * images, self.images, ranks * images):
            yield slice(start, min(start + images, self.images))

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what the set is made of."""

    def labels(self) -> Tensor | None:
        """The classes (N,) that generated images were asked for, where that is known."""
        return None

    def record(self) -> dict[str, Any]:
        """How the images were generated, as far as that is known."""
        return {}


class Folder(ImageSet):
    """The images in a folder and its subfolders, in the order of their paths.

    The record.json that sampling leaves among its images holds their classes and how they came about.

    Args:
        channels: 3 turns grey into RGB, 1 the other way round.
        first: take so many of them; all where it is left out.
    """

    def __init__(self, path: Path, channels: int, first: int | None = None) -> None:
        self.path, self.name, self.channels = path, str(path), channels
        self.files = _image_files(path)[:first]
        asked = read_record(path).get("samples", 0)
        if first is None and len(self.files) < asked:
            raise InputError(f"{path}: holds {len(self.files)} of the {asked} samples that were asked for; the same "
                             "predict command adds what is missing")
        self.images = len(self.files)
        self.size = _size(self.files[0])
        for file in self.files:  # before the first of them is worked on; 50,000 headers are read in seconds
            if _size(file) != self.size:
                raise InputError(f"{file}: {pixels(_size(file))} pixels, where {self.files[0]} has {pixels(self.size)};"
                                 " bring all images to one size first, since how it is done changes the metrics; "
                                 "`python -m diffusion test` compares with the training images as they were cropped")

    def batches(self, images: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[slice, Tensor]]:
        for place in self.places(images, rank, ranks):
            yield place, torch.stack([decode(str(file), self.channels) for file in self.files[place]])

    def digest(self) -> str:
        """That of the lines which `sha256sum` prints of the images, sorted by path."""
        lines = (f"{sha256(file)}  {file.relative_to(self.path).as_posix()}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def labels(self) -> Tensor | None:
        labels = read_record(self.path).get("labels")
        if not labels:
            return None
        try:
            return torch.tensor([labels[int(file.stem)] for file in self.files])  # named by their numbers
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.path}: holds images that its {RECORD} knows nothing of; move them away") from error

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in read_record(self.path).items() if key != "labels"}


class Archive(ImageSet):
    """The images `arr_0`, uint8 (N, H, W, 3) or (N, H, W, 1), of an .npz file.

    They are read as they are asked for: 50,000 images of 256 pixels are 10 GB.

    Args:
        channels: 3 turns grey into RGB, 1 the other way round.
    """

    def __init__(self, path: Path, channels: int) -> None:
        self.path, self.name = path, str(path)
        if "arr_0" not in keys(path):
            raise InputError(f"{path}: holds no arr_0, the images, but {', '.join(sorted(keys(path))) or 'nothing'}")
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            self.shape, columns_first, dtype = _header(file)
        if dtype != np.uint8:
            raise InputError(f"{path}: arr_0 is {dtype}; store pixels as uint8 in 0-255 (x in [-1, 1] as {ROUNDING})")
        if len(self.shape) != 4 or self.shape[3] not in (1, 3) or 0 in self.shape:
            raise InputError(f"{path}: arr_0 has shape {self.shape}; right is (images, height, width, 3)")
        if columns_first:
            raise InputError(f"{path}: arr_0 is in Fortran's order; save numpy.ascontiguousarray(images)")
        self.images, self.size, self.channels = self.shape[0], self.shape[1:3], channels

    def batches(self, images: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[slice, Tensor]]:
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            begin, image_bytes = file.tell(), int(np.prod(self.shape[1:]))
            for place in self.places(images, rank, ranks):
                shape = (place.stop - place.start, *self.shape[1:])
                file.seek(begin + place.start * image_bytes)
                content = bytearray(file.read(int(np.prod(shape))))
                if len(content) < np.prod(shape):
                    raise EOFError
                yield place, self._coloured(torch.frombuffer(content, dtype=torch.uint8).view(shape).movedim(3, 1))

    def _coloured(self, images: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        if self.channels == 1 and images.shape[1] == 3:
            return rgb_to_grayscale(images)
        return images.expand(-1, self.channels, -1, -1)

    def digest(self) -> str:
        return sha256(self.path)

    def labels(self) -> Tensor | None:
        if "arr_1" not in keys(self.path):
            return None
        with _reading(self.path), np.load(self.path) as archive:
            labels = archive["arr_1"]
        if labels.shape != (self.images,) or labels.dtype.kind not in "iu":
            raise InputError(f"{self.path}: arr_1 is {labels.dtype} of shape {labels.shape}; right is a whole number, "
                             f"the class, for each of the {self.images} images")
        return torch.from_numpy(labels.astype(np.int64))

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in read_record(self.path.with_suffix("")).items() if key != "labels"}


class Prepared(ImageSet):
    """The images of a data set as an evaluation prepares them.

    Args:
        data: whose source is read; it decides on size, crop and interpolation.
        split: `train`, what a generative model should come close to, or `test`, what an autoencoder should.
    """

    def __init__(self, data: ImageData, split: Literal["train", "test"] = "train") -> None:
        self.name = f"{'training' if split == 'train' else split} images of {data.dataset}"
        self.size, self.channels = data.image_size, data.channels
        self.pictures, self._labels = data.source.read(data.root, split)
        self.images = len(self.pictures)
        self._preparation = data.image_size, data.eval_crop, data.eval_interpolation
        self._prepare = EvaluationPreparation(*self._preparation)

    def batches(self, images: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[slice, Tensor]]:
        for place in self.places(images, rank, ranks):
            yield place, self._prepare([self._decoded(picture) for picture in self.pictures[place]])

    def _decoded(self, picture: Tensor | str) -> Tensor:
        return picture if isinstance(picture, Tensor) else decode(picture, self.channels)

    def digest(self) -> str:
        """That of all pixels; of files their names, classes and sizes, and what is done to them: to decode them once
        more would take hours.
        """
        if not isinstance(self.pictures, Tensor):
            sizes = [Path(file).stat().st_size for file in self.pictures]
            told = fingerprint(self.pictures, self._labels), sizes, *self._preparation
            return hashlib.sha256(repr(told).encode()).hexdigest()
        digest = hashlib.sha256()
        for _, images in self.batches(256):
            digest.update(images.contiguous().numpy().data)
        return digest.hexdigest()


def open_images(path: Path, channels: int) -> ImageSet:
    """The images of a folder or an .npz file.

    Raises:
        InputError: neither of them, damaged, or holding other than images of one size with `channels` channels.
    """
    return Folder(path, channels) if path.is_dir() else Archive(path, channels)


def read_record(folder: Path) -> dict[str, Any]:
    """What sampling wrote beside its images; {} where it did not. InputError: a damaged file."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    return read_json(path, "remove the folder and sample again")


def keys(path: Path) -> set[str]:
    """The names of the arrays in an .npz file; none in a folder."""
    if path.is_dir():
        return set()
    if not path.is_file():
        raise InputError(f"{path}: there is no such folder of images or .npz file")
    with _reading(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def stored_statistics(path: Path, suffix: str, features: int) -> Statistics:
    """The arrays `mu` (features,) and `sigma` (features, features) of a reference, `suffix` behind their names.

    Raises:
        InputError: one of them is missing, damaged, not finite or of another shape.
    """
    arrays = []
    for name, shape in [("mu" + suffix, (features,)), ("sigma" + suffix, (features, features))]:
        if name not in keys(path):
            raise InputError(f"{path}: holds no {name}, but {', '.join(sorted(keys(path)))}; ADM's references hold mu, "
                             "sigma, mu_s and sigma_s")
        with _reading(path), np.load(path) as archive:
            array = archive[name].astype(np.float64)
        if array.shape != shape or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} has shape {array.shape}, or values that are not finite; right is {shape}")
        arrays.append(torch.from_numpy(array))
    return Statistics(*arrays)


def write_npz(path: Path, images: int, batches: Iterable[Tensor], labels: Tensor | None = None) -> None:
    """Writes uint8 batches (B, C, H, W), `images` in all, as ADM's evaluator reads them: `arr_0` (N, H, W, 3), and
    `arr_1`, the labels (N,). No more than a batch is held; the file appears when it is whole.
    """
    with whole(path) as out, zipfile.ZipFile(out, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            written = 0
            for batch in batches:
                assert batch.dtype == torch.uint8 and batch.ndim == 4, f"{batch.dtype}, {tuple(batch.shape)}"
                rows = batch.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (images, *rows.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows.data)
                written += len(rows)
            assert written == images, f"{written} images were given, not {images}"
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels.cpu().numpy())


def pixels(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _image_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if is_image(path))
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return files


def _size(file: Path) -> tuple[int, int]:
    """(H, W) of an image file, from its header."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError as error:
        raise InputError(f"{file}: not a readable image ({error.strerror or error})") from error


def _header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of an array; the file then stands at its first value."""
    version = np.lib.format.read_magic(file)
    long = version != (1, 0)
    return (np.lib.format.read_array_header_2_0 if long else np.lib.format.read_array_header_1_0)(file)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (InputError, PermissionError):
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: truncated, or not an .npz file as numpy.savez writes it "
                         f"({type(error).__name__})") from error

"""Sets of images as files: folders, and the .npz files of ADM's evaluator, read and written in batches."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.data.folders import SUFFIXES, decode, is_image
from common.errors import InputError
from diffusion.features import sha256
from diffusion.metrics import Statistics

ROUNDING = "127.5 x + 128, clamped to 0-255, truncated"
# What the readers of zip files and arrays meet in a damaged file.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError, OSError)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pixels, rounded as DiT does (`ROUNDING`); ADM's (x + 1) 127.5 is half a grey level lower."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        images: how many.
        size: (H, W) in pixels.
    """

    path: Path
    images: int
    size: tuple[int, int]

    @abstractmethod
    def batches(self, images: int) -> Iterator[Tensor]:
        """All images in their order, uint8 (`images` or fewer, C, H, W)."""


class Folder(ImageSet):
    """The images in a folder and its subfolders, in the order of their paths.

    Args:
        channels: 3 turns grey into RGB, 1 the other way round.
    """

    def __init__(self, path: Path, channels: int) -> None:
        self.path, self.channels = path, channels
        self.files = _image_files(path)
        self.images = len(self.files)
        self.size = _size(self.files[0])
        for file in self.files:  # before the first of them is worked on; 50,000 headers are read in seconds
            if _size(file) != self.size:
                raise InputError(f"{file}: {pixels(_size(file))} pixels, where {self.files[0]} has {pixels(self.size)};"
                                 " bring all images to one size first: how it is done changes the metrics")

    def batches(self, images: int) -> Iterator[Tensor]:
        for start in range(0, self.images, images):
            yield torch.stack([decode(str(file), self.channels) for file in self.files[start : start + images]])


class Archive(ImageSet):
    """The images `arr_0`, uint8 (N, H, W, C), of an .npz file.

    They are read as they are asked for: 50,000 images of 256 pixels are 10 GB.

    Args:
        channels: that the images must have.
    """

    def __init__(self, path: Path, channels: int) -> None:
        self.path = path
        if "arr_0" not in keys(path):
            raise InputError(f"{path}: holds no arr_0, the images, but {', '.join(sorted(keys(path))) or 'nothing'}")
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            self.shape, columns_first, dtype = _header(file)
        if dtype != np.uint8:
            raise InputError(f"{path}: arr_0 is {dtype}; store pixels as uint8 in 0-255 (x in [-1, 1] as {ROUNDING})")
        if len(self.shape) != 4 or self.shape[3] != channels or 0 in self.shape:
            raise InputError(f"{path}: arr_0 has shape {self.shape}; right is (images, height, width, {channels})")
        if columns_first:
            raise InputError(f"{path}: arr_0 is in Fortran's order; save numpy.ascontiguousarray(images)")
        self.images, self.size = self.shape[0], self.shape[1:3]

    def batches(self, images: int) -> Iterator[Tensor]:
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            for start in range(0, self.images, images):
                shape = (min(images, self.images - start), *self.shape[1:])
                content = bytearray(file.read(int(np.prod(shape))))
                if len(content) < np.prod(shape):
                    raise EOFError
                yield torch.frombuffer(content, dtype=torch.uint8).view(shape).permute(0, 3, 1, 2)


def open_images(path: Path, channels: int) -> ImageSet:
    """The images of a folder or an .npz file.

    Raises:
        InputError: neither of them, damaged, or holding other than images of one size with `channels` channels.
    """
    return Folder(path, channels) if path.is_dir() else Archive(path, channels)


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
    """Writes uint8 batches (B, C, H, W), `images` in all, as ADM's evaluator reads them: `arr_0` (N, H, W, C), and
    `arr_1`, the labels (N,). No more than a batch is held; the file appears when it is whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                written = 0
                for batch in batches:
                    assert batch.dtype == torch.uint8 and batch.ndim == 4, f"{batch.dtype}, {tuple(batch.shape)}"
                    rows = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                    if not written:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (images, *rows.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(rows.data)
                    written += len(rows)
                assert written == images, f"{written} images were given, not {images}"
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels.cpu().numpy())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the lines that `sha256sum` prints of its images, sorted by path."""
    if path.is_file():
        return sha256(path)
    lines = (f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in _image_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    except UnidentifiedImageError as error:
        raise InputError(f"{file}: not a readable image") from error


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

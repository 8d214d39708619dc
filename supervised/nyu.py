"""NYU-Depth-v2 (Silberman et al. 2012): the official labelled file, or folders of images with a list."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from supervised.depth_data import DepthSource, Frames, read_image

HEIGHT, WIDTH = 480, 640
# Rows and columns that are scored (Eigen et al. 2014), and those inside the frame that the registration left blank.
EIGEN_CROP = (slice(45, 471), slice(41, 601))
BORDER_CROP = (slice(45, 472), slice(43, 608))
LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"


class Nyu(DepthSource):
    """795 training and 654 test images of 480x640. There is no validation split: `val` is the test images, as the
    protocol that the paper follows picks its model on them.

    Depth is what the sensor measured (`rawDepths`), 0 where it saw nothing; the filled-in maps of the same file are
    not what published errors refer to.

    Args:
        folder: below `data.root`; holds `nyu_depth_v2_labeled.mat` and `splits.mat`, and what the lists name.
        train_list: file, in `folder`, of further training images in place of the 795: a line has the paths of an image
            and of its depth map (16-bit PNG, millimetres), below `folder`; what follows on the line, such as the focal
            length in BTS's lists, is not used.
        test_list: the same for validation and test.
    """

    name = "nyu_depth_v2"
    training_crop, evaluation_crop = BORDER_CROP, EIGEN_CROP

    def __init__(
        self, folder: str = "nyu_depth_v2", train_list: str | None = None, test_list: str | None = None
    ) -> None:
        self.folder, self.train_list, self.test_list = folder, train_list, test_list
        self.published = None if train_list else 795

    def frames(self, split: str, root: Path) -> Frames:
        folder = root / self.folder
        chosen = self.train_list if split == "train" else self.test_list
        if chosen is not None:
            return ListedFrames(folder / chosen, folder)
        return LabelledFrames(folder / LABELLED, official_split(folder / SPLITS, split))

    def describe(self, root: Path) -> list[str]:
        return [f"{self.name} {split}: {len(self.frames(split, root)):,} images of {HEIGHT}x{WIDTH}"
                for split in ("train", "test")] + [f"{self.name} val: the test images"]


def official_split(path: Path, split: str) -> Tensor:
    """0-based indices of a split in the labelled file, from the official split file (MATLAB 5, 1-based)."""
    from scipy.io import loadmat

    _require(path, f"put the official split file there, beside {LABELLED}")
    key = "trainNdxs" if split == "train" else "testNdxs"
    try:
        return torch.from_numpy(loadmat(path)[key].astype("int64")).flatten() - 1
    except Exception as error:  # scipy raises a kind of its own for each way a file can be damaged
        raise InputError(f"{path}: holds no {key}; it is damaged, or not the official split file") from error


def _require(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: not found; {remedy}")


class LabelledFrames:
    """Images of the labelled file, read one by one where they lie.

    It is HDF5 (MATLAB 7.3), and so its axes are MATLAB's reversed: `images` (N, 3, W, H) uint8 and `rawDepths`
    (N, W, H) in metres.
    """

    def __init__(self, path: Path, indices: Tensor) -> None:
        _require(path, f"download the labelled data set (2.8 GB) there, with {SPLITS} beside it")
        self.path, self.indices = path, indices
        self._owner: int | None = None
        file = self._open()
        for name in ("images", "rawDepths"):
            if name not in file:
                raise InputError(f"{path}: holds no {name}; it is not the labelled data set")
        images, depths = file["images"].shape, file["rawDepths"].shape
        if images[1:] != (3, WIDTH, HEIGHT) or depths != (images[0], WIDTH, HEIGHT):
            raise InputError(f"{path}: images {images} and rawDepths {depths} are not (N, 3, {WIDTH}, {HEIGHT}) and "
                             f"(N, {WIDTH}, {HEIGHT})")
        if int(indices.max()) >= len(file["images"]):
            raise InputError(f"{path}: has {images[0]} images, but {SPLITS} names number {int(indices.max()) + 1}")

    def _open(self) -> Any:
        if self._owner != os.getpid():  # an HDF5 handle must not cross a fork
            import h5py

            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise InputError(f"{self.path}: damaged or cut short ({error}); download it again") from error
            self._owner = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None, "_file": None}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number, file = int(self.indices[index]), self._open()
        try:
            image, depth = file["images"][number], file["rawDepths"][number]
        except OSError as error:
            raise InputError(f"{self.path}: image {number + 1} is not readable ({error}); download it again") from error
        return torch.from_numpy(image).transpose(1, 2), torch.from_numpy(depth)[None].transpose(1, 2).float()


class ListedFrames:
    """Images and depth maps named by the lines of a list."""

    def __init__(self, path: Path, folder: Path) -> None:
        _require(path, "give the list's place below the folder of the data set")
        self.pairs: list[tuple[Path, Path]] = []
        present = cache(lambda directory: frozenset(os.listdir(directory)) if directory.is_dir() else frozenset())
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            names = [name.lstrip("/") for name in line.split()[:2]]
            if len(names) < 2:
                raise InputError(f"{path}, line {number}: {line!r} does not name an image and a depth map")
            for name in names:
                file = folder / name
                if file.name not in present(file.parent):
                    raise InputError(f"{path}, line {number}: {file} does not exist; paths are below {folder}")
            self.pairs.append((folder / names[0], folder / names[1]))
        if not self.pairs:
            raise InputError(f"{path}: names no images; a line has the paths of an image and of its depth map")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, depth = read_image(self.pairs[index][0]), read_image(self.pairs[index][1], None)
        for path, read, shape in [(self.pairs[index][0], image, (3, HEIGHT, WIDTH)),
                                  (self.pairs[index][1], depth, (1, HEIGHT, WIDTH))]:
            if read.shape != shape:
                raise InputError(f"{path}: has (channels, height, width) {tuple(read.shape)}, not {shape}")
        if depth.dtype != torch.uint16:
            raise InputError(f"{self.pairs[index][1]}: a depth map is a 16-bit PNG in millimetres, not {depth.dtype}")
        return image, depth.float() / 1000

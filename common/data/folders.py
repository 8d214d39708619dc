"""Images that lie in folders named by their classes, and the decoding of one."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from common.data.sources import Pictures, Source
from common.errors import InputError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def decode(file: str, channels: int) -> Tensor:
    """The image as uint8 (C, h, w): grey for one channel, else RGB without transparency. InputError if unreadable."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import rgb_to_grayscale, to_dtype

    try:
        image = decode_image(file, mode=ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rsplit(".cpp:", 1)[-1].partition(", ")[2]
        try:
            open(file, "rb").close()
        except OSError as closed:  # which torchvision does not always tell
            reason = closed.strerror
        raise InputError(f"{file}: not a readable image ({reason})") from error
    if channels == 1 and len(image) == 3:  # WebP, whose decoder knows no grey
        image = rgb_to_grayscale(image)
    return image if image.dtype == torch.uint8 else to_dtype(image, torch.uint8, scale=True)  # PNG may have 16 bits


def folders_of(folder: Path, layout: str) -> list[str]:
    """The names of the class folders, sorted."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; lay it out as {layout}")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder}: holds no class folders; lay it out as {layout}")
    return names


def pictures_of(folder: Path, classes: list[str], layout: str) -> Pictures:
    """The files of all class folders, by class and name."""
    labels = {name: label for label, name in enumerate(classes)}
    files, targets = [], []
    for name in folders_of(folder, layout):
        if name not in labels:
            raise InputError(f"{folder / name}: not one of the {len(classes)} classes of the training images")
        found = sorted(str(path) for path in (folder / name).iterdir() if is_image(path))
        if not found:
            raise InputError(f"{folder / name}: holds no images ({', '.join(SUFFIXES)})")
        files += found
        targets += [labels[name]] * len(found)
    return Pictures(files, torch.tensor(targets))


class ImageFolder(Source):
    """Any folder of class folders: `path/{train,val,test}/CLASS/*`, or `path/CLASS/*`.

    Where val or test is missing, the other stands in for it. Where there are no split folders, a hash of each file's
    path below `path` deals the images out: 80 % train, 10 % val, 10 % test; a file stays where it is when others come.

    Args:
        path: the folder, relative to the working directory.
    """

    name = "image folder"

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.layout = f"{path}/{{train,val,test}}/CLASS/*.jpg or {path}/CLASS/*.jpg"

    def title(self, root: Path) -> str:
        return self.path.name

    def _divided(self) -> bool:
        return (self.path / "train").is_dir()

    def class_names(self, root: Path) -> list[str]:
        if self._divided():
            return folders_of(self.path / "train", f"{self.layout}, where no class is called train")
        return folders_of(self.path, self.layout)

    def read(self, root: Path, split: str) -> Pictures:
        classes = self.class_names(root)
        if self._divided():
            twin = {"val": "test", "test": "val"}.get(split, split)
            folder = self.path / split
            return pictures_of(folder if folder.is_dir() else self.path / twin, classes, self.layout)
        files, labels = pictures_of(self.path, classes, self.layout)
        chosen = [i for i, file in enumerate(files) if self._part(file) == split]
        if not chosen:
            raise InputError(f"{self.path}: too few images for a {split} split; lay it out as {self.layout}")
        return Pictures([files[i] for i in chosen], labels[chosen])

    def _part(self, file: str) -> str:
        tenth = zlib.crc32(Path(file).relative_to(self.path).as_posix().encode()) % 10
        return {0: "test", 1: "val"}.get(tenth, "train")


class ImageNet(Source):
    """ImageNet-1k as folders: `imagenet/{train,val}/WNID/*.JPEG` below the root.

    The published test labels are secret: val stands in for test, as in the paper. A subset of the classes trains a
    head of that many outputs; `check` tells how many of the 1000 there are.
    """

    name = "imagenet"
    layout = "imagenet/{train,val}/WNID/*.JPEG"
    note = "test is val"
    expected = 1000
    published = 1_281_167, 1000

    def class_names(self, root: Path) -> list[str]:
        return folders_of(root / "imagenet" / "train", f"{root}/{self.layout}")

    def read(self, root: Path, split: str) -> Pictures:
        folder = root / "imagenet" / ("train" if split == "train" else "val")
        if _is_flat(folder):
            raise InputError(
                f"{folder}: the images lie flat, without class folders; with LOC_val_solution.csv from the data set's "
                f"page beside you, run: tail -n +2 LOC_val_solution.csv | tr ',' ' ' | while read -r f c _; do "
                f"mkdir -p {folder}/$c && mv {folder}/$f.JPEG {folder}/$c/; done"
            )
        return pictures_of(folder, self.class_names(root), f"{root}/{self.layout}")


def _is_flat(folder: Path) -> bool:
    """Images and no folders; reads no more entries than it must."""
    return folder.is_dir() and any(map(is_image, folder.iterdir())) and not any(p.is_dir() for p in folder.iterdir())


class Flowers102(Source):
    """Oxford-102 Flowers as published: `jpg/`, `imagelabels.mat` and `setid.mat`, in `flowers-102/` below the root.

    The official split: 1020 train, 1020 val and 6149 test images. The classes have numbers, not names.
    """

    name = "flowers102"
    layout = "flowers-102/{jpg/image_00001.jpg ..., imagelabels.mat, setid.mat}"
    published = 1020, 102

    def class_names(self, root: Path) -> list[str]:
        return [str(number) for number in range(1, 103)]

    def read(self, root: Path, split: str) -> Pictures:
        folder = root / "flowers-102"
        key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
        numbers = self._vector(folder / "setid.mat", key, root)
        labels = self._vector(folder / "imagelabels.mat", "labels", root)
        files = [str(folder / "jpg" / f"image_{number:05d}.jpg") for number in numbers]
        absent = next((file for file in files if not Path(file).is_file()), None)
        if absent is not None:
            raise InputError(f"{absent}: no such file, though setid.mat lists it; lay it out as {root}/{self.layout}")
        if max(numbers) > len(labels) or not 1 <= min(labels) <= max(labels) <= 102:
            raise InputError(f"{folder}/imagelabels.mat: not one label from 1 to 102 for each image of setid.mat")
        return Pictures(files, torch.tensor([labels[number - 1] - 1 for number in numbers]))

    def _vector(self, file: Path, key: str, root: Path) -> list[int]:
        from scipy.io import loadmat

        if not file.is_file():
            raise InputError(f"{file}: no such file; lay it out as {root}/{self.layout}")
        try:
            return loadmat(str(file))[key].ravel().astype(int).tolist()
        except KeyError:
            raise InputError(f"{file}: holds no {key!r}; the official file does") from None
        except Exception as error:  # scipy's reader raises whatever a damaged file leads it to
            raise InputError(f"{file}: truncated, or not a MATLAB file ({type(error).__name__})") from error



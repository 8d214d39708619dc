"""CIFAR-10 and CIFAR-100 in the forms they are published in, read where they lie."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.data.folders import pictures_of
from common.data.sources import Pictures, Source
from common.errors import InputError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
PIXELS = 3 * 32 * 32


class Release(NamedTuple):
    """One published form of a data set: an archive, the folder in it, and the files of each split."""

    archive: str
    folder: str
    train: list[str]
    test: list[str]


class Cifar(Source):
    """50,000 training and 10,000 test images of 32x32.

    Val and test are the same images, as the paper reports them. A tree of JPEG or PNG files is read, too, but results
    on it are reported as an image folder's: recompression changes the pixels.
    """

    resident = True
    note = "val is test"

    @property
    def published(self) -> tuple[int, int]:
        return 50_000, len(self.classes.split())

    binary: Release
    python: Release
    label_bytes: int  # of a binary record; the last one is the label that counts
    label_key: bytes
    classes: str

    def class_names(self, root: Path) -> list[str]:
        return self.classes.split()

    @property
    def layout(self) -> str:
        forms = [name for r in (self.binary, self.python) for name in (r.archive, f"{r.folder}/")]
        return f"one of {', '.join(forms)}, {self.name}/{{train,test}}/CLASS/*.jpg"

    def title(self, root: Path) -> str:
        return f"{self.name}, image folder (JPEG)" if self._form(root) == "tree" else self.name

    def read(self, root: Path, split: str) -> Pictures:
        part = "train" if split == "train" else "test"
        form = self._form(root)
        if form == "tree":
            return pictures_of(root / self.name / part, self.class_names(root), f"{root}: {self.layout}")
        release = self.binary if form == "binary" else self.python
        read = self._binary if form == "binary" else self._pickled
        batches = [read(file, data) for file, data in _members(root, release, getattr(release, part))]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        if labels.min() < 0 or labels.max() >= len(self.class_names(root)):
            raise InputError(f"{root / release.folder}: label {labels.max()} is outside the classes of {self.name}")
        return Pictures(torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64)))

    def _form(self, root: Path) -> str:
        for form, release in [("binary", self.binary), ("python", self.python)]:
            if (root / release.folder).is_dir() or (root / release.archive).is_file():
                return form
        if (root / self.name).is_dir():
            return "tree"
        raise InputError(f"{root}: holds no {self.name}; lay it out as {self.layout}")

    def _binary(self, file: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        record = self.label_bytes + PIXELS
        if not data or len(data) % record:
            raise InputError(f"{file}: truncated: {len(data)} bytes are not whole records of {record}")
        records = np.frombuffer(data, np.uint8).reshape(-1, record)
        return records[:, self.label_bytes :], records[:, self.label_bytes - 1]

    def _pickled(self, file: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        try:
            batch = ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
            images, labels = batch[b"data"], np.asarray(batch[self.label_key])
        except Refused as error:
            raise InputError(f"{file}: {error}; the published file holds arrays only") from None
        except Exception as error:  # a damaged pickle raises whatever its bytes lead to
            raise InputError(f"{file}: truncated, or not a batch of {self.name} ({type(error).__name__})") from error
        if images.dtype != np.uint8 or images.shape != (len(labels), PIXELS):
            raise InputError(f"{file}: pixels {images.dtype} {images.shape} are not uint8 ({len(labels)}, {PIXELS})")
        return images, labels


class Refused(pickle.UnpicklingError):
    """A pickle asks for more than arrays."""


class ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numbers, strings, containers and NumPy arrays; whatever else a pickle names is refused, not imported."""

    allowed = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise Refused(f"the pickle names {module}.{name}, which is refused")
        return self.allowed[module, name]


def _members(root: Path, release: Release, names: list[str]) -> list[tuple[str, bytes]]:
    """Name and content of files of a release, from its folder or straight from its archive."""
    folder = root / release.folder
    if folder.is_dir():
        absent = next((folder / name for name in names if not (folder / name).is_file()), None)
        if absent is not None:
            raise InputError(f"{absent}: no such file; {release.archive} holds it")
        return [(str(folder / name), (folder / name).read_bytes()) for name in names]
    archive, found = root / release.archive, {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:  # one pass: a compressed archive cannot be sought in
                if member.name.removeprefix("./") in {f"{release.folder}/{name}" for name in names}:
                    found[Path(member.name).name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{archive}: truncated, or not a tar archive ({error})") from error
    absent = next((name for name in names if name not in found), None)
    if absent is not None:
        raise InputError(f"{archive}: truncated, or not the published archive: it holds no {release.folder}/{absent}")
    return [(f"{archive}: {name}", found[name]) for name in names]


class Cifar10(Cifar):
    __doc__ = Cifar.__doc__
    name = "cifar10"
    classes = CIFAR10_CLASSES
    binary = Release("cifar-10-binary.tar.gz", "cifar-10-batches-bin",
                     [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"])
    python = Release("cifar-10-python.tar.gz", "cifar-10-batches-py",
                     [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])
    label_bytes, label_key = 1, b"labels"


class Cifar100(Cifar):
    __doc__ = Cifar.__doc__
    name = "cifar100"
    classes = CIFAR100_CLASSES
    binary = Release("cifar-100-binary.tar.gz", "cifar-100-binary", ["train.bin"], ["test.bin"])
    python = Release("cifar-100-python.tar.gz", "cifar-100-python", ["train"], ["test"])
    label_bytes, label_key = 2, b"fine_labels"

"""Data sets as their publishers lay them out on a disk, with the few images that a test gives them.

Built from the published descriptions, never from what the readers expect.
"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat


def picture(path: Path, size: tuple[int, int] = (8, 8), colour: tuple[int, int, int] = (200, 30, 60)) -> Path:
    """A file of one colour, (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def noise(path: Path, size: tuple[int, int], seed: int) -> Path:
    """A file of smooth noise, (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def tar_gz(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def cifar10(root: Path, images: np.ndarray, labels: Sequence[int], test: int) -> None:
    """The binary release: records of a label and 3072 pixels, in five files, and the last `test` ones in a sixth."""
    records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
    train = np.array_split(np.arange(len(records) - test), 5)
    parts = {f"data_batch_{i}.bin": b"".join(records[k] for k in part) for i, part in enumerate(train, 1)}
    parts["test_batch.bin"] = b"".join(records[-test:])
    tar_gz(root / "cifar-10-binary.tar.gz", {
        "cifar-10-batches-bin/batches.meta.txt": b"airplane\n",
        **{f"cifar-10-batches-bin/{name}": data for name, data in parts.items()},
    })  # fmt: skip


def cifar100(root: Path, images: np.ndarray, coarse: Sequence[int], fine: Sequence[int]) -> None:
    """The binary release: records of two labels and 3072 pixels; training and test hold the same here."""
    data = b"".join(bytes(pair) + image.tobytes() for *pair, image in zip(coarse, fine, images, strict=True))
    tar_gz(root / "cifar-100-binary.tar.gz", {
        "cifar-100-binary/fine_label_names.txt": b"apple\n",
        "cifar-100-binary/train.bin": data,
        "cifar-100-binary/test.bin": data,
    })


def flowers102(root: Path, labels: Sequence[int], train: Sequence[int], val: Sequence[int], test: Sequence[int],
               size: tuple[int, int] = (8, 8)) -> Path:  # fmt: skip
    """JPEGs numbered from 1, their labels from 1, and the numbers of each split."""
    folder = root / "flowers-102"
    for number in range(1, len(labels) + 1):
        noise(folder / "jpg" / f"image_{number:05d}.jpg", size, number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {"trnid": np.array([train]), "valid": np.array([val]), "tstid": np.array([test])})
    return folder


def imagenet(root: Path, wnids: Sequence[str], size: tuple[int, int], images: int = 2) -> None:
    """`images` JPEGs a class in train and in val."""
    for split in ("train", "val"):
        for i in range(images * len(wnids)):
            wnid = wnids[i // images]
            noise(root / "imagenet" / split / wnid / f"{split}_{i:08d}.JPEG", size, i)


def nyu_depth_v2(root: Path, images: np.ndarray, depths: np.ndarray, train: Sequence[int], test: Sequence[int]) -> None:
    """The labelled file (MATLAB 7.3, so HDF5 with the axes reversed) and the split file, whose numbers start at 1.

    Args:
        images: as MATLAB indexes them, (480, 640, 3, N) uint8.
        depths: as the sensor measured them, in metres, (480, 640, N); the file's filled-in maps are 1 m farther here.
    """
    folder = root / "nyu_depth_v2"
    folder.mkdir(parents=True)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, array in {"images": images, "rawDepths": depths, "depths": depths + 1}.items():
            file.create_dataset(name, data=array.T, chunks=(1, *array.T.shape[1:]), compression="gzip")
    savemat(folder / "splits.mat", {"trainNdxs": np.array(train)[:, None], "testNdxs": np.array(test)[:, None]})

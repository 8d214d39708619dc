"""CIFAR readers against archives built from the published description of the formats."""

import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import archives
import numpy as np
import pytest
from PIL import Image

from common.data import Cifar10, Cifar100
from common.data.cifar import ArrayUnpickler, Refused
from common.errors import InputError

rng = np.random.default_rng(0)
PICTURES = rng.integers(0, 256, (12, 3072), dtype=np.uint8)  # 1024 red, 1024 green, 1024 blue, row by row
LABELS = rng.integers(0, 10, 12).tolist()


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: bytes as its `str` (opcode U or T), and NumPy by its former name."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write((b"U" + struct.pack("<B", len(value)) if short else b"T" + struct.pack("<i", len(value))) + value)
        self.memoize(value)

    def save_global(self, value: object, name: str | None = None) -> None:
        module = getattr(value, "__module__", "").replace("numpy._core", "numpy.core")
        self.write(b"c" + f"{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[bytes] = save_bytes
    dispatch[type] = save_global


def python2(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2, fix_imports=False).dump(value)
    return buffer.getvalue()


def binary10(root: Path) -> None:
    archives.cifar10(root, PICTURES, LABELS, test=2)


def python10(root: Path) -> None:
    files = {f"data_batch_{i + 1}": range(2 * i, 2 * i + 2) for i in range(5)} | {"test_batch": range(10, 12)}
    archives.tar_gz(root / "cifar-10-python.tar.gz", {
        f"cifar-10-batches-py/{name}": python2({
            b"batch_label": b"training batch", b"labels": [LABELS[i] for i in rows], b"data": PICTURES[list(rows)],
            b"filenames": [b"x.png"] * len(rows)})
        for name, rows in files.items()
    })  # fmt: skip


def extracted(build: Callable[[Path], None]) -> Callable[[Path], None]:
    def extract(root: Path) -> None:
        build(root)
        (path,) = root.glob("*.tar.gz")
        with tarfile.open(path) as tar:
            tar.extractall(root, filter="data")
        path.unlink()

    return extract


@pytest.mark.parametrize("lay_out", [binary10, python10, extracted(binary10), extracted(python10)])
def test_cifar10_as_published(lay_out: Callable[[Path], None], tmp_path: Path) -> None:
    lay_out(tmp_path)
    source = Cifar10()
    train, test = source.read(tmp_path, "train"), source.read(tmp_path, "test")
    assert train.images.numpy().tobytes() == PICTURES[:10].tobytes() and train.images.shape == (10, 3, 32, 32)
    assert train.labels.tolist() == LABELS[:10] and test.labels.tolist() == LABELS[10:]
    assert source.read(tmp_path, "val").images.equal(test.images)
    assert source.title(tmp_path) == "cifar10"


@pytest.mark.parametrize("form", ["binary", "python"])
def test_cifar100_takes_the_fine_labels(form: str, tmp_path: Path) -> None:
    coarse, fine = [3, 19], [99, 40]
    if form == "binary":
        archives.cifar100(tmp_path, PICTURES[:2], coarse, fine)
    else:
        data = python2({b"coarse_labels": coarse, b"fine_labels": fine, b"data": PICTURES[:2]})
        archives.tar_gz(tmp_path / "cifar-100-python.tar.gz",
                        {"cifar-100-python/train": data, "cifar-100-python/test": data})
    train = Cifar100().read(tmp_path, "train")
    assert train.labels.tolist() == fine and train.images.flatten(1).numpy().tolist() == PICTURES[:2].tolist()


def test_class_names() -> None:
    names = Cifar100().class_names(Path())
    assert len(set(names)) == 100 and names == sorted(names) and names[40] == "lamp" and names[99] == "worm"
    assert Cifar10().class_names(Path())[::3] == ["airplane", "cat", "frog", "truck"]


def test_a_tree_of_jpegs_is_reported_as_such(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in Cifar10().class_names(tmp_path):
            (tmp_path / "cifar10" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "cifar10" / split / name / "0.jpg")
    assert Cifar10().title(tmp_path) == "cifar10, image folder (JPEG)"
    assert Cifar10().read(tmp_path, "train").labels.tolist() == list(range(10))


class Malice:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("payload", [Malice(), {b"data": Malice()}])
def test_a_pickle_that_names_a_function_is_refused(payload: object, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match="mkdir"):
        ArrayUnpickler(io.BytesIO(pickle.dumps(payload))).load()
    (tmp_path / "cifar-10-batches-py").mkdir()
    for i in range(1, 6):
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{i}").write_bytes(pickle.dumps(payload))
    with pytest.raises(InputError, match="data_batch_1.*mkdir"):
        Cifar10().read(tmp_path, "train")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("lay_out", [binary10, python10])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_archive_is_named(lay_out: Callable[[Path], None], share: float, tmp_path: Path) -> None:
    lay_out(tmp_path)
    (path,) = tmp_path.glob("*.tar.gz")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=f"{path.name}: truncated"):
        Cifar10().read(tmp_path, "test")


@pytest.mark.parametrize("lay_out, name", [(binary10, "test_batch.bin"), (python10, "test_batch")])
def test_a_truncated_file_is_named(lay_out: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    extracted(lay_out)(tmp_path)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{name}: truncated"):
        Cifar10().read(tmp_path, "test")
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        Cifar10().read(tmp_path, "test")


def test_a_label_outside_the_classes(tmp_path: Path) -> None:
    extracted(binary10)(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes([10]) + PICTURES[0].tobytes())
    with pytest.raises(InputError, match="label 10 is outside"):
        Cifar10().read(tmp_path, "test")


def test_where_there_is_nothing_the_layout_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cifar-10-binary.tar.gz.*cifar-10-python.tar.gz") as caught:
        Cifar10().read(tmp_path, "train")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

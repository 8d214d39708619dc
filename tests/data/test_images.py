"""The datamodule: what a batch is, in each stage, from memory and from files, with and without workers."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from common.data import Augment, Digits, ImageData, ImageFolder, Shapes
from common.data.crop import adm_crop
from common.data.folders import decode
from common.data.loader import Draw
from common.data.sets import FileSet
from common.errors import InputError

CROP = Augment(crop_scale=(0.3, 1.0), flip=0.5, interpolation="bicubic", jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
RAND = Augment(crop_scale=(0.3, 1.0), flip=0.5, interpolation="bicubic", rand_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 smooth PNGs of different sizes in two classes."""
    for i in range(12):
        smooth = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
        path = tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth).resize((40 + i, 30 + 2 * i), Image.BICUBIC).save(path)
    (tmp_path / "pictures" / "val").symlink_to("train")
    return tmp_path / "pictures"


def attached(data: ImageData, **state: bool) -> ImageData:
    stages = {"training": False, "predicting": False, **state}
    data.trainer = SimpleNamespace(seed=3, strategy=SimpleNamespace(root_device=torch.device("cpu")), **stages)
    for split in ("train", "val"):
        data.sets[split] = data.load(split)
    return data


def draws(*indices: int, epoch: int = 1) -> list[Draw]:
    return [Draw(epoch, index, place) for place, index in enumerate(indices)]


def loaded(data: ImageData, split: str, which: list[Draw], workers: int = 0) -> dict[str, Any]:
    loader = DataLoader(data.sets[split], batch_sampler=[which], collate_fn=lambda batch: batch, num_workers=workers)
    return data.on_after_batch_transfer(next(iter(loader)), 0)


def test_a_batch_of_digits() -> None:
    data = attached(ImageData(Digits(), 8, 128, mean=[0.3], std=[0.4]))
    assert (data.classes, data.channels, data.image_size, data.dataset) == (10, 1, (8, 8), "digits")
    batch = loaded(data, "val", draws(5, 2))
    raw, labels = Digits().read(Path(), "val")
    torch.testing.assert_close(batch["image"], (raw[[5, 2]] / 255 - 0.3) / 0.4)
    assert batch["label"].equal(labels[[5, 2]])
    assert (batch["index"].tolist(), batch["place"].tolist(), batch["epoch"].tolist()) == ([5, 2], [0, 1], [1, 1])
    assert all(batch[key].dtype == torch.int64 for key in ("label", "index", "place", "epoch"))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_the_device_holds_make_the_same_batches(workers: int) -> None:
    """Only indices and labels come out of the loader; validation is as it was."""
    sent, held = (attached(ImageData(Shapes(24, train=12), (16, 20), 4, augment=CROP, on_device=choice), training=True)
                  for choice in (False, True))
    some = draws(7, 3, 10, 3)
    assert (held.held_bytes, sent.held_bytes) == (12 * 3 * 24 * 24, 0)
    assert "image" not in held.sets["train"].__getitems__(some) and len(held.sets["train"]) == 12
    there, expected = (loaded(data, "train", some, workers) for data in (held, sent))
    assert there.keys() == expected.keys() and there["image"].equal(expected["image"])
    assert there["label"].equal(expected["label"])
    held.trainer.training = sent.trainer.training = False
    assert loaded(held, "val", some)["image"].equal(loaded(sent, "val", some)["image"])


def test_a_device_holds_what_takes_a_quarter_of_a_gpu(monkeypatch) -> None:
    data = ImageData(Shapes(24, train=12), 24, 4)
    room = 4 * 12 * 3 * 24 * 24  # bytes
    for device, memory, holds in [("cuda", room, True), ("cuda", room - 1, False), ("cpu", 100 * room, False)]:
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), seed=0)
        monkeypatch.setattr("common.data.images.device_memory", lambda _, memory=memory: memory)
        assert data._holds(room // 4) == holds


def test_a_device_cannot_hold_what_the_loader_has_to_work_on(folder: Path) -> None:
    for source, augment in [(Shapes(24, train=12), RAND), (ImageFolder(str(folder)), CROP)]:
        with pytest.raises(InputError, match="data.on_device: true is for crops that a device can take"):
            attached(ImageData(source, 24, 4, augment=augment, on_device=True), training=True)


@pytest.mark.parametrize("source", ["files", "memory"])
@pytest.mark.parametrize("augment", [CROP, RAND], ids=["crop", "rand_augment"])
def test_training_depends_on_seed_epoch_and_index_alone(source: str, augment: Augment, folder: Path) -> None:
    images = ImageFolder(str(folder)) if source == "files" else Shapes(24, train=12)
    data = attached(ImageData(images, (16, 20), 4, augment=augment), training=True)
    batch = loaded(data, "train", draws(*range(12)))
    assert batch["image"].shape == (12, 3, 16, 20) and batch["image"].dtype == torch.float32
    in_worker = loaded(data, "train", draws(7, 3, 10), workers=1)
    torch.testing.assert_close(in_worker["image"], batch["image"][[7, 3, 10]], atol=1e-5, rtol=0)
    assert in_worker["label"].equal(batch["label"][[7, 3, 10]])
    later = loaded(data, "train", draws(*range(12), epoch=2))["image"]
    assert ((later - batch["image"]).abs().amax((1, 2, 3)) > 0.05).all()


def test_evaluation_of_files_is_the_references(folder: Path) -> None:
    data = attached(ImageData(ImageFolder(str(folder)), 14, 4, eval_crop=0.875))
    files, labels = data.source.read(Path(), "val")
    batch = loaded(data, "val", draws(*range(12)))
    assert batch["label"].equal(labels)
    for file, image in zip(files, batch["image"], strict=True):
        pil = Image.open(file)
        short = 16 / min(pil.size)
        pil = pil.resize((int(pil.width * short + 1e-9), int(pil.height * short + 1e-9)), Image.BICUBIC)
        expected = functional.pil_to_tensor(functional.center_crop(pil, 14)) / 255 * 2 - 1
        torch.testing.assert_close(image, expected, atol=2 * 2 / 255, rtol=0)


def test_images_in_memory_are_resized_on_the_device() -> None:
    data = attached(ImageData(Shapes(32), 14, 4, eval_crop=0.875, mean=[0.0], std=[1.0]))
    batch = loaded(data, "val", draws(0, 9))
    raw = data.source.read(Path(), "val").images[[0, 9]] / 255
    expected = functional.center_crop(functional.resize(raw, [16], 3, antialias=True), 14).clamp(0, 1)
    torch.testing.assert_close(batch["image"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("source", ["files", "memory"])
def test_adm_reaches_every_image(source: str, split: str, folder: Path) -> None:
    images = ImageFolder(str(folder)) if source == "files" else Shapes(32, train=12)
    arguments = {"source": images, "image_size": 12, "batch_size": 4, "mean": [0.0], "std": [1.0]}
    adm, bicubic = (
        loaded(attached(ImageData(**arguments, augment=Augment(interpolation=how), eval_interpolation=how),
                        training=split == "train"), split, draws(0, 7))["image"]
        for how in ("adm", "bicubic")
    )  # fmt: skip
    raw = images.read(Path(), split).images
    expected = torch.stack([adm_crop(decode(raw[i], 3) if source == "files" else raw[i], 12) for i in (0, 7)]) / 255
    torch.testing.assert_close(adm, expected, atol=1e-6, rtol=0)
    assert (adm - bicubic).abs().max() > 8 / 255


def test_prediction_names_the_files(folder: Path) -> None:
    data = attached(ImageData(Shapes(16), 16, 4, images=str(folder / "train")), predicting=True)
    data.sets["predict"] = data.load("predict")
    batch = loaded(data, "predict", draws(*range(12)))
    assert "label" not in batch and batch["image"].shape == (12, 3, 16, 16)
    assert [Path(file).name for file in batch["file"]] == [f"{i:02d}.png" for i in [*range(0, 12, 2), *range(1, 12, 2)]]


def corners(images: Sequence[torch.Tensor], _: Any) -> torch.Tensor:
    return torch.stack([image[:, :8, :8] for image in images])


def spoilt(folder: Path, budget: int, exact: bool = False) -> FileSet:
    files = sorted(str(path) for path in folder.glob("train/*/*.png"))
    for index in (2, 3, 8):
        Path(files[index]).write_bytes(b"no picture")
    return FileSet(files, torch.arange(12), 3, corners, exact, budget)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next(workers: int, folder: Path) -> None:
    images = spoilt(folder, 3)
    loader = DataLoader(images, batch_sampler=[draws(1, 2), draws(2, 3), draws(8, 11)], num_workers=workers,
                        collate_fn=lambda batch: batch)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(loader)
    assert [batch["label"].tolist() for batch in batches] == [[1, 4], [4, 4], [9, 11]]
    assert batches[0]["index"].tolist() == [1, 2]
    assert images.unreadable.nonzero()[:, 0].tolist() == [2, 3, 8]  # counted across workers, once each


@pytest.mark.parametrize("workers", [0, 1])
def test_one_more_than_the_budget_stops(workers: int, folder: Path) -> None:
    loader = DataLoader(spoilt(folder, 2), batch_sampler=[draws(2), draws(8)], num_workers=workers,
                        collate_fn=lambda batch: batch)  # fmt: skip
    with warnings.catch_warnings(), pytest.raises(InputError) as caught:
        warnings.simplefilter("ignore")
        list(loader)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder}/train/b/05.png: not a readable image")
    assert message.endswith("3 so far, data.max_unreadable: 2")


def test_an_unreadable_image_is_named_when_it_is_replaced(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"a/04\.png: not a readable image .*\(1 so far\)"):
        spoilt(folder, 3).__getitems__(draws(2))


def test_an_evaluation_refuses_an_unreadable_image(folder: Path) -> None:
    with pytest.raises(InputError, match="every image"):
        spoilt(folder, 3, exact=True).__getitems__(draws(2))


@pytest.mark.parametrize("arguments, key", [
    ({"mean": [0.5, 0.5]}, "data.mean"), ({"std": [0.0]}, "data.std"), ({"image_size": 0}, "data.image_size"),
    ({"eval_crop": 1.2}, "data.eval_crop"), ({"max_unreadable": -1}, "data.max_unreadable"),
    ({"augment": Augment(grayscale=0.2)}, "data.augment"), ({"augment": RAND}, "data.augment"),
    ({"batch_size": 0}, "data.batch_size"),
    ({"eval_interpolation": "adm", "eval_crop": 0.875}, "data.eval_interpolation"),
    ({"eval_interpolation": "adm", "image_size": (8, 16)}, "data.eval_interpolation"),
    ({"augment": Augment(interpolation="adm"), "image_size": (8, 16)}, "data.augment.interpolation"),
], ids=str)  # fmt: skip
def test_a_wrong_argument_is_named(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}: "):
        ImageData(**{"source": Digits(), "image_size": 8, "batch_size": 8, **arguments})


@pytest.mark.parametrize("images", [None, "nowhere", "."])
def test_a_prediction_needs_a_folder_of_images(images: str | None, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^data.images: {images or None}"):
        ImageData(Digits(), 8, 8, images=images).load("predict")

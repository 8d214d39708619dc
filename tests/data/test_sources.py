"""Digits, shapes and folders: what a split holds, and what is said where it is wrong."""

import io
import math
import re
import subprocess
from pathlib import Path

import archives
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from common.data import Cifar10, Cifar100, Digits, Flowers102, ImageFolder, ImageNet, Shapes
from common.data.folders import decode
from common.data.inventory import describe
from common.data.sources import SPLITS
from common.errors import InputError


def test_digits_are_split_without_overlap_and_by_class() -> None:
    splits = {split: Digits().read(Path(), split) for split in SPLITS}
    assert {name: len(s.labels) for name, s in splits.items()} == {"train": 1197, "val": 300, "test": 300}
    ours = torch.cat([s.images for s in splits.values()]).flatten(1).double() * 16 / 255
    theirs = torch.from_numpy(load_digits().data)
    assert sorted(map(tuple, ours.round().tolist())) == sorted(map(tuple, theirs.tolist()))
    everyone = torch.from_numpy(load_digits().target).bincount()
    for s in splits.values():
        assert (s.labels.bincount() - everyone * len(s.labels) / 1797).abs().max() <= 1
        assert s.images.dtype == torch.uint8 and s.images.max() == 255


def test_shapes_are_a_function_of_seed_and_index() -> None:
    source = Shapes(16, train=300)
    images, labels = source.read(Path(), "train")
    assert images.shape == (300, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.equal(source.labels(Path(), "train")) and labels.bincount().tolist() == [38] * 4 + [37] * 4
    assert Shapes(16, train=300).read(Path(), "train").images.equal(images)
    assert Shapes(16, train=70).read(Path(), "train").images.equal(images[:70])
    assert not Shapes(16, train=300, seed=1).read(Path(), "train").images.equal(images)
    assert len(torch.cat([images, source.read(Path(), "val").images[:300]]).flatten(1).unique(dim=0)) == 600


def test_size_changes_the_sampling_and_not_the_picture() -> None:
    small, large = (Shapes(size, train=64).read(Path(), "train").images.float() for size in (32, 64))
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (shrunk - small).abs().mean() < 8  # of 255


def _covered(draws: torch.Tensor, shape: int) -> float:
    """The share of its square that a shape covers, seen as what changes between two plain surfaces."""
    from common.data.shapes import render

    plain = torch.zeros(1, dtype=torch.long)
    other = draws.clone()
    other[:, 11:14] = 1.0  # the dark colour, the one of a plain surface
    before, after = (render(d, torch.tensor([shape]), plain, 64) for d in (draws, other))
    return (before != after).any(1).float().sum().item()


def test_shape_labels_name_the_outline() -> None:
    from common.data.shapes import DRAWS, OUTLINES

    draws = torch.full((1, DRAWS), 0.5)  # in the middle, upright
    radius = 0.65 * 32
    area = {name: _covered(draws, k) / radius**2 for k, name in enumerate(OUTLINES)}
    expected = {"disc": math.pi * 0.81, "ring": math.pi * (0.95**2 - 0.41**2), "square": 1.56**2,
                "cross": 4 * 0.95 * 0.6 - 0.6**2}  # fmt: skip
    for name, value in expected.items():
        assert area[name] == pytest.approx(value, rel=0.12), name  # antialiased edges count whole
    assert area["crescent"] < area["star"] < area["triangle"] < area["heart"] < area["square"]


@pytest.mark.parametrize("label", ["shape", "texture", "both"])
def test_labels_say_what_is_drawn(label: str) -> None:
    """Listens to what is rendered."""
    from common.data import shapes

    seen = []
    render = shapes.render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "render", lambda d, s, t, size: seen.append((s, t)) or render(d, s, t, size))
        labels = Shapes(8, label).read(Path(), "val").labels
    outlines, textures = (torch.cat(column) for column in zip(*seen, strict=True))
    drawn = textures if label == "texture" else outlines
    other = outlines if label == "texture" else textures
    assert drawn.equal(labels)
    agreement = (other == labels).float().mean()
    assert agreement == 1 if label == "both" else abs(agreement - 1 / 8) < 0.03


def test_textures_differ_in_their_surface() -> None:
    from common.data.shapes import DRAWS, TEXTURES, render

    draws = torch.full((8, DRAWS), 0.4)
    pictures = render(draws, torch.full((8,), 2), torch.arange(8), 64)
    inside = pictures[:, :, 24:40, 20:36].flatten(1).float()
    assert len(TEXTURES) == 8 and inside[0].view(3, -1).std(1).max() == 0  # plain
    assert (inside[1:].view(7, 3, -1).std(2) > 10).all()
    assert (torch.cdist(inside, inside, p=1) / inside.shape[1] + 99 * torch.eye(8)).min() > 10


def test_cues_conflict() -> None:
    conflict = Shapes(16, "both").cue_conflict(560)
    assert (conflict.shapes != conflict.textures).all() and conflict.images.shape == (560, 3, 16, 16)
    pairs = torch.stack([conflict.shapes, conflict.textures], 1).unique(dim=0, return_counts=True)
    assert len(pairs[0]) == 56 and pairs[1].unique().tolist() == [10]


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for name in ("train/cat/1.jpg", "train/dog/2.PNG", "train/dog/notes.txt", "val/dog/3.jpeg"):
        archives.picture(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("")
    source = ImageFolder(str(tmp_path))
    assert source.class_names(Path()) == ["cat", "dog"]
    train, val = source.read(Path(), "train"), source.read(Path(), "val")
    assert [Path(file).name for file in train.images] == ["1.jpg", "2.PNG"] and train.labels.tolist() == [0, 1]
    assert val.labels.tolist() == [1] and source.read(Path(), "test").images == val.images
    assert describe(source, Path())[1:3] == ["  train: 2 images, 1 a class", "  val: 1 images, 0 to 1 a class"]
    archives.picture(tmp_path / "val/wolf/4.jpg")
    with pytest.raises(InputError, match="wolf: not one of the 2 classes"):
        source.read(Path(), "val")
    (tmp_path / "train/emu").mkdir()
    with pytest.raises(InputError, match="emu: holds no images"):
        source.read(Path(), "train")


def test_train_is_a_split_and_no_class(tmp_path: Path) -> None:
    """Pictures without classes in train and test1 are no two classes, as those of a Kaggle contest would be."""
    for name in ("test1/1.jpg", "train/2.jpg"):
        archives.picture(tmp_path / name)
    with pytest.raises(InputError, match="train: holds no class folders; .*, where no class is called train"):
        ImageFolder(str(tmp_path)).class_names(Path())


def test_a_folder_without_splits_is_dealt_out_for_good(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.jpg").touch()
    source = ImageFolder(str(tmp_path))
    before = {split: set(source.read(Path(), split).images) for split in SPLITS}
    assert sum(map(len, before.values())) == len(set.union(*before.values())) == 300
    assert len(before["train"]) == pytest.approx(240, abs=25) and min(map(len, before.values())) > 15
    for i in range(300, 330):
        (tmp_path / "a" / f"{i}.jpg").touch()
    assert all(before[split] <= set(source.read(Path(), split).images) for split in SPLITS)


def test_imagenet_and_its_flat_val(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n03995372"):
        archives.picture(tmp_path / "imagenet/train" / wnid / f"{wnid}_1.JPEG")
    names = {f"ILSVRC2012_val_{i:08d}": ["n03995372", "n01440764"][i % 2] for i in range(4)}
    for name in names:
        archives.picture(tmp_path / "imagenet/val" / f"{name}.JPEG")
    with pytest.raises(InputError, match="lie flat") as caught:
        ImageNet().read(tmp_path, "val")
    # The command that the message gives mends it, given the published list.
    rows = "".join(f"{name},{wnid} 85 1 499 272 \n" for name, wnid in names.items())
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    subprocess.run(["bash", "-c", str(caught.value).partition("run: ")[2]], cwd=tmp_path, check=True)
    val = ImageNet().read(tmp_path, "val")
    assert {Path(file).stem: ["n01440764", "n03995372"][label]
            for file, label in zip(val.images, val.labels.tolist(), strict=True)} == names
    assert ImageNet().read(tmp_path, "test").images == val.images
    assert describe(ImageNet(), tmp_path)[0] == (
        "imagenet: 2 classes, 3 channel(s); 1000 expected; test is val"
    )


def test_flowers_official_split(tmp_path: Path) -> None:
    folder = archives.flowers102(tmp_path, [102, 5, 1, 77, 3, 9], train=[6, 1], val=[2], test=[3, 4, 5])
    train = Flowers102().read(tmp_path, "train")
    assert [Path(f).name for f in train.images] == ["image_00006.jpg", "image_00001.jpg"]
    assert train.labels.tolist() == [8, 101]
    assert Flowers102().read(tmp_path, "test").labels.tolist() == [0, 76, 2]
    data = (folder / "setid.mat").read_bytes()
    (folder / "setid.mat").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="setid.mat: truncated"):
        Flowers102().read(tmp_path, "train")
    (folder / "setid.mat").write_bytes(data)
    (folder / "jpg/image_00002.jpg").unlink()
    with pytest.raises(InputError, match="image_00002.jpg: no such file"):
        Flowers102().read(tmp_path, "val")


def test_what_is_missing_is_said_with_its_layout(tmp_path: Path) -> None:
    assert "  train: 1197 images, 116 to 122 a class" in describe(Digits(), tmp_path)
    for source, layout in [(Cifar10(), "cifar-10-batches-bin"), (Cifar100(), "cifar-100-python.tar.gz"),
                           (Flowers102(), "imagelabels.mat"), (ImageNet(), "{train,val}/WNID/*.JPEG")]:
        with pytest.raises(InputError, match=re.escape(layout)) as refusal:
            describe(source, tmp_path)
        assert str(refusal.value).startswith(str(tmp_path))


def test_decoding_equals_pil(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    pictures = {"rgb.png": Image.fromarray(pixels), "grey.png": Image.fromarray(pixels[..., 0]),
                "alpha.png": Image.fromarray(np.dstack([pixels, pixels[..., 0]])),
                "cmyk.jpg": Image.new("CMYK", (9, 7), (10, 200, 30, 0))}  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert np.abs(decode(str(tmp_path / name), 3).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1, name
    assert decode(str(tmp_path / "grey.png"), 1)[0].numpy().tolist() == pixels[..., 0].tolist()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert decode(str(tmp_path / "deep.png"), 1)[0].numpy().tolist() == pixels[..., 0].tolist()


def test_an_unreadable_image_is_named_in_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    for name, data in [("cut.jpg", buffer.getvalue()[:900]), ("empty.jpg", b""), ("text.jpg", b"no picture" * 50)]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"^\S*{name}: not a readable image \(.+\)$") as caught:
            decode(str(tmp_path / name), 3)
        assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)
    with pytest.raises(InputError, match=r"absent.jpg: not a readable image \(No such file or directory\)"):
        decode(str(tmp_path / "absent.jpg"), 3)


def test_a_file_that_may_not_be_read_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision says then, has a place of its source in it."""
    def refuse(*_, **__) -> None:
        raise RuntimeError('read_file, /x/read_write_file.cpp:36, ("", stack.data()) API call failed')

    def closed(file: str, mode: str) -> None:
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr("torchvision.io.decode_image", refuse)
    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(InputError, match=r"^a.jpg: not a readable image \(Permission denied\)$"):
        decode("a.jpg", 3)

"""NYU-Depth-v2 in files of the published layout: MATLAB arrays (480, 640, 3, N) and (480, 640, N), 1-based splits."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import archives
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from common.data.loader import Draw
from common.errors import InputError
from common.training.optim import Recipe
from supervised.depth import Depth
from supervised.depth_data import DepthData, DepthSet
from supervised.nyu import Nyu

N = 5


def matlab_arrays() -> tuple[np.ndarray, np.ndarray]:
    """As MATLAB indexes them: images (row, column, channel, n), depths (row, column, n); a pixel is 10 n + channel."""
    images = np.zeros((480, 640, 3, N), dtype=np.uint8)
    images[:] = 10 * np.arange(N) + np.arange(3)[:, None]
    depths = np.ones((480, 640, N), dtype=np.float32) * (1 + np.arange(N, dtype=np.float32))
    images[100, 200, 1, 2], depths[100, 200, 2] = 255, 0.0
    return images, depths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    archives.nyu_depth_v2(tmp_path, *matlab_arrays(), train=[3, 1], test=[2, 4, 5])
    return tmp_path


def write_list(root: Path, lines: list[str], name: str = "list.txt") -> str:
    (root / "nyu_depth_v2" / name).write_text("\n".join(lines) + "\n")
    return name


def write_pair(root: Path, name: str = "kitchen/1", depth: np.ndarray | None = None) -> None:
    path = root / "nyu_depth_v2" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 480), (10, 20, 30)).save(f"{path}.jpg", quality=95)
    depth = np.full((480, 640), 2345, dtype=np.uint16) if depth is None else depth
    Image.fromarray(depth).save(f"{path}.png")


def test_labelled_frames_are_upright_and_follow_the_one_based_split(root):
    train, test = (Nyu().frames(split, root) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 3)
    image, depth = train[0]  # MATLAB's image 3
    assert image.shape == (3, 480, 640) and image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [20, 21, 22] and image[1, 100, 200] == 255
    assert depth.shape == (1, 480, 640) and depth[0, 100, 200] == 0 and depth[0, 0, 0] == 3.0
    assert [float(test[i][1][0, 0, 0]) for i in range(3)] == [2.0, 4.0, 5.0]


def test_validation_is_the_test_split(root):
    val, test = (Nyu().frames(split, root) for split in ("val", "test"))
    assert torch.equal(val.indices, test.indices)


def test_frames_travel_to_a_loader_process(root):
    frames = Nyu().frames("train", root)
    copy = pickle.loads(pickle.dumps(frames))
    assert torch.equal(copy[1][0], frames[1][0])


def test_training_sees_the_inside_of_the_frame_and_evaluation_all(root):
    source = Nyu()
    images, _ = matlab_arrays()
    images[:45, :, :, 2] = 255  # the blank frame above MATLAB's image 3
    with h5py.File(root / "nyu_depth_v2" / "nyu_depth_v2_labeled.mat", "r+") as file:
        file["images"][...] = images.T
    draw = [Draw(0, 0, 0)]
    frames = source.frames("train", root)
    evaluated = DepthSet(frames, (48, 64)).__getitems__(draw)
    assert evaluated["image"].shape == (1, 3, 48, 64) and evaluated["depth"].shape == (1, 1, 480, 640)
    assert evaluated["image"][0, 0, 0].mean() > 0.9
    for epoch in range(4):
        batch = DepthSet(frames, (48, 64), source.training_crop, seed=0).__getitems__([Draw(epoch, 0, 0)])
        assert batch["depth"].shape == (1, 1, 48, 64) and batch["image"].max() < 0.2


def test_augmentation_depends_on_seed_epoch_and_index_alone(root):
    frames = Nyu().frames("train", root)
    one, other = DepthSet(frames, (48, 64), seed=1), DepthSet(frames, (48, 64), seed=2)
    alone = one.__getitems__([Draw(7, 1, 0)])
    together = one.__getitems__([Draw(7, 0, 3), Draw(7, 1, 9)])
    assert torch.equal(alone["image"][0], together["image"][1])
    ours, theirs = ([each.__getitems__([Draw(epoch, 1, 0)])["image"] for epoch in range(4)] for each in (one, other))
    assert len({image.sum().item() for image in ours}) > 2
    assert not all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_training_has_the_border_crop_and_evaluation_eigen_s(root):
    """As those who train and evaluate on NYU cut; and images are normalised by ImageNet's numbers."""
    data = DepthData(Nyu(), (48, 64), 16, root=str(root))
    data.trainer = SimpleNamespace(seed=0)
    kept, trained = torch.zeros(480, 640), torch.zeros(480, 640)
    kept[Depth(Recipe(lr=1.0)).metrics(data)["full"].crop] = 1
    assert kept.sum() == 426 * 560 and kept[45, 41] == 1 and kept[470, 600] == 1
    trained[data.load("train").crop] = 1
    assert trained.sum() == 427 * 565 and trained[45, 43] == 1 and trained[471, 607] == 1
    assert data.load("val").crop is None
    colour = torch.tensor([0.485 + 0.229, 0.456, 0.406 - 2 * 0.225]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    normalised = data.on_after_batch_transfer({"image": colour}, 0)["image"]
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor([1.0, 0.0, -2.0]), atol=1e-5, rtol=0)


def test_lists_read_millimetres_and_take_leading_slashes_and_focal_lengths(root):
    write_pair(root)
    frames = Nyu(train_list=write_list(root, ["/kitchen/1.jpg /kitchen/1.png 518.8579", ""])).frames("train", root)
    image, depth = frames[0]
    assert len(frames) == 1 and image[:, 5, 5].tolist() == pytest.approx([10, 20, 30], abs=2)
    assert depth.shape == (1, 480, 640) and depth.unique().tolist() == pytest.approx([2.345])
    assert len(Nyu(train_list="list.txt").frames("test", root)) == 3  # the labelled file's


def test_describe_counts_each_split(root):
    lines = Nyu().describe(root)
    assert any("train: 2 images" in line for line in lines) and any("test: 3 images" in line for line in lines)


@pytest.mark.parametrize(("lines", "message"), [
    (["kitchen/1.jpg kitchen/2.png"], r"list.txt, line 1: .*2\.png does not exist"),
    (["kitchen/1.jpg"], "line 1: 'kitchen/1.jpg' does not name an image and a depth map"),
    ([""], "names no images"),
])  # fmt: skip
def test_lists_that_lead_nowhere_are_named(root, lines, message):
    write_pair(root)
    with pytest.raises(InputError, match=message):
        Nyu(train_list=write_list(root, lines)).frames("train", root)


@pytest.mark.parametrize(("depth", "message"), [
    (np.full((480, 640), 7, dtype=np.uint8), "16-bit PNG in millimetres"),
    (np.full((240, 320), 7, dtype=np.uint16), r"1\.png: has .* \(1, 240, 320\), not \(1, 480, 640\)"),
])  # fmt: skip
def test_depth_maps_of_another_kind_are_refused(root, depth, message):
    write_pair(root, depth=depth)
    frames = Nyu(train_list=write_list(root, ["kitchen/1.jpg kitchen/1.png"])).frames("train", root)
    with pytest.raises(InputError, match=message):
        frames[0]


def test_an_unreadable_image_is_named(root):
    write_pair(root)
    path = root / "nyu_depth_v2" / "kitchen" / "1.jpg"
    path.write_bytes(path.read_bytes()[:100])
    frames = Nyu(train_list=write_list(root, ["kitchen/1.jpg kitchen/1.png"])).frames("train", root)
    with pytest.raises(InputError, match=r"1\.jpg: not readable as an image"):
        frames[0]


@pytest.mark.parametrize("name", ["nyu_depth_v2_labeled.mat", "splits.mat"])
def test_missing_and_truncated_files_are_named(root, name):
    path = root / "nyu_depth_v2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"{name}: .*(damaged)"):
        Nyu().frames("train", root)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: not found; "):
        Nyu().frames("train", root)


def test_a_split_beyond_the_file_is_refused(root):
    savemat(root / "nyu_depth_v2" / "splits.mat", {"trainNdxs": np.array([[N + 1]]), "testNdxs": np.array([[1]])})
    with pytest.raises(InputError, match=f"has {N} images, but splits.mat names number {N + 1}"):
        Nyu().frames("train", root)

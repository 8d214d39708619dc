"""The store of shrunk training images: what it holds, what its crops are worth, and how it survives."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import archives
import numpy as np
import pytest
import torch
from forked import run
from PIL import Image

from common.data import Digits, Flowers102, ImageFolder, ImageNet
from common.data.augment import Augment
from common.data.crop import Boxes, stretched
from common.data.folders import decode
from common.data.loader import Draw
from common.data.preparation import TrainingPreparation
from common.data.sets import StoredSet
from common.data.store import differences, main, make
from common.data.stored import Store, location
from common.errors import InputError

SIZE = 24
IMAGENET28 = Path(__file__).parents[2] / "supervised" / "configs" / "imagenet28.yaml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Smooth pictures of several shapes: what a store loses of them is little."""
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            height, width = (40 + 10 * i, 60) if i % 2 else (48, 70 + 5 * i)
            y, x = np.mgrid[:height, :width] / 30
            picture = np.stack([np.sin(x + i) * np.cos(y), np.sin(y - i), np.cos(x * y / 3)], -1) * 100 + 128
            file = tmp_path / "imagenet" / split / f"n{i % 2:08d}" / f"{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(file, quality=98)
    return tmp_path


def store_of(root: Path) -> tuple[Store, list[str]]:
    files, labels = ImageNet().read(root, "train")
    return Store(location(ImageNet(), root, SIZE), files, labels), files


def test_it_holds_every_image_stretched_by_pillow_s_filter(root):
    assert make(ImageNet(), root, SIZE, workers=1) == root / f"imagenet-{SIZE}"
    store, files = store_of(root)
    images, shapes = store.take(range(len(files)))
    for image, shape, file in zip(images, shapes, files, strict=True):
        picture = Image.open(file).convert("RGB")
        expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 2  # decoders round otherwise
        assert shape.tolist() == [picture.height, picture.width]


def test_a_device_is_given_all_of_it_shard_by_shard(root, monkeypatch):
    monkeypatch.setattr("common.data.store.SHARD", 4)
    make(ImageNet(), root, SIZE, workers=1)
    store, files = store_of(root)
    assert len(store.shards) == 2 and store.nbytes == len(files) * 3 * SIZE**2
    assert store.images(torch.device("cpu")).equal(store.take(range(len(files)))[0])


def test_crops_are_those_of_the_files_and_mirrored_alike(root):
    make(ImageNet(), root, SIZE, workers=1)
    store, files = store_of(root)
    augment = Augment(crop_scale=(0.3, 1.0), interpolation="bicubic", flip=0.5)
    index = torch.arange(6).repeat(20)
    draws = augment.draws(3, 1, torch.arange(120))
    images, shapes = store.take(index.tolist())
    ours = augment.place_squares(images, shapes, draws, (8, 8)) * 255
    theirs = augment.place_each([decode(files[i], 3) for i in index], draws, (8, 8))
    assert (ours - theirs).abs().mean() < 1.0
    whole = Augment(interpolation="bicubic")
    ours = whole.place_squares(*store.take(range(6)), draws[:6], (8, 8)) * 255
    theirs = whole.place_each([decode(file, 3) for file in files], draws[:6], (8, 8))
    assert (ours - theirs).abs().mean() < 1.0
    assert 0 < differences(store, files, 3)["mean"] < 2


def test_boxes_are_stretched_with_the_image_and_stay_inside():
    """By hand: half of the height of 100x50 in a square of 10 is five rows; a sliver is no less than a pixel."""
    boxes = Boxes(*(torch.tensor(values) for values in ([50, 99], [10, 0], [50, 1], [20, 50])))
    found = torch.stack(stretched(boxes, torch.tensor([[100, 50], [100, 50]]), 10), 1)
    assert torch.allclose(found, torch.tensor([[5.0, 2.0, 5.0, 4.0], [9.0, 0.0, 1.0, 10.0]]))


def test_training_reads_the_store_and_validation_the_files(root, command):
    make(ImageNet(), root, SIZE, workers=1)
    options = ["--data.root", root, "--data.image_size", "8", "--data.batch_size", "4", "--data.workers", "0",
               "--model.patch_size", "2", "--trainer.max_epochs", "1", "--model.optim.warmup_epochs", "0",
               "--trainer.log_every_n_steps", "1", "--trainer.precision", "32-true", "--model.size",
               "nano"]  # fmt: skip
    losses = {}
    for name, more in [("files", []), ("store", ["--data.store", SIZE]),
                       ("in batches", ["--data.store", SIZE, "--data.augment.rand_augment", "null"]),
                       ("held", ["--data.store", SIZE, "--data.augment.rand_augment", "null", "--data.on_device",
                                 "true"])]:  # fmt: skip
        outcome = command("fit", "--run_name", name, *options, *more, config=IMAGENET28, small=False)
        assert outcome.code == 0, outcome.err
        results = json.loads((root / "runs" / "supervised" / name / "results.json").read_text())
        losses[name] = results["metrics"]["train/loss"]
    # RandAugment draws by image: the first two see the same pictures, but for the blur.
    assert losses["store"] == pytest.approx(losses["files"], abs=0.05) and losses["store"] != losses["files"]
    assert losses["held"] == losses["in batches"]  # the device has the whole store, and the loader sends indices
    for shard in (root / f"imagenet-{SIZE}").glob("*.npy"):
        shard.unlink()
    outcome = command("validate", "--run_name", "store", *options, "--data.store", SIZE, config=IMAGENET28, small=False)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("text", [None, "rand-m9-mstd0.5-inc1"])
def test_a_loader_s_process_prepares_what_the_device_cannot(root, text):
    """Segments are cut there, after the crop; RandAugment draws by image, whatever the batch."""
    make(ImageNet(), root, SIZE, workers=1)
    augment = Augment(crop_scale=(0.3, 1.0), interpolation="bicubic", rand_augment=text)
    prepare = TrainingPreparation(augment, (8, 8), 0, (0.5,))
    stored = StoredSet(store_of(root)[0], prepare)
    draws = [Draw(1, index, 0) for index in range(6)]
    batch = stored.__getitems__(draws)
    assert batch["image"].shape == (6, 3, 8, 8) and batch["image"].dtype == torch.uint8 and "shape" not in batch
    again = torch.cat([stored.__getitems__([draw])["image"] for draw in draws])
    assert torch.equal(batch["image"], again)
    plain = StoredSet(stored.store).__getitems__(draws)
    crops = augment.place_squares(plain["image"], plain["shape"], augment.draws(0, 1, torch.arange(6)), (8, 8)) * 255
    assert torch.equal(batch["image"], crops.round().byte()) is (text is None)


def test_it_goes_on_where_it_stopped_and_notices_damage(root, capsys, monkeypatch):
    monkeypatch.setattr("common.data.store.SHARD", 2)
    folder = make(ImageNet(), root, SIZE, workers=1)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert len(times) == 6  # three shards, and the shapes of each
    gone = folder / "00001.npy"
    gone.unlink()
    make(ImageNet(), root, SIZE, workers=1)
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {
        gone, folder / "00001-shapes.npy"}
    assert store_of(root)[0].take([0, 3, 5])[0].shape == (3, 3, SIZE, SIZE)
    data = bytearray(gone.read_bytes())
    data[-1] ^= 1
    gone.write_bytes(data)
    with pytest.raises(InputError, match="00001.npy: damaged; remove it"):
        make(ImageNet(), root, SIZE, workers=1)
    gone.unlink()
    make(ImageNet(), root, SIZE, workers=1)
    shapes = folder / "00002-shapes.npy"
    data = bytearray(shapes.read_bytes())
    data[-8] ^= 1
    shapes.write_bytes(data)
    with pytest.raises(InputError, match="00002.npy: damaged; remove it"):
        make(ImageNet(), root, SIZE, workers=1)
    gone.write_bytes(b"")
    with pytest.raises(InputError, match="00001.npy: damaged"):
        store_of(root)


@pytest.fixture
def interrupted(root, monkeypatch):
    """The first of three shards: an image of the second could not be read, and is mended by now."""
    monkeypatch.setattr("common.data.store.SHARD", 2)
    image = root / "imagenet" / "train" / "n00000000" / "4.JPEG"
    data = image.read_bytes()
    image.write_bytes(b"no image")
    with pytest.raises(InputError, match="4.JPEG: not a readable image"):
        make(ImageNet(), root, SIZE, workers=1)
    image.write_bytes(data)
    folder = location(ImageNet(), root, SIZE)
    assert (folder / "00000.npy").is_file() and not (folder / "00001.npy").exists()
    return folder


def test_an_interrupted_store_keeps_its_shards(root, interrupted):
    first = [interrupted / "00000.npy", interrupted / "00000-shapes.npy"]
    times = [path.stat().st_mtime_ns for path in first]
    make(ImageNet(), root, SIZE, workers=1)
    assert [path.stat().st_mtime_ns for path in first] == times
    assert {path.name for path in interrupted.iterdir()} == {
        "started.json", "index.json", *(f"0000{n}{part}.npy" for n in range(3) for part in ("", "-shapes"))}
    assert len(json.loads((interrupted / "index.json").read_text())["checksums"]) == 3
    make(ImageNet(), root, SIZE, workers=1)


@pytest.mark.parametrize("name", ["00000.npy", "00000-shapes.npy", "00000-checksum.npy"])
def test_damage_before_the_store_is_finished_is_no_truth(root, interrupted, name):
    damaged = interrupted / name
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputError, match="00000.npy: damaged; remove it"):
        make(ImageNet(), root, SIZE, workers=1)
    assert not (interrupted / "index.json").exists()
    (interrupted / "00000.npy").unlink()
    make(ImageNet(), root, SIZE, workers=1)
    assert len(store_of(root)[0]) == 6


def test_a_shard_without_its_checksum_is_written_anew(root, interrupted):
    (interrupted / "00000-checksum.npy").unlink()
    shard = interrupted / "00000.npy"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    make(ImageNet(), root, SIZE, workers=1)
    assert shard.read_bytes() == good


# Before each rename and removal: started.json; of two shards what lay there before, and three files; the index; and two
# checksums that it holds by then.
@pytest.mark.parametrize("step", range(12))
def test_it_may_be_killed_at_any_moment(root, monkeypatch, step):
    monkeypatch.setattr("common.data.store.SHARD", 3)
    moments = itertools.count()

    def dying(method):
        def call(*arguments, **options):
            if next(moments) >= step:
                raise KeyboardInterrupt
            return method(*arguments, **options)

        return call

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, dying(getattr(Path, name)))
        make(ImageNet(), root, SIZE, workers=1)
    folder = location(ImageNet(), root, SIZE)
    times = {shard: shard.stat().st_mtime_ns for shard in folder.glob("0000?.npy")}
    make(ImageNet(), root, SIZE, workers=1)
    assert {shard: shard.stat().st_mtime_ns for shard in times} == times  # what was whole stays
    assert len(store_of(root)[0].images(torch.device("cpu"))) == 6 and not list(folder.glob("*-checksum.npy"))


def test_a_store_of_other_images_is_refused(root):
    folder = make(ImageNet(), root, SIZE, workers=1)
    (root / "imagenet" / "train" / "n00000000" / "0.JPEG").unlink()
    with pytest.raises(InputError, match="made of other images than those that lie there now"):
        store_of(root)
    with pytest.raises(InputError, match=f"{folder}: is a store of other images"):
        make(ImageNet(), root, SIZE, workers=1)


def test_an_unreadable_image_is_named_and_the_store_is_not_finished(root):
    (root / "imagenet" / "train" / "n00000000" / "2.JPEG").write_bytes(b"no image")
    with pytest.raises(InputError, match="2.JPEG: not a readable image"):
        make(ImageNet(), root, SIZE, workers=1)
    with pytest.raises(InputError, match="is no finished store"):
        store_of(root)


@pytest.mark.parametrize("content", ["{", "[]", "{}", ""])
def test_a_damaged_index_is_named(root, content):
    index = make(ImageNet(), root, SIZE, workers=1) / "index.json"
    index.write_text(content)
    for use in (lambda: store_of(root), lambda: make(ImageNet(), root, SIZE, workers=1)):
        with pytest.raises(InputError, match=rf"{index}: damaged.* remove it, and"):
            use()


@pytest.mark.parametrize("shape", [(6, 3, 2 * SIZE, 2 * SIZE), (5, 3, SIZE, SIZE)])
def test_a_shard_of_other_images_is_refused(root, shape):
    shard = make(ImageNet(), root, SIZE, workers=1) / "00000.npy"
    np.save(shard, np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=f"{shard}: damaged, uint8 of "):
        store_of(root)


def test_a_second_command_waits_for_the_first(root):
    """And removes what one that was killed has left half-written."""
    leftover = location(ImageNet(), root, SIZE) / "00000.npy.1.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    words = [sys.executable, "-m", "common.data.store", "imagenet", "--size", str(SIZE), "--root", str(root),
             "--workers", "1"]  # fmt: skip
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "all checksums hold" in out, err
    assert not leftover.exists() and len(store_of(root)[0]) == 6


def test_its_processes_end_with_one_that_is_killed(tmp_path):
    code = ("import os, time; from common.data.store import processes\n"
            "if __name__ == '__main__':\n"
            "    pool = processes(2)\n"
            "    print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)\n"
            "    time.sleep(100)")
    (tmp_path / "pool.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True,
                              env=environment)  # fmt: skip
    workers = list(map(int, killed.stdout.readline().split()))
    assert workers and all(map(alive, workers))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    until = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(process: int) -> bool:
    """Neither gone nor waiting to be fetched."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("options, message", [
    (["--data.store", "0"], "data.store: 0 is not a side in pixels"),
    (["--data.store", "96", "--data.augment.interpolation", "nearest"], "data.store: nearest needs the files' own"),
    (["--data.store", "96"], "imagenet-96 is no finished store; python -m common.data.store writes it"),
])
def test_mistakes_are_told(root, command, options, message):
    outcome = command("fit", "--data.root", root, "--data.workers", "0", *options, config=IMAGENET28, small=False)
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("error:") == 1


def test_what_is_in_memory_needs_no_store(tmp_path):
    with pytest.raises(InputError, match="digits: its images are held in memory"):
        make(Digits(), tmp_path, SIZE, workers=1)


def test_the_command_tells_what_it_made(root):
    done = run("common.data.store", "imagenet", "--size", SIZE, "--root", root, "--workers", "2")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "6 images" in done.stdout and f"Train with --data.store {SIZE}" in done.stdout
    off = re.search(r"differ from the files' by (\S+) of 255 in the mean, (\d+) at most", done.stdout)
    assert 0 < float(off[1]) < 2 < float(off[2])
    assert "shard 1 of 1" in done.stderr


def test_several_processes_write_what_one_does(root, monkeypatch):
    monkeypatch.setattr("common.data.store.SHARD", 2)
    written = []
    for workers in (1, 2):
        folder = make(ImageNet(), root, SIZE, workers)
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
        shutil.rmtree(folder)
    assert written[0] == written[1] and sum(name.endswith(".npy") for name in written[0]) >= 3


def test_other_sources(tmp_path, capsys):
    archives.flowers102(tmp_path, range(95, 103), train=[1, 2, 3, 4], val=[5, 6], test=[7, 8], size=(60, 45))
    folder = make(Flowers102(), tmp_path, SIZE, workers=1)
    assert folder == tmp_path / f"flowers102-{SIZE}"
    source = ImageFolder(str(tmp_path / "flowers-102"))
    assert location(source, tmp_path, 8) == tmp_path / "flowers-102-8"
    with pytest.raises(InputError, match="--size 0: give 1 or more"):
        main(["imagenet", "--size", "0"])

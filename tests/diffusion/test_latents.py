"""Cached latents: the same batches as images encoded as they come, and refusals of what does not belong together."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forked import Command
from PIL import Image

from common.data import Augment, Digits, ImageFolder, Shapes
from common.data.loader import Draw
from common.data.sources import Source
from common.errors import InputError
from common.lock import alone
from common.randomness import normal
from diffusion import DiT, LatentData, latent_data
from diffusion import latents as latents_room
from diffusion.autoencoder import Autoencoder
from diffusion.latent_set import LatentSet
from diffusion.latents import main
from diffusion.process import GaussianDiffusion
from diffusion.published import load_autoencoder
from diffusion.samples import as_pixels
from diffusion.sampling import Sampler

DIGITS = Path(__file__).parents[2] / "diffusion" / "configs" / "digits.yaml"
CHOSEN = [0, 9, 4, 250, 77, 3, 12, 100]
IMAGES = ["--data.image_size", "8", "--data.augment.interpolation", "bilinear"]
OPTIONS = {"image_channels": 1, "channels": 2, "base": 8, "multipliers": (1, 1), "res_blocks": 1, "groups": 4,
           "codebook_size": 16, "attention": "none"}  # fmt: skip


def save(path: Path, kind: str, seed: int = 0, image_channels: int = 1) -> Path:
    """An autoencoder in the form in which a run's checkpoint holds one."""
    torch.manual_seed(seed)
    net = Autoencoder(kind=kind, **OPTIONS | {"image_channels": image_channels})
    net.measure([net.moments(torch.randn(32, image_channels, 8, 8))])
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"autoencoder": net.config, "state_dict": state, "loops": {}}, path)
    return path


def encode(folder: Path, autoencoder: Path, *more: str) -> int:
    return main([str(folder), "--config", str(DIGITS), "--data.autoencoder", str(autoencoder), *IMAGES, *more])


def batches(
    autoencoder: Path, latents: Path | None, epoch: int, split: str = "train", flip: float = 0.5, seed: int = 3
) -> dict[str, torch.Tensor]:
    """What a model is given of a few images."""
    data = attached(autoencoder, latents, split, flip, seed)
    draws = [Draw(epoch, index, place) for place, index in enumerate(CHOSEN)]
    return data.on_after_batch_transfer(data.sets[split].__getitems__(draws), 0)


def attached(autoencoder: Path, latents: Path | None, split: str, flip: float, seed: int) -> LatentData:
    data = LatentData(Digits(), 8, 128, augment=Augment(flip=flip), autoencoder=str(autoencoder),
                      latents=str(latents) if latents else None)  # fmt: skip
    data.trainer = SimpleNamespace(seed=seed, training=split == "train", predicting=False,
                                   strategy=SimpleNamespace(root_device=torch.device("cpu")))
    data.load_autoencoder()
    data.sets[split] = data.load(split)
    return data


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_cached_latents_are_those_of_images_encoded_as_they_come(tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(latents_room, "SHARD", 100)  # 12 shards
    autoencoder = save(tmp_path / "autoencoder.ckpt", kind)
    assert encode(tmp_path / "latents", autoencoder, "--data.augment.flip", "0.5") == 0
    for split, epochs in [("train", (0, 1)), ("val", (0,))]:
        for epoch in epochs:
            cached = batches(autoencoder, tmp_path / "latents", epoch, split)
            fresh = batches(autoencoder, None, epoch, split)
            assert cached.keys() == fresh.keys() and cached["image"].shape == (8, 2, 4, 4)
            for name, value in fresh.items():
                torch.testing.assert_close(cached[name], value, atol=1e-5, rtol=1e-4)
    shards = attached(autoencoder, tmp_path / "latents", "train", 0.5, seed=3).sets["train"].shards
    assert len(shards) == 12 and all(isinstance(shard, np.memmap) for shard in shards)
    first, second = (batches(autoencoder, tmp_path / "latents", epoch)["image"] for epoch in (0, 1))
    assert not torch.equal(first, second)  # flips


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_what_a_model_generates_is_decoded_as_what_it_was_given_was_encoded(tmp_path: Path, kind: str) -> None:
    """A model that gave back the latents would give the autoencoder's own reconstructions, whatever the scale."""
    file = save(tmp_path / "autoencoder.ckpt", kind)
    content = torch.load(file, weights_only=False)
    content["state_dict"] |= {"net.scale": torch.tensor(3.0), "net.shift": torch.full((2, 1, 1), 0.5)}
    torch.save(content, file)
    net, data = load_autoencoder(str(file)), attached(file, None, "train", 0.0, seed=3)
    images = Digits().read(Path(), "train").images[torch.tensor(CHOSEN)].float() / 127.5 - 1
    noise = normal("latent", 3, 1, torch.tensor(CHOSEN), n=2 * 4 * 4).view(8, 2, 4, 4) if kind == "kl" else None
    with torch.no_grad():
        expected = net.decode(net.sample(net.moments(images), noise))
    torch.testing.assert_close(data.decode(batches(file, None, 1, flip=0.0)["image"]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_an_image_is_a_function_of_its_number_behind_an_autoencoder_too(tmp_path: Path, kind: str) -> None:
    """VQ's decoder is given the nearest codes, which rounding in another batch might change."""
    data = attached(save(tmp_path / "autoencoder.ckpt", kind), None, "train", 0.0, 0)
    torch.manual_seed(0)
    net = DiT(4, 1, 2, 3, width=16, depth=2, heads=2).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sampler = Sampler(GaussianDiffusion(), "ddim", 12, guidance=1.5)

    def drawn(numbers: torch.Tensor) -> torch.Tensor:
        return as_pixels(data.decode(sampler(net, numbers, numbers % 3))).int()

    whole = drawn(torch.arange(64))
    assert len(whole.flatten(1).unique(dim=0)) == 64
    for numbers in ([6, 2], [0, 1, 5], [63]):
        assert (drawn(torch.tensor(numbers)) - whole[numbers]).abs().max() <= 1  # a level of grey


def test_kl_latents_are_drawn_anew_in_every_epoch(tmp_path: Path) -> None:
    """The posterior's mean and deviation times standard normal draws, by seed, epoch and index."""
    file = save(tmp_path / "autoencoder.ckpt", "kl")
    net = load_autoencoder(str(file))
    images = Digits().read(Path(), "train").images[torch.tensor(CHOSEN)].float() / 127.5 - 1
    with torch.no_grad():
        mean, log_variance = net.moments(images).chunk(2, dim=1)
    for epoch in (0, 1):
        latents = net.denormalise(batches(file, None, epoch, flip=0.0)["image"])
        drawn = (latents - mean) / (log_variance / 2).exp()
        expected = normal("latent", 3, epoch, torch.tensor(CHOSEN), n=2 * 4 * 4).view(8, 2, 4, 4)
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


def test_runs_of_all_seeds_are_validated_on_the_same_kl_latents(tmp_path: Path) -> None:
    file = save(tmp_path / "autoencoder.ckpt", "kl")
    encode(tmp_path / "latents", file)
    for latents in (None, tmp_path / "latents"):
        for split, same in [("train", False), ("val", True)]:
            one, other = (batches(file, latents, 0, split, 0.0, seed)["image"] for seed in (3, 4))
            assert torch.equal(one, other) == same, (latents, split)


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(latents_room, "SHARD", 500)
    autoencoder = save(tmp_path / "autoencoder.ckpt", "vq")
    encode(tmp_path / "latents", autoencoder)
    whole = [np.load(path) for path in sorted((tmp_path / "latents/train").glob("0*.npy"))]
    assert [len(shard) for shard in whole] == [500, 500, 197] and whole[0].shape[1:] == (1, 2, 4, 4)
    kept = tmp_path / "latents/train/00000.npy"
    (tmp_path / "latents/train/index.json").unlink()
    (tmp_path / "latents/train/00001.npy").unlink()
    written = kept.stat().st_mtime_ns
    with pytest.raises(InputError, match="holds no finished train split"):
        batches(autoencoder, tmp_path / "latents", 0)
    encode(tmp_path / "latents", autoencoder)
    again = [np.load(path) for path in sorted((tmp_path / "latents/train").glob("0*.npy"))]
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))
    assert kept.stat().st_mtime_ns == written and "train: 1,000 of 1,197 images" in capsys.readouterr().out


# The command on small shards, which kills itself when it has written half of the file of this number, if any.
DYING = """
import os, signal, sys
from diffusion import latents
latents.SHARD, fsync, (half, *arguments), written = 25, os.fsync, sys.argv[1:], []
def dying(file):
    written.append(file)
    if len(written) == int(half):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = dying
latents.main(arguments)
"""


def start(folder: Path, autoencoder: Path, half: int = 0) -> Command:
    arguments = [folder, "--config", DIGITS, "--data.autoencoder", autoencoder, *IMAGES, "--data.augment.flip", "0.5"]
    (autoencoder.parent / "dying.py").write_text(DYING)
    return Command("dying", half, *arguments, cwd=autoencoder.parent)


def test_it_waits_for_another_that_writes_there(tmp_path: Path) -> None:
    """As two tasks of Slurm do: what takes long is done once."""
    autoencoder, folder = save(tmp_path / "autoencoder.ckpt", "vq"), tmp_path / "latents"
    with alone(folder):
        process = start(folder, autoencoder)
        while "waiting" not in process.stdout and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None and f"{folder}: waiting for process {os.getpid()} on " in process.stdout
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert process.wait() == 0 and (folder / "train/index.json").is_file(), process.stderr


def test_killed_at_any_moment_it_writes_the_same_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(latents_room, "SHARD", 25)  # 48 shards
    autoencoder = save(tmp_path / "autoencoder.ckpt", "kl")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    encode(whole, autoencoder, "--data.augment.flip", "0.5")

    process, deadline = start(folder, autoencoder), time.monotonic() + 120
    while not (folder / "train/00000.npy").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    assert process.returncode == -signal.SIGKILL
    done = len(list((folder / "train").glob("*.npy")))
    assert 1 <= done < 46

    # After started.json: of a shard, whose checksum is there, when one more is whole; then of a checksum.
    for half in (5, 4):
        process = start(folder, autoencoder, half)
        assert process.wait() == -signal.SIGKILL, process.stderr
        done += 1
        assert len(list((folder / "train").glob("*.npy"))) == done
    encode(folder, autoencoder, "--data.augment.flip", "0.5")
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == files
    assert not [name for name in files if (folder / name).read_bytes() != (whole / name).read_bytes()]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an autoencoder and its latents, three shards of them in training."""
    monkeypatch.setattr(latents_room, "SHARD", 500)
    encode(tmp_path / "latents", save(tmp_path / "autoencoder.ckpt", "vq"))
    return tmp_path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_values(path: Path) -> None:
    np.save(path, np.zeros_like(np.load(path)))


MISSING = [("00001.npy", Path.unlink), ("labels.npy", Path.unlink)]
DAMAGED = [
    ("00001.npy", truncate), ("00001.npy", fill(b"")), ("00001.npy", fill(b"garbage")), ("labels.npy", truncate),
    ("00002.npy", lambda path: path.write_bytes(path.with_name("labels.npy").read_bytes())),
    ("00001.npy", lambda path: np.save(path, np.load(path)[:, :, :1])),  # one channel, half of an image, mirror images
    ("00001.npy", lambda path: np.save(path, np.load(path)[..., :2])),
    ("00001.npy", lambda path: np.save(path, np.load(path).repeat(2, axis=1))),
    ("labels.npy", zero_values), ("labels.npy", lambda path: path.with_suffix(".crc32").unlink()),
    ("index.json", fill(b"garbage")), ("index.json", fill(b"\xff")), ("index.json", fill(b"{}")),
]  # fmt: skip


@pytest.mark.parametrize("name, harm", [*MISSING, *DAMAGED])
def test_damage_is_named(command: Callable, cache: Path, name: str, harm: Callable[[Path], Any]) -> None:
    harm(cache / "latents/train" / name)
    options = [*IMAGES, "--data.autoencoder", cache / "autoencoder.ckpt", "--data.latents", cache / "latents"]
    outcome = command("fit", *options, "--run_name", "a", config=DIGITS, study="diffusion")
    assert outcome.code == 2, outcome.err
    assert f"latents/train/{name}" in outcome.err and len(outcome.err.splitlines()) == 1


def read(source: Source, folder: Path) -> LatentSet:
    """The training latents in a folder, as those of a source."""
    data = LatentData(source, 8, 128, autoencoder=str(folder / "autoencoder.ckpt"), latents=str(folder / "latents"),
                      on_device=False)  # fmt: skip
    data.trainer = SimpleNamespace(seed=0)
    data.load_autoencoder()
    return data.load("train")


def written(source: Source, folder: Path) -> None:
    """Encodes a source's training images as the command does."""
    autoencoder = save(folder / "autoencoder.ckpt", "vq", image_channels=3)
    data = LatentData(source, 8, 128, autoencoder=str(autoencoder), on_device=False)
    latents_room.encode(data, False, folder / "latents", "train")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("harm", [
    zero, zero_values, truncate, fill(b""), lambda shard: shard.with_suffix(".crc32").unlink(),
    lambda shard: fill(b"\xff")(shard.with_suffix(".crc32")), lambda shard: zero(shard.with_suffix(".crc32")),
])  # fmt: skip
def test_the_command_refuses_a_damaged_shard(
    tmp_path: Path, harm: Callable[[Path], Any], finished: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(latents_room, "SHARD", 5)
    source, shard = Shapes(8, train=12), tmp_path / "latents/train/00001.npy"
    written(source, tmp_path)
    whole = shard.read_bytes()
    if not finished:
        for name in ("index.json", "00002.npy"):
            (shard.parent / name).unlink()
    harm(shard)
    with pytest.raises(InputError, match="train/00001.npy: damaged.*; remove it and run python -m diffusion.latents"):
        written(source, tmp_path)
    shard.unlink()
    capsys.readouterr()
    written(source, tmp_path)
    assert shard.read_bytes() == whole and len(read(source, tmp_path)) == 12
    assert f"train: shards that are there and whole: {1 + finished} of 3" in capsys.readouterr().out


def test_shards_are_on_the_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.fstat(file).st_size))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append(to.name) or replace(path, to))
    latents_room._save(tmp_path / "00000.npy", np.arange(1000))
    assert calls == [8, "00000.crc32", (tmp_path / "00000.npy").stat().st_size, "00000.npy"]


def test_another_autoencoder_is_refused(tmp_path: Path) -> None:
    first, second = save(tmp_path / "1.ckpt", "vq"), save(tmp_path / "2.ckpt", "vq", seed=1)
    encode(tmp_path / "latents", first)
    with pytest.raises(InputError, match="was encoded by another autoencoder"):
        batches(second, tmp_path / "latents", 0)
    with pytest.raises(InputError, match="holds latents of other images, or of another autoencoder"):
        encode(tmp_path / "latents", second)
    with pytest.raises(InputError, match="holds no mirror images, and data.augment.flip is 0.5"):
        fingerprint = json.loads((tmp_path / "latents/train/index.json").read_text())["fingerprint"]
        LatentSet(tmp_path / "latents", "train", fingerprint, (2, 4, 4), Augment(flip=0.5), seed=0)


@pytest.mark.parametrize("more, message", [
    (["--data.augment.crop_scale", "[0.2,1.0]"], "latents are encoded once"),
    (["--data.image_size", "7"], "7 is no multiple of the 2 pixels of a latent cell"),
    (["--data.autoencoder", "null"], "data.autoencoder: there is nothing to encode with"),
    (["--data.autoencoder", "none"], "data.autoencoder: there is nothing to encode with"),
])  # fmt: skip
def test_what_cannot_be_encoded_is_refused(tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(tmp_path / "latents", save(tmp_path / "autoencoder.ckpt", "vq"), *more)


def test_a_model_trains_on_latents_and_its_samples_are_images(command: Callable, tmp_path: Path) -> None:
    autoencoder = save(tmp_path / "autoencoder.ckpt", "kl")
    encode(tmp_path / "latents", autoencoder)
    options = [*IMAGES, "--data.autoencoder", autoencoder, "--run_name", "a", "--model.patch_size", "2",
               "--model.picture_steps", "2", "--model.predict.samples", "3", "--model.predict.steps", "2"]  # fmt: skip
    for latents in ([], ["--data.latents", tmp_path / "latents"]):
        outcome = command("fit", *options, *latents, "--overwrite", config=DIGITS, study="diffusion")
        assert outcome.code == 0, outcome.err
        assert "4x4x2" in outcome.out
    outcome = command("predict", *options, "--data.latents", tmp_path / "latents", config=DIGITS, study="diffusion")
    assert outcome.code == 0 and "3 samples -> " in outcome.out, outcome.err


@pytest.mark.parametrize("option, value, message", [
    ("--data.image_size", "4", "holds those of other images: image_size: [8, 8] there, [4, 4] here"),
    ("--data.augment.interpolation", "bicubic", "interpolation: bilinear there, bicubic here"),
    ("--data.eval_crop", "0.5", "eval_crop: 1.0 there, 0.5 here"),
    ("--data.augment.crop_scale", "[0.3,1.0]", "data.augment: latents are encoded once"),
])
def test_latents_of_other_images_are_refused(
    command: Callable, cache: Path, option: str, value: str, message: str
) -> None:
    options = [*IMAGES, "--data.autoencoder", cache / "autoencoder.ckpt", "--data.latents", cache / "latents"]
    outcome = command("fit", *options, option, value, config=DIGITS, study="diffusion")
    assert outcome.code == 2 and message in outcome.err, outcome.err


def photos(parent: Path, shade: int, files: int = 3) -> ImageFolder:
    """Grey photos that differ from those of another shade in their pixels alone, and in no file's size."""
    for name in ("cat", "dog"):
        folder = parent / "photos" / "train" / name
        folder.mkdir(parents=True)
        for number in range(files):
            Image.new("RGB", (8, 8), (shade, shade, number)).save(folder / f"{number}.png")
    return ImageFolder(str(parent / "photos"))


@pytest.mark.parametrize("there, here, message", [
    (lambda _: Shapes(8, train=40), lambda _: Shapes(8, train=8),
     "source.train: 40 there, 8 here; images: 40 there, 8 here"),
    (lambda _: Shapes(8, train=8), lambda _: Shapes(8, train=8, seed=1), "source.seed: 0 there, 1 here"),
    (lambda path: photos(path / "a", 100), lambda path: photos(path / "b", 101),
     "files: [0-9a-f]+ there, [0-9a-f]+ here"),
    (lambda path: photos(path / "a", 100), lambda path: photos(path / "b", 100, 2), "images: 6 there, 4 here"),
])  # fmt: skip
def test_latents_of_images_of_the_same_title_are_refused(
    tmp_path: Path, there: Callable[[Path], Source], here: Callable[[Path], Source], message: str
) -> None:
    source = there(tmp_path)
    written(source, tmp_path)
    assert len(read(source, tmp_path)) in (40, 8, 6)
    with pytest.raises(InputError, match=f"latents holds those of other images: {message}.*; name another folder"):
        read(here(tmp_path), tmp_path)
    with pytest.raises(InputError, match="holds latents of other images"):
        written(here(tmp_path / "again"), tmp_path)


def test_latents_are_those_of_the_same_images_elsewhere_and_of_images_that_are_not_at_hand(tmp_path: Path) -> None:
    written(photos(tmp_path / "a", 100), tmp_path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    source = ImageFolder(str(tmp_path / "b/photos"))
    assert len(read(source, tmp_path)) == 6
    for file in (tmp_path / "b").rglob("*.png"):
        file.unlink()
    assert source.class_names(tmp_path) == ["cat", "dog"] and len(read(source, tmp_path)) == 6


def test_where_latents_come_from_makes_no_other_run(command: Callable, cache: Path) -> None:
    """They are the same, and so the commands of a run need not repeat it."""
    options = [*IMAGES, "--data.autoencoder", cache / "autoencoder.ckpt", "--model.picture_epochs", "0"]
    assert command("fit", *options, "--data.latents", cache / "latents", config=DIGITS, study="diffusion").code == 0
    few = ["--model.predict.samples", "2", "--model.predict.steps", "2"]
    outcome = command("predict", *options, *few, config=DIGITS, study="diffusion")
    assert outcome.code == 0 and "2 samples -> " in outcome.out, outcome.err


def test_an_autoencoder_that_was_trained_anew_is_refused(command: Callable, tmp_path: Path) -> None:
    """Under the same path: the run's config is the same, and nothing else would tell."""
    autoencoder = save(tmp_path / "autoencoder.ckpt", "vq")
    options = [*IMAGES, "--data.autoencoder", autoencoder, "--run_name", "a", "--model.patch_size", "2",
               "--model.picture_epochs", "0", "--model.predict.samples", "3", "--model.predict.steps", "2"]  # fmt: skip
    assert command("fit", *options, config=DIGITS, study="diffusion").code == 0
    last = tmp_path / "runs/diffusion/a/checkpoints/last.ckpt"
    before = last.read_bytes()
    save(autoencoder, "vq", seed=1)
    for stage in ("predict", "validate"):
        outcome = command(stage, *options, config=DIGITS, study="diffusion")
        assert outcome.code == 2 and "is not the autoencoder that this run was trained with" in outcome.err, stage
    longer = ["--run_name", "b", "--trainer.max_epochs", "3", "--continue_from", last.parents[1]]
    outcome = command("fit", *options, *longer, config=DIGITS, study="diffusion")
    assert outcome.code == 2 and "is not the autoencoder that this run was trained with" in outcome.err
    assert last.read_bytes() == before and not list(tmp_path.rglob("*.png"))
    save(autoencoder, "vq")
    assert command("predict", *options, config=DIGITS, study="diffusion").code == 0


def test_a_model_in_bf16_is_given_and_gives_latents_that_are_coded_in_fp32(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder, seen = save(tmp_path / "autoencoder.ckpt", "kl"), {}

    def watch(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def watched(*arguments: Any) -> torch.Tensor:
            output = method(*arguments)
            seen.setdefault(name, set()).add((torch.is_autocast_enabled("cpu"), output.dtype))
            return output

        monkeypatch.setattr(owner, name, watched)

    watch(DiT, "forward")
    watch(Autoencoder, "moments")
    watch(Autoencoder, "decode")
    options = [*IMAGES, "--data.autoencoder", autoencoder, "--run_name", "a", "--model.picture_steps", "2",
               "--model.predict.samples", "3", "--model.predict.steps", "2", "--trainer.precision",
               "bf16-mixed", "--trainer.max_epochs", "1"]  # fmt: skip
    in_fp32, in_bf16 = {(False, torch.float32)}, {(True, torch.bfloat16)}
    assert command("fit", *options, config=DIGITS, study="diffusion").code == 0
    assert seen == {"moments": in_fp32, "forward": in_bf16, "decode": in_fp32}  # a picture of samples
    seen.clear()
    assert command("predict", *options, config=DIGITS, study="diffusion").code == 0
    assert seen == {"forward": in_bf16, "decode": in_fp32}
    [record] = (json.loads(path.read_text()) for path in tmp_path.rglob("record.json"))
    assert record["precision"] == "bf16-mixed" and record["autoencoder_precision"] == "32-true"


def test_no_more_images_are_encoded_at_once_than_fit_beside_a_model() -> None:
    sizes, beats = [], []

    def coder(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return 2 * images

    images = torch.arange(70.0)
    assert torch.equal(latent_data._in_pieces(coder, images, (256, 256), lambda: beats.append(len(sizes))), 2 * images)
    assert sizes == [64, 6] and beats == [1, 2]
    latent_data._in_pieces(coder, images[:1], (8192, 8192))
    assert sizes[2:] == [1]

"""python -m diffusion.latents FOLDER --config diffusion/configs/NAME.yaml --data.autoencoder RUN: encodes a data set
once, so that training reads its latents instead of encoding images in every epoch.

What is kept are moments, from which KL's latents are drawn anew in every epoch, of each image and of its mirror image
where training flips. The same command goes on where it stopped, shard by shard, and checks every shard that is there; a
second one waits until the first has ended. `--data.latents FOLDER` reads them.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.advice import quieten
from common.command import Parser, run_command
from common.data import ImageData
from common.data.loader import Draw
from common.errors import InputError
from common.files import read_json, whole, write_atomically
from common.lock import alone
from diffusion.latent_set import AGAIN, SPLITS, check, checksum, checksum_file, shard_files

if TYPE_CHECKING:
    from diffusion.latent_data import LatentData

SHARD = 4096  # images; at 32x32x4 in fp32 134 MB with mirror images


def images_of(arguments: list[str]) -> tuple[LatentData, bool]:
    """The images of a training's command line, none mirrored, and whether the training mirrors them.

    Raises:
        InputError: an augmentation that no cache can hold, or no autoencoder.
    """
    from common.training.cli import StudyCLI  # costs seconds, which `--help` need not wait for

    quieten()
    cli = StudyCLI("diffusion", ["fit", *arguments], run=False)
    data = cli.parser.instantiate(cli.config)["fit"].data
    if getattr(data, "autoencoder_source", None) is None:
        raise InputError("data.autoencoder: there is nothing to encode with; name the run folder of an autoencoder")
    flips = data.augment.flip > 0
    data.refuse_uncacheable()
    data.augment, data.latents = replace(data.augment, flip=0.0), None
    data.on_device = False  # each is read once
    return data, flips


def encode(data: LatentData, flips: bool, folder: Path, split: str) -> None:
    """Writes the moments of a split, and of its mirror images; shards that are there already are checked and kept.

    Raises:
        InputError: the folder holds other latents, or a damaged shard.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.trainer = SimpleNamespace(training=split == "train", predicting=False, seed=0)
    autoencoder, images = data.load_autoencoder().to(device), data.load(split)
    data.sets[split] = images
    index = {"fingerprint": data.fingerprint, "images": len(images), "shard": SHARD, "flips": flips,
             **data.prepared(split)}  # fmt: skip
    started = folder / split / "started.json"
    if started.is_file() and read_json(started, AGAIN) != index:
        raise InputError(f"{folder}: holds latents of other images, or of another autoencoder; remove it, or name "
                         "another folder")
    write_atomically(started, json.dumps(index))
    shards = {path: torch.arange(len(images))[number * SHARD :][:SHARD].split(data.eval_batch_size)
              for number, path in enumerate(shard_files(folder / split, len(images), SHARD))}
    if there := [path for path in shards if path.is_file()]:
        for path in there:
            check(path)
        print(f"{split}: shards that are there and whole: {len(there)} of {len(shards)}", flush=True)
    shards = {path: shard for path, shard in shards.items() if path not in there}
    begun = time.perf_counter()
    # One loader for all that is missing: its processes decode while the device encodes.
    order = [[Draw(0, index, 0) for index in some.tolist()] for shard in shards.values() for some in shard]
    batches = iter(data.loader(split, order))
    for path, shard in shards.items():
        rows = []
        for _ in shard:
            batch = {name: value.to(device) for name, value in next(batches).items()}
            pixels = ImageData.on_after_batch_transfer(data, batch, 0)["image"]
            views = [pixels, pixels.flip(-1)] if flips else [pixels]
            rows.append(torch.stack([autoencoder.moments(view) for view in views], dim=1).cpu())
        _save(path, torch.cat(rows).numpy())
        done = int(shard[-1][-1]) + 1
        print(f"{split}: {done:,} of {len(images):,} images, {time.perf_counter() - begun:.0f} s", flush=True)
    _save(folder / split / "labels.npy", images.labels.numpy())
    write_atomically(folder / split / "index.json", json.dumps(index))


def _save(path: Path, array: np.ndarray) -> None:
    """The checksum first: an array that is there is whole, and can be checked."""
    content = io.BytesIO()
    np.save(content, array)
    data = content.getbuffer()
    for place, written in [(checksum_file(path), checksum(data)), (path, data)]:
        with whole(place) as file:
            file.write(written)


def main(arguments: list[str]) -> int:
    parser = Parser("python -m diffusion.latents", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the latents go")
    parser.add_argument("--config", required=True, metavar="FILE", help="of the training that will read them")
    options, overrides = parser.parse_known_args(arguments)
    data, flips = images_of(["--config", options.config, *overrides])
    with alone(options.folder):
        for split in SPLITS:
            encode(data, flips and split == "train", options.folder, split)
    print(f"finished: {options.folder}; all checksums hold; train with --data.latents {options.folder}")
    return 0


if __name__ == "__main__":
    run_command(main)

"""python -m common.data.store imagenet --size 96: the training images, shrunk once and for all to squares of pixels.

A random resized crop stretches its box to a square anyhow; taken from a picture that was stretched as a whole it loses
little, and costs no decoding. The store lies below the root, as imagenet-96/, in memory-mapped shards; --data.store 96
trains from it. The same command goes on where it stopped, and checks the shards that are there by the checksums of
what was written. At its end it tells by how much crops differ from those of the files, which validation and test still
read.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F

from common.command import Parser, run_command
from common.data.augment import Augment
from common.data.folders import Flowers102, ImageFolder, ImageNet, decode
from common.data.sets import AT_ONCE
from common.data.sources import Source
from common.data.stored import AGAIN, SHARD, Store, checksum_of, fingerprint, location, mapped, shapes_of, shard_file
from common.errors import InputError
from common.files import read_json, whole, write_atomically
from common.lock import alone

CROP = 28  # pixels of the crops that are compared, ImageNet's of the paper
COMPARED = 256


def make(source: Source, root: Path, size: int, workers: int) -> Path:
    """Writes what is missing of the store, and checks what is there; its folder.

    Raises:
        InputError: images that are held in memory anyway, a file that cannot be read, a damaged shard, or a store of
            other images.
    """
    if source.resident:
        raise InputError(f"{source.name}: its images are held in memory as they are; a store would save nothing")
    files, labels = source.read(root, "train")
    folder, started = location(source, root, size), {"files": fingerprint(files, labels), "size": size, "shard": SHARD}
    begun = folder / "started.json"
    if begun.is_file() and read_json(begun, AGAIN) != started:
        raise InputError(f"{folder}: is a store of other images; remove it, or name another root")
    write_atomically(begun, json.dumps(started))

    parts = {number: files[number * SHARD :][:SHARD] for number in range(-(-len(files) // SHARD))}
    index = folder / "index.json"
    known = read_json(index, AGAIN, "checksums")["checksums"] if index.is_file() else [None] * len(parts)
    checksums: dict[int, int] = {}
    with processes(workers) as pool:
        jobs = {pool.submit(write_shard, folder, number, part, source.channels, size, known[number]): number
                for number, part in parts.items()}
        for job in _finished(pool, jobs):
            checksums[jobs[job]], _ = job.result()
            _tell(len(checksums), len(parts), len(files))
    finished = started | {"images": len(files), "checksums": [checksums[number] for number in parts]}
    write_atomically(index, json.dumps(finished))
    for number in parts:
        checksum_of(shard_file(folder, number)).unlink(missing_ok=True)
    return folder


def processes(workers: int) -> Executor:
    """That write shards, on one thread each; a thread of this process where one is enough."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin)


def _begin() -> None:
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)  # it was killed; nobody would ever ask for anything again

    Thread(target=end_with_parent, daemon=True).start()


def _finished(pool: Executor, jobs: Iterable[Future]) -> Iterable[Future]:
    """The jobs in the order in which they end; the first that fails ends all."""
    try:
        yield from as_completed(jobs)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


_began = time.perf_counter()


def _tell(done: int, shards: int, images: int) -> None:
    seconds = time.perf_counter() - _began
    print(f"shard {done} of {shards} · {min(done * SHARD, images):,} of {images:,} images · "
          f"{seconds / done * (shards - done):.0f} s left", file=sys.stderr, flush=True)


def write_shard(
    folder: Path, number: int, files: list[str], channels: int, size: int, known: int | None = None
) -> tuple[int, bool]:
    """The checksum of a shard, and whether it had to be written.

    Args:
        known: its checksum, if it is one of a finished store; that of a shard written since lies beside it.

    Raises:
        InputError: a file that cannot be read, or a shard that is not as it was written.
    """
    path = shard_file(folder, number)
    if checksum_of(path).is_file():
        known = int(mapped(checksum_of(path)))
    if known is not None and path.is_file() and shapes_of(path).is_file():
        if _checksum(mapped(path), np.array(mapped(shapes_of(path)))) != known:
            raise InputError(f"{path}: damaged; remove it, and the same command writes it anew")
        return known, False
    images, shapes = np.empty((len(files), channels, size, size), np.uint8), np.empty((len(files), 2), np.int64)
    for row, file in enumerate(files):
        image = decode(file, channels)
        shapes[row] = image.shape[1:]
        images[row] = F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0]
    checksum = _checksum(images, shapes)
    path.unlink(missing_ok=True)  # whatever ends the writing, no other pixels lie beside these shapes and checksum
    for place, array in [(shapes_of(path), shapes), (checksum_of(path), np.uint32(checksum)), (path, images)]:
        with whole(place) as file:  # the pixels last: the shard is whole by then
            np.save(file, array)
    return checksum, True


def _checksum(images: np.ndarray, shapes: np.ndarray) -> int:
    return zlib.crc32(shapes, zlib.crc32(images))


# How far its crops are from the files'


def differences(store: Store, files: list[str], channels: int) -> dict[str, float]:
    """Levels of 255 by which random resized crops of CROP pixels, of some images, differ: their mean and maximum."""
    augment = Augment(crop_scale=(0.08, 1.0), interpolation="bicubic")
    chosen = torch.linspace(0, len(store) - 1, min(COMPARED, len(store))).long()
    draws, size = augment.draws(0, 0, chosen), (CROP, CROP)
    off = []
    for some, drawn in zip(chosen.split(AT_ONCE), draws.split(AT_ONCE), strict=True):
        ours = augment.place_squares(*store.take(some.tolist()), drawn, size) * 255
        theirs = augment.place_each([decode(files[i], channels) for i in some.tolist()], drawn, size)
        off.append((ours.round() - theirs.float()).abs())
    return {"mean": torch.cat(off).mean().item(), "max": torch.cat(off).max().item()}


def _source(name: str) -> Source:
    known = {"imagenet": ImageNet, "flowers102": Flowers102}
    return known[name]() if name in known else ImageFolder(name)


def main(arguments: list[str]) -> int:
    parser = Parser("python -m common.data.store", __doc__)
    parser.add_argument("source", help="imagenet, flowers102, or a folder of class folders")
    parser.add_argument("--size", type=int, default=96, help="side of the stored squares in pixels (96)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="the folder of all data sets (data)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode (all cores)")
    options = parser.parse_args(arguments)
    for name in ("size", "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: give 1 or more")
    source = _source(options.source)
    with alone(location(source, options.root, options.size)):
        folder = make(source, options.root, options.size, options.workers)
    files, labels = source.read(options.root, "train")
    store = Store(folder, files, labels)
    off = differences(store, files, source.channels)
    gigabytes = sum(shard.nbytes for shard in store.shards) / 1e9
    print(f"finished: {folder}, {len(store):,} images, {gigabytes:.2g} GB; all checksums hold. Crops of {CROP} pixels "
          f"differ from the files' by {off['mean']:.2f} of 255 in the mean, {off['max']:.0f} at most. Train with "
          f"--data.store {options.size}")
    return 0


if __name__ == "__main__":
    run_command(main)

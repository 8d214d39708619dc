"""Building a store on all cores, beside nothing but decoding the same photographs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial
from itertools import count
from pathlib import Path

from common.benchmark.interleaving import interleaved, ratios, timed
from common.benchmark.pipelines import photographs
from common.data.folders import ImageFolder, decode
from common.data.store import processes, write_shard

COLUMNS = ("on all cores", "images/s", "of the decoder's speed (quartiles)")
PARTS = 2  # for each process and round, as shards are many


def measure(folder: str | None, side: int, images: int, workers: int, rounds: int) -> list[tuple[str, ...]]:
    """The rows of the table, for so many of the photographs of `folder`, or of those that scikit-image ships."""
    with tempfile.TemporaryDirectory() as root, processes(workers) as pool:
        source = ImageFolder(folder or photographs(Path(root) / "photographs"))
        files, _ = source.read(Path(root), "train")
        chosen = [files[i % len(files)] for i in range(images)]
        parts = [chosen[i :: PARTS * workers] for i in range(PARTS * workers)]
        written = partial(_write, pool, Path(root), parts, source.channels, side, count())
        sides = {"decoding alone": partial(_decode, pool, parts, source.channels), f"a store of {side}x{side}": written}
        for run in sides.values():
            run()  # the processes have started, and the files are in memory
        times = interleaved({name: timed(run) for name, run in sides.items()}, rounds)
    decoding, store = times
    share = ratios(times[store], times[decoding])
    return [(name, f"{images / statistics.median(seconds):,.0f}", "" if name == decoding else f"{share:.2f}")
            for name, seconds in times.items()]


def _decode(pool: Executor, parts: list[list[str]], channels: int) -> None:
    list(pool.map(_decode_all, parts, [channels] * len(parts)))


def _decode_all(files: list[str], channels: int) -> None:
    for file in files:
        decode(file, channels)


def _write(
    pool: Executor, root: Path, parts: list[list[str]], channels: int, side: int, numbers: Iterator[int]
) -> None:
    jobs = [pool.submit(write_shard, root, next(numbers), part, channels, side) for part in parts]
    assert all(job.result()[1] for job in jobs)  # anew, each time

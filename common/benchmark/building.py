"""Building a store on all cores, beside shrinking the same photographs by PIL, and beside nothing but decoding them."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from itertools import count
from pathlib import Path

from common.benchmark.interleaving import interleaved, ratios, timed
from common.benchmark.pipelines import photographs
from common.data.folders import ImageFolder, decode
from common.data.store import processes, write_shard

COLUMNS = ("on all cores", "images/s", "of PIL's shrinking (quartiles)", "of PIL's decoding (quartiles)",
           "of the suite's decoding (quartiles)")  # fmt: skip
CHANNELS = 3
PARTS = 2  # for each process and round, as shards are many


def measure(folder: str | None, side: int, images: int, workers: int, rounds: int) -> list[tuple[str, ...]]:
    """The rows of the table, for so many of the photographs of `folder`, or of those that scikit-image ships."""
    with tempfile.TemporaryDirectory() as root, processes(workers) as pool:
        source = ImageFolder(folder or photographs(Path(root) / "photographs"))
        files, _ = source.read(Path(root), "train")
        chosen = [files[i % len(files)] for i in range(images)]
        parts = [chosen[i :: PARTS * workers] for i in range(PARTS * workers)]
        written = partial(_write, pool, Path(root), parts, side, count())
        sides = {"PIL's decoding and shrinking": partial(_each, pool, partial(_shrink_by_pil, side), parts),
                 "PIL's decoding alone": partial(_each, pool, _decode_by_pil, parts),
                 "the suite's decoding alone": partial(_each, pool, _decode, parts),
                 f"a store of {side}x{side}": written}  # fmt: skip
        for run in sides.values():
            run()  # the processes have started, and the files are in memory
        times = interleaved({name: timed(run) for name, run in sides.items()}, rounds)
    others = list(times)[:-1]
    return [(name, f"{images / statistics.median(seconds):,.0f}",
             *(f"{ratios(seconds, times[of]):.2f}" if i > j else "" for j, of in enumerate(others)))
            for i, (name, seconds) in enumerate(times.items())]


def _each(pool: Executor, work: Callable[[list[str]], None], parts: list[list[str]]) -> None:
    list(pool.map(work, parts))


def _shrink_by_pil(side: int, files: list[str]) -> None:
    from PIL import Image

    for file in files:
        Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def _decode_by_pil(files: list[str]) -> None:
    from PIL import Image

    for file in files:
        Image.open(file).convert("RGB")


def _decode(files: list[str]) -> None:
    for file in files:
        decode(file, CHANNELS)


def _write(pool: Executor, root: Path, parts: list[list[str]], side: int, numbers: Iterator[int]) -> None:
    jobs = [pool.submit(write_shard, root, next(numbers), part, CHANNELS, side) for part in parts]
    assert all(job.result()[1] for job in jobs)  # anew, each time

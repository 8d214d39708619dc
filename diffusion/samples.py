"""A folder of samples: what was asked for, which of them are there, and the record of how they came about."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from common.data.folders import decode
from common.errors import InputError
from common.files import whole, write_atomically
from diffusion.image_sets import RECORD, read_record, to_uint8, write_npz
from diffusion.sampling import SolverName, labels_of

PACKED = 256  # samples in memory at once
LONGEST = 100  # letters that the classes take in a folder's name; a file system has 255 for all of it
# Entries of a record that may differ: more samples, a folder that moved, what older records did not tell.
OPEN = ("samples", "labels", "autoencoder", "autoencoder_precision")


@dataclass
class Sampling:
    """What `predict` and `test` generate; it does not tell runs apart.

    Args:
        samples: how many.
        solver: ddpm, ddim or dpm++, see `diffusion.sampling.Sampler`.
        steps: of the process.
        guidance: 1 is none; the paper has 1.5 for its tables and 4 for its figure.
        guidance_channels: the first channels that are guided.
        seed: of noise and classes.
        classes: that samples are drawn from; none takes all.
        npz: pack the samples into an .npz file of ADM's form too.
    """

    samples: int = 64
    solver: SolverName = "ddpm"
    steps: int = 250
    guidance: float = 1.5
    guidance_channels: int = 3
    seed: int = 0
    classes: list[int] | None = None
    npz: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"model.predict.samples: {self.samples} is not a positive number of samples")
        if self.guidance < 1:
            raise InputError(f"model.predict.guidance: {self.guidance} is below 1, which is no guidance")
        if self.guidance_channels < 1:
            raise InputError(f"model.predict.guidance_channels: {self.guidance_channels} is less than 1; DiT guides 3")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"model.predict.seed: {self.seed} is not between 0 and 4294967295")

    @property
    def name(self) -> str:
        """A folder's, for samples that differ in nothing but their number."""
        guided = f"-g{self.guidance:g}" + (f"-c{self.guidance_channels}" if self.guidance_channels != 3 else "")
        classes = "-classes" + "_".join(map(str, self.classes)) if self.classes else ""
        if len(classes) > LONGEST:
            classes = f"-{len(self.classes)}classes{hashlib.sha256(classes.encode()).hexdigest()[:8]}"
        return f"{self.solver}{self.steps}{guided}{classes}-s{self.seed}"

    def labels(self, classes: int) -> Tensor | None:
        """The class (samples,) of each sample, of a net that knows so many; None where it knows none."""
        if not classes and self.classes:
            raise InputError(f"model.predict.classes: {self.classes} mean nothing to a model without classes")
        if not classes:
            return None
        chosen = self.classes or list(range(classes))
        if not all(0 <= label < classes for label in chosen):
            raise InputError(f"model.predict.classes: {chosen} are not all among the {classes} classes, counted from 0")
        return labels_of(torch.arange(self.samples), chosen, self.seed)


PUBLISHED = Sampling()


class SampleFolder:
    """PNGs named by their numbers. A sample is a function of its number, so what is there need not be generated again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = 0  # samples that were ever asked for
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def open(self, record: dict[str, Any], labels: Tensor | None) -> None:
        """Goes on with the samples that are there, or begins.

        Raises:
            InputError: they came about otherwise than `record` says.
        """
        self.path.mkdir(parents=True, exist_ok=True)  # on every rank, which may be the first to write
        there = read_record(self.path)
        if not there and any(self.path.glob("*.png")):
            raise InputError(f"{self.path}: holds images but no {RECORD} of how they were made; move them away")
        differing = [key for key in record if there and key not in OPEN and there.get(key) != record[key]]
        if differing:
            raise InputError(f"{self.path}: holds samples that were made otherwise ("
                             + "; ".join(f"{key}: {there.get(key)} there, {record[key]} here" for key in differing)
                             + "); remove it, or choose another model.predict.seed")
        self.asked = max(there.get("samples", 0), record["samples"])
        if there.get("samples", 0) < record["samples"]:
            content = record | ({} if labels is None else {"labels": labels.tolist()})
            rank_zero_only(write_atomically)(self.path / RECORD, json.dumps(content, indent=1))

    def file(self, number: int) -> Path:
        return self.path / f"{number:06d}.png"

    def beside(self, suffix: str) -> Path:
        """A file of the folder's name."""
        return self.path.with_name(self.path.name + suffix)

    def missing(self, numbers: list[int]) -> list[int]:
        """Those of the numbers whose samples are not there yet."""
        return [number for number in numbers if not self.file(number).is_file()]

    def write_behind(self, numbers: list[int], images: Tensor) -> None:
        """As `write`, while the next samples are generated: a GPU that still computes these images is waited for by the
        writer alone. An error is raised by the next call of this, of `look` or of `wait`.
        """
        self.wait()
        self._writing = self._writer.submit(self.write, numbers, images)

    def look(self) -> None:
        """Raises what has gone wrong with writing so far."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until all that was given is written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def write(self, numbers: list[int], images: Tensor) -> None:
        """Samples (B, C, H, W) in about [-1, 1], all of them finite, or none is written. A file is whole, or not there.
        """
        from PIL import Image

        for number, image in zip(numbers, as_pixels(images).permute(0, 2, 3, 1).numpy(), strict=True):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            with whole(self.file(number)) as file:  # what is there is never generated again
                picture.save(file, format="PNG")

    def read(self, start: int, stop: int, channels: int) -> Tensor:
        """The samples of these numbers, uint8 (N, C, H, W)."""
        return torch.stack([decode(str(self.file(number)), channels) for number in range(start, stop)])

    def pack(self, samples: int, channels: int, labels: Tensor | None) -> None:
        """Writes the first samples, and their classes, as an .npz file beside the folder."""
        batches = (self.read(start, min(start + PACKED, samples), channels) for start in range(0, samples, PACKED))
        write_npz(self.beside(".npz"), samples, batches, labels)


def as_pixels(images: Tensor) -> Tensor:
    """Samples in about [-1, 1] as uint8 on the CPU, once the device has computed them.

    Raises:
        FloatingPointError: some of them are not finite.
    """
    if not images.isfinite().all():
        raise FloatingPointError("samples are not finite numbers; try --trainer.precision 32-true, or an earlier "
                                 "checkpoint")
    return to_uint8(images.float()).cpu()

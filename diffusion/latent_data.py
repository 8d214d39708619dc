"""The LightningDataModule of what a diffusion model is trained on: latents of images, or the pixels themselves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data import ImageData
from common.data.augment import PLAIN
from common.data.loader import Draw
from common.data.stored import fingerprint
from common.errors import InputError
from common.randomness import normal
from diffusion.autoencoder import Autoencoder
from diffusion.latent_set import SPLITS, LatentSet, read_index
from diffusion.published import load_autoencoder

PIECE = 64 * 256**2  # pixels that go through an autoencoder at once: 6 GB in the widest layers of the paper's, in fp32
LOOKED_INTO = 64  # files whose contents help to tell images apart; to read them all would take hours


class LatentData(ImageData):
    """Labelled images as normalised latents (z, h, w) of a frozen autoencoder, encoded on the device.

    A batch is that of ImageData, with latents as its `image`. KL's latents are drawn anew for every (seed, epoch,
    index) in training; in validation by index alone, so that runs of any seed are judged on the same. Without an
    autoencoder they are the pixels, and all this is ImageData.

    Args:
        autoencoder: a run folder of an autoencoder's training, or a published autoencoder; none (the word, or null)
            trains on pixels.
        latents: a folder that `python -m diffusion.latents` wrote, read in place of the images in training and
            validation; left out, images are encoded as they come. The images need not be at hand, but those that are
            must be the ones that were encoded.
        assumed_classes: how many there are, where the images are not at hand: to sample from published weights.
        **kwargs: see ImageData; images are mapped to [-1, 1].
    """

    def __init__(
        self,
        *args: Any,
        autoencoder: str | None = None,
        latents: str | None = None,
        assumed_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if set(self.mean) != {0.5} or set(self.std) != {0.5}:
            raise InputError(f"data.mean, data.std: {list(self.mean)} and {list(self.std)}; diffusion takes images in "
                             "[-1, 1], so leave both at 0.5")
        if autoencoder == "none":
            autoencoder = None
        if latents and not autoencoder:
            raise InputError("data.latents: needs data.autoencoder too, which turns samples into images")
        if assumed_classes is not None and assumed_classes < 1:
            raise InputError(f"data.assumed_classes: {assumed_classes} is not a positive number of classes")
        self.autoencoder_source, self.latents, self.assumed_classes = autoencoder, latents, assumed_classes
        self.autoencoder: Autoencoder | None = None

    @cached_property
    def class_names(self) -> list[str]:
        return [str(number) for number in range(self.assumed_classes)] if self.assumed_classes else super().class_names

    @property
    def input_size(self) -> tuple[int, int]:
        """Of what the model sees (h, w)."""
        factor = self.autoencoder.factor if self.autoencoder else 1
        return self.image_size[0] // factor, self.image_size[1] // factor

    @property
    def input_channels(self) -> int:
        return self.autoencoder.channels if self.autoencoder else self.channels

    def load_autoencoder(self) -> Autoencoder | None:
        if self.autoencoder_source is not None and self.autoencoder is None:
            if not self.autoencoder_source or not Path(self.autoencoder_source).exists():
                raise InputError(f"data.autoencoder: there is no run folder or file {self.autoencoder_source}; train "
                                 "one (diffusion/configs/autoencoder_*.yaml), name a published one (python -m "
                                 "common.weights lists them), or train on pixels: --data.autoencoder none")
            self.autoencoder = load_autoencoder(self.autoencoder_source).requires_grad_(False).eval()
            if self.autoencoder.config["image_channels"] != self.channels:
                raise InputError(f"data.autoencoder: {self.autoencoder_source} is for images of "
                                 f"{self.autoencoder.config['image_channels']} channels; {self.source.name} has "
                                 f"{self.channels}")
            for side in self.image_size:
                if side % self.autoencoder.factor:
                    raise InputError(f"data.image_size: {side} is no multiple of the {self.autoencoder.factor} pixels "
                                     "of a latent cell")
        return self.autoencoder

    def random_batch(self, images: int) -> dict[str, Tensor]:
        latents = torch.randn(images, self.input_channels, *self.input_size)
        return {**super().random_batch(images), "image": latents}

    @cached_property
    def fingerprint(self) -> str | None:
        """The autoencoder's, which a model belongs to that was trained on its latents."""
        autoencoder = self.load_autoencoder()
        return autoencoder and autoencoder.fingerprint()

    def prepared(self, split: str) -> dict[str, Any]:
        """What a split's latents depend on beside the autoencoder, as JSON knows it, as far as it can be known here."""
        return {"dataset": self.dataset, **self._known_images(split), "image_size": list(self.image_size),
                "eval_crop": self.eval_crop, "interpolation": self.augment.interpolation,
                "eval_interpolation": self.eval_interpolation,
                **({"store": self.store} if self.store is not None else {})}

    def _known_images(self, split: str) -> dict[str, Any]:
        """What tells a split's images from others of their title; of files that are not at hand, nothing."""
        known: dict[str, Any] = {}
        if self.source.resident:  # its options, not pixels: to render them takes seconds, and may round otherwise here
            known |= {f"source.{name}": str(value) for name, value in vars(self.source).items()}
        with suppress(InputError):
            if self.source.resident:
                known["images"] = len(self.source.labels(self.root, split))
            else:
                files, labels = self.source.read(self.root, split)
                known |= {"images": len(files), "files": _digest(files, labels)}
        return known

    def refuse_uncacheable(self) -> None:
        if replace(self.augment, flip=0.0) != replace(PLAIN, interpolation=self.augment.interpolation):
            raise InputError("data.augment: latents are encoded once, so all of it but flip must be off")

    def without_files(self) -> int:
        """Of an autoencoder that is not at hand, the form is the published one of the paper's latents."""
        if self.autoencoder_source and Path(self.autoencoder_source).exists():
            self.load_autoencoder()
        elif self.autoencoder_source and self.autoencoder is None:
            with torch.device("meta"):
                self.autoencoder = Autoencoder()
        return super().without_files()

    def setup(self, stage: str) -> None:
        if self.assumed_classes and stage in ("fit", "validate"):
            raise InputError(f"data.assumed_classes: {self.assumed_classes} is for predict and test alone; {stage} "
                             "reads the images, which tell their classes")
        self.load_autoencoder()
        super().setup(stage)

    def load(self, split: str) -> Dataset:
        if split in ("predict", "test"):
            samples, ranks = self.trainer.lightning_module.predict.samples, self.trainer.world_size
            if samples < ranks:
                raise InputError(f"model.predict.samples: {samples} are fewer than the {ranks} devices; use fewer of "
                                 "these")
            return SampleNumbers(samples)
        if self.latents and split in SPLITS:
            augment = self.augment if split == "train" else None
            self.refuse_uncacheable()
            there = read_index(Path(self.latents), split)
            found = [f"{key}: {there.get(key)} there, {ours} here" for key, ours in self.prepared(split).items()
                     if there.get(key) != ours]
            if found:
                raise InputError(f"data.latents: {self.latents} holds those of other images: {'; '.join(found)}; name "
                                 "another folder, into which python -m diffusion.latents encodes these")
            shape = self.autoencoder.moment_channels, *self.input_size
            return LatentSet(self.latents, split, self.fingerprint, shape, augment, self.trainer.seed)
        return super().load(split)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if "number" in batch:
            return batch
        if "moments" in batch:
            moments = batch.pop("moments")
        else:
            batch = super().on_after_batch_transfer(batch, dataloader_idx)
            if self.autoencoder is None:
                return batch
            moments = _in_pieces(self.autoencoder.to(batch["image"].device).moments, batch["image"], self.image_size)
        latents = self.autoencoder.normalise(self.autoencoder.sample(moments, self._noise(batch, moments)))
        return {**batch, "image": latents}

    def _noise(self, batch: dict[str, Any], moments: Tensor) -> Tensor | None:
        if self.autoencoder.kind == "vq":
            return None
        shape = torch.Size((len(moments), self.autoencoder.channels, *moments.shape[2:]))
        keys = ("latent", self.trainer.seed, batch["epoch"]) if self.trainer.training else ("evaluation latent",)
        return normal(*keys, batch["index"], n=shape[1:].numel()).view(shape)

    def decode(self, latents: Tensor, beat: Callable[[], None] = lambda: None) -> Tensor:
        """What a model generates, (B, z, h, w), as images (B, C, H, W) in about [-1, 1].

        Args:
            beat: called after every piece of the batch that the autoencoder has decoded, a sign of life.
        """
        if self.autoencoder is None:
            return latents
        latents = self.autoencoder.denormalise(latents)
        return _in_pieces(self.autoencoder.to(latents.device).decode, latents, self.image_size, beat)


def _digest(files: list[str], labels: Tensor) -> str:
    """Of files, wherever they lie: names and labels, and the contents of a few, as names are often mere numbers."""
    digest = hashlib.sha256(fingerprint(files, labels).encode())
    for number in torch.linspace(0, len(files) - 1, min(LOOKED_INTO, len(files))).long().tolist():
        digest.update(Path(files[number]).read_bytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def _in_pieces(
    coder: Callable[[Tensor], Tensor], inputs: Tensor, size: tuple[int, int], beat: Callable[[], None] = lambda: None
) -> Tensor:
    """`coder` of a batch, whose images have `size`, without more of them at once than fit beside a model.

    Without autocast, whatever the model is given: DiT's published code encodes and decodes in fp32.
    """
    outputs = []
    with torch.autocast(inputs.device.type, enabled=False):
        for some in inputs.split(max(1, PIECE // math.prod(size))):
            outputs.append(coder(some))
            beat()
    return torch.cat(outputs)


class SampleNumbers(Dataset):
    """The numbers of the samples that are to be there: what `predict` and `test` go through in place of images."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, draws: list[Draw]) -> dict[str, list[int]]:
        return {"number": [draw.index for draw in draws]}  # no tensor: to read one from a GPU waits for all it does

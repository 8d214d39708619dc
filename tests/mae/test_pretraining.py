"""Pre-training as a step and an evaluation: masks by image, micro-batches, metrics and pictures by hand."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics import MetricCollection

from common.data import Augment, ImageData
from common.data.loader import TrainOrder
from common.data.sources import Pictures, Source
from common.training.optim import Recipe
from common.training.trainer import Trainer
from mae import Pretraining
from mae.model import random_masking
from mae.pictures import MASKED, figure

NET = {"size": "nano", "patch_size": 1, "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1,
       "decoder_heads": 2}  # fmt: skip


class Noise(Source):
    """Random pictures of 8x8 pixels: 24 of them to train on, 11 to evaluate."""

    name, channels, resident = "noise", 1, True

    def class_names(self, root: Path) -> list[str]:
        return ["noise"]

    def read(self, root: Path, split: str) -> Pictures:
        images = {"train": 24, "val": 11}[split]
        generator = torch.Generator().manual_seed(images)
        pixels = torch.randint(256, (images, self.channels, 8, 8), dtype=torch.uint8, generator=generator)
        return Pictures(pixels, torch.zeros(images, dtype=torch.long))


@pytest.fixture
def pretrain(tmp_path: Path) -> Callable[..., Pretraining]:
    """Trains a tiny autoencoder on noise, 64 pixels as tokens, and returns the LightningModule."""

    def run(
        *callbacks: L.Callback, seed: int = 0, epochs: int = 2, optim: dict[str, Any] | None = None, **data: Any
    ) -> Pretraining:
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), default_root_dir=str(tmp_path),
            logger=TensorBoardLogger(str(tmp_path)), num_sanity_val_steps=0, log_every_n_steps=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.seed = seed
        module = Pretraining(Recipe(lr=1e-3, **(optim or {})), picture_epochs=0, **NET)
        trainer.fit(module, ImageData(Noise(), 8, **{"batch_size": 12, **data}))
        return module

    return run


# Masks


class Masks(L.Callback):
    """The masks that the net reports: of training by (epoch, index), of validations one after the other by index."""

    def __init__(self) -> None:
        self.training: dict[tuple[int, int], list[float]] = {}
        self.validations: list[dict[int, list[float]]] = []

    def on_fit_start(self, trainer: L.Trainer, module: Pretraining) -> None:
        module.net.register_forward_hook(lambda net, inputs, output: self._keep(trainer, output[2]))

    def on_train_batch_start(self, trainer: L.Trainer, module: Pretraining, batch: dict, _: int) -> None:
        self.indices = batch["index"].tolist()

    def on_validation_epoch_start(self, trainer: L.Trainer, module: Pretraining) -> None:
        self.validations.append({})

    def on_validation_batch_start(self, trainer: L.Trainer, module: Pretraining, batch: dict, *_: int) -> None:
        self.indices = batch["index"].tolist()

    def _keep(self, trainer: L.Trainer, masks: Tensor) -> None:
        for index, mask in zip(self.indices, masks.tolist(), strict=True):
            if trainer.training:
                self.training[trainer.current_epoch, index] = mask
            else:
                self.validations[-1][index] = mask


def test_a_mask_is_a_function_of_seed_epoch_and_image(pretrain: Callable) -> None:
    def masks(seed: int = 0, **data: int) -> Masks:
        record = Masks()
        pretrain(record, seed=seed, **data)
        return record

    found = masks()
    assert found.training.keys() == {(epoch, index) for epoch in (0, 1) for index in range(24)}
    assert len({tuple(mask) for mask in found.training.values()}) == 48
    assert all(sum(mask) == 48 for mask in found.training.values())  # 0.75 of 64
    first, second = found.validations
    assert first == second and len({tuple(mask) for mask in first.values()}) == len(first) == 11

    for division in ({"batch_size": 8}, {"batch_per_device": 4}, {"batch_per_device": 2, "eval_batch_size": 4}):
        same = masks(**division)
        assert same.training == found.training and same.validations == found.validations, division
    other = masks(seed=1)
    assert not any(other.training[key] == mask for key, mask in found.training.items())
    assert not any(other.validations[0][index] == mask for index, mask in first.items())


def test_every_rank_finds_the_masks_of_one_process(pretrain: Callable) -> None:
    record = Masks()
    module = pretrain(record)
    seen = set()
    for rank in (0, 1):
        for draws in TrainOrder(24, 12, 2, seed=0, position=lambda: (1, 0), rank=rank, ranks=2):
            epoch, index, _ = torch.tensor(draws).T
            masks = random_masking(module.noise({"epoch": epoch, "index": index}), 0.75)[2]
            assert masks.tolist() == [record.training[1, i] for i in index.tolist()]
            seen.update(index.tolist())
    assert seen == set(range(24))


# Micro-batches


def test_micro_batches_give_the_weights_of_the_whole_batch(pretrain: Callable) -> None:
    augment = Augment(crop_scale=(0.3, 1.0), flip=0.5, interpolation="bicubic")

    def trained(most: int) -> dict[str, Tensor]:
        module = pretrain(optim={"ema": 0.5}, epochs=3, augment=augment, batch_per_device=most)
        assert module.trainer.accumulate_grad_batches == 12 // most and module.trainer.global_step == 6
        # The keys' biases apart: they change no output, and Adam turns the rounding error of their gradient, which is
        # 0, into steps of full length.
        return {f"{kind} {name}": torch.cat([value[:8], value[16:]]) if name.endswith("qkv.bias") else value.clone()
                for kind, net in [("raw", module.net), ("average", module.average)]
                for name, value in net.state_dict().items()}  # fmt: skip

    whole = trained(12)
    for most in (4, 2):
        divided = trained(most)
        for name, value in whole.items():
            torch.testing.assert_close(divided[name], value, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# Metrics and pictures: a net with random weights, images of 4x6 pixels

SIZE = (4, 6)
MEAN, STD = {1: (0.4,), 3: (0.5, 0.4, 0.3)}, {1: (0.25,), 3: (0.3, 0.25, 0.2)}
MODES = [(patch_size, channels, norm_pix_loss) for patch_size in (1, 2) for channels in (1, 3)
         for norm_pix_loss in ("none", "patch", "image")
         if (patch_size, channels, norm_pix_loss) != (1, 1, "patch")]  # fmt: skip


def prepared(patch_size: int, channels: int, norm_pix_loss: str) -> Pretraining:
    data = SimpleNamespace(image_size=SIZE, channels=channels, mean=MEAN[channels], std=STD[channels])
    module = Pretraining(Recipe(lr=0.1), mask_ratio=0.5,
                         **{**NET, "patch_size": patch_size, "norm_pix_loss": norm_pix_loss})  # fmt: skip
    module._trainer = SimpleNamespace(seed=0, datamodule=data)
    torch.manual_seed(0)
    module.net = module.build(data).requires_grad_(False)
    return module


def batch(module: Pretraining, images: int = 8) -> dict[str, Tensor]:
    """Normalised random images, one of them of a single colour."""
    data = module.trainer.datamodule
    raw = torch.rand(images, data.channels, *SIZE, generator=torch.Generator().manual_seed(1))
    raw[1] = torch.tensor([0.0, 1.0, 0.5])[: data.channels, None, None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return {"raw": raw, "image": (raw - mean) / std, "epoch": torch.zeros(images, dtype=torch.long),
            "index": torch.arange(images)}  # fmt: skip


def patches(image: np.ndarray, patch_size: int) -> Iterator[np.ndarray]:
    """The patches (P, P, C) of an image (C, H, W), row by row."""
    for top in range(0, SIZE[0], patch_size):
        for left in range(0, SIZE[1], patch_size):
            yield image[:, top : top + patch_size, left : left + patch_size].transpose(1, 2, 0)


def mean_and_deviation(norm_pix_loss: str, patch: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    if norm_pix_loss == "none":
        return 0.0, 1.0
    values = patch if norm_pix_loss == "patch" else image
    return values.mean(), (values.var(ddof=1) + 1e-6) ** 0.5


def by_hand(module: Pretraining, images: Tensor, prediction: Tensor, mask: Tensor) -> dict[str, float]:
    """The metrics, image by image and patch by patch."""
    net = module.net
    errors: dict[str, list[float]] = {"loss": [], "mse": [], "mse_of_mean": []}
    for image, guesses, hidden in zip(images.double().numpy(), prediction.double().numpy(), mask.tolist(), strict=True):
        cut = list(patches(image, net.patch_size))
        visible = [patch for patch, masked in zip(cut, hidden, strict=True) if not masked]
        of_channel = [np.mean([patch[:, :, c] for patch in visible]) for c in range(net.channels)]
        found: dict[str, list[float]] = {name: [] for name in errors}
        for patch, guess, masked in zip(cut, guesses, hidden, strict=True):
            if masked:
                guess = guess.reshape(patch.shape)
                mean, deviation = mean_and_deviation(net.norm_pix_loss, patch, image)
                found["loss"].append(np.mean((guess - (patch - mean) / deviation) ** 2))
                found["mse"].append(np.mean((guess * deviation + mean - patch) ** 2))
                found["mse_of_mean"].append(np.mean((np.array(of_channel) - patch) ** 2))
        for name, values in found.items():
            errors[name].append(np.mean(values))
    return {name: float(np.mean(values)) for name, values in errors.items()}


def evaluated(module: Pretraining, images: dict[str, Tensor], *sizes: int) -> dict[str, float]:
    """The metrics of an evaluation in batches of these sizes."""
    scores: MetricCollection = module.metrics(module.trainer.datamodule)
    parts = zip(*(images[name].split(sizes) for name in images), strict=True)
    for part in parts:
        module.evaluate(module.net, dict(zip(images, part, strict=True)), scores)
    return {name: value.item() for name, value in scores.compute().items()}


@pytest.mark.parametrize("patch_size, channels, norm_pix_loss", MODES)
def test_metrics_by_hand(patch_size: int, channels: int, norm_pix_loss: str) -> None:
    module = prepared(patch_size, channels, norm_pix_loss)
    images = batch(module)
    _, prediction, mask = module.net(images["image"], module.noise(images), 0.5)
    expected = by_hand(module, images["image"], prediction, mask)
    for sizes in [(8,), (5, 2, 1)]:  # an evaluation's last batch is smaller, and its images weigh as much as others
        assert evaluated(module, images, *sizes) == pytest.approx(expected, rel=1e-5), sizes
    assert (abs(expected["mse"] - expected["loss"]) < 1e-9) == (norm_pix_loss == "none")


@pytest.mark.parametrize("patch_size, channels, norm_pix_loss", MODES)
def test_a_perfect_prediction_shows_the_original_everywhere(
    patch_size: int, channels: int, norm_pix_loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = prepared(patch_size, channels, norm_pix_loss)
    images = batch(module)
    targets = []
    for image in images["image"].double().numpy():
        pairs = [(patch, *mean_and_deviation(norm_pix_loss, patch, image)) for patch in patches(image, patch_size)]
        targets.append(np.stack([((patch - mean) / deviation).ravel() for patch, mean, deviation in pairs]))
    perfect = torch.from_numpy(np.stack(targets)).float()
    monkeypatch.setattr(module.net, "forward_decoder", lambda latent, ids_restore: perfect)
    scores = evaluated(module, images, 8)
    assert scores["loss"] < 1e-9 and scores["mse"] < 1e-9
    assert module.shown.shape == (8, 4, 3, *SIZE)
    for panel in (0, 2, 3):
        torch.testing.assert_close(module.shown[:, panel], images["raw"].expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_size, channels", [(1, 1), (2, 3)])
def test_panels_pixel_by_pixel(patch_size: int, channels: int) -> None:
    module = prepared(patch_size, channels, "none")
    images = batch(module)
    noise = module.noise(images)
    _, prediction, mask = module.net(images["image"], noise, 0.5)
    wild = module.net.reconstruct(images["image"], 3 * prediction)
    shown = module.panels(images["image"], wild, mask)
    mean, std = MEAN[channels], STD[channels]
    tokens_a_row = SIZE[1] // patch_size
    outside = 0
    for i in range(8):
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                masked = mask[i, row // patch_size * tokens_a_row + column // patch_size] == 1
                original, hidden, guessed, pasted = shown[i, :, :, row, column].tolist()
                colour = [c * (channels > 1) for c in range(3)]
                exact = [wild[i, c, row, column].item() * std[c] + mean[c] for c in colour]
                outside += not 0 <= min(exact) <= max(exact) <= 1
                assert guessed == pytest.approx([min(max(value, 0), 1) for value in exact], abs=1e-6)
                assert original == pytest.approx([images["raw"][i, c, row, column].item() for c in colour], abs=1e-6)
                assert hidden == (pytest.approx(MASKED) if masked else original)
                assert pasted == (guessed if masked else original)
    assert outside > 10  # values that no screen shows were there to be clamped


def test_the_figure_shows_all_panels_as_they_are() -> None:
    module = prepared(2, 3, "none")
    evaluated(module, batch(module, images=3), 3)
    drawn = figure(module.shown, "title")
    assert [axis.get_title() for axis in drawn.axes[:4]] == ["original", "masked", "reconstruction",
                                                             "with visible pixels"]  # fmt: skip
    for axis, panel in zip(drawn.axes, module.shown.flatten(0, 1), strict=True):
        np.testing.assert_array_equal(np.asarray(axis.images[0].get_array()), panel.permute(1, 2, 0).numpy())

"""Image generation: a diffusion Transformer on latents or pixels, trained to predict noise, judged by its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from common.errors import InputError
from common.files import write_atomically
from common.randomness import normal, uniform
from common.training.module import Cost, Experiment
from common.training.optim import Recipe
from common.training.progress import within_batch_of
from common.training.watchdog import pulse_of
from diffusion.cost import activation_bytes, forward_flops
from diffusion.dit import DiT
from diffusion.evaluation import BY_INCEPTION, Asked, Evaluation, as_json, compared, evaluate, load_extractor
from diffusion.features import INCEPTION_FILE
from diffusion.fingerprint import fingerprint
from diffusion.image_sets import ROUNDING, Folder, Prepared
from diffusion.initialisation import initialise_dit
from diffusion.latent_data import LatentData
from diffusion.pictures import grid
from diffusion.process import GaussianDiffusion
from diffusion.samples import PUBLISHED, SampleFolder, Sampling, as_pixels
from diffusion.sampling import Sampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = 4  # of the timesteps, whose losses are told apart
SHOWN = 16  # samples of the logged picture
GRID = 64  # samples of the picture beside a folder of them


class Generation(Experiment):
    """The paper's image generation (section 4.3). Patch size 1 makes every latent pixel a token.

    The loss is DiT's: the squared error of the noise, and the variational bound for the variance alone. In validation
    noise and timesteps are a function of the image's index, so that two runs can be compared; `mse_q1` to `mse_q4` are
    the error over quarters of the timesteps, from the least noise to the most.

    Args:
        optim: the optimiser recipe.
        conditional: tell the model the class of an image.
        picture_epochs: log a picture of samples every this many epochs, and after the last; 0 logs none.
        picture_steps: of DDIM, for that picture.
        predict: what `predict` and `test` generate.
        evaluation: how `test` judges it.
        dit: the model's options, see `diffusion.DiT`.
    """

    data_class = LatentData
    headline = "loss"
    higher_is_better = False
    picture = "samples"
    pictured = judged = "samples"

    def __init__(
        self,
        optim: Recipe,
        conditional: bool = True,
        picture_epochs: int = 10,
        picture_steps: int = 50,
        predict: Sampling = PUBLISHED,
        evaluation: Evaluation = BY_INCEPTION,
        **dit: Any,
    ) -> None:
        super().__init__(optim, picture_epochs)
        self.conditional, self.predict, self.evaluation = conditional, predict, evaluation
        if not 2 <= picture_steps <= 1000:
            raise InputError(f"model.picture_steps: {picture_steps} are not between 2 and the 1000 of training")
        self.picture_steps = picture_steps
        self.dit = dit
        self.process = GaussianDiffusion()

    def build(self, data: LatentData) -> DiT:
        classes = data.classes if self.conditional else 0
        return DiT(input_size=data.input_size, channels=data.input_channels, classes=classes, **self.dit)

    def initialise(self, net: DiT, source: str) -> dict[str, Any]:
        return initialise_dit(net, source, self.trainer.datamodule.fingerprint)

    def cost(self, net: DiT) -> Cost:
        flops = forward_flops(net)
        parameters = sum(p.numel() for p in net.parameters())
        return Cost(net.tokens, parameters, flops, 3 * flops, activation_bytes(net, self.precision))

    def notes(self, net: DiT) -> dict[str, Any]:
        data = self.trainer.datamodule
        return {
            "latent": "x".join(map(str, (*data.input_size, data.input_channels))),
            "sampling": f"{self._forwards} forwards, {self._forwards * forward_flops(net) / 1e9:.4g} GFLOP a sample",
        }

    @property
    def _forwards(self) -> int:
        """Of the net, for a sample."""
        return self.predict.steps * (2 if self.conditional and self.predict.guidance > 1 else 1)

    def test_flops(self, net: DiT) -> int:
        return self.predict.samples * self._forwards * forward_flops(net)

    # Training

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        x0 = batch["image"].float()
        t = (self.draws("timestep", batch, 1)[:, 0] * self.process.steps).long()
        keys = self.trainer.seed, self.trainer.global_step, batch["place"]
        noise = normal("noise", *keys, n=x0[0].numel()).view_as(x0)
        drops = self.draws("label dropout", batch, 1)[:, 0] if self.net.classes else None
        mse, bound = self.losses(self.net, x0, t, noise, batch["label"], drops)
        return (mse + bound).mean()

    def losses(
        self, net: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor, drops: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = net(self.process.q_sample(x0, t, noise), t, labels if net.classes else None, drops)
        return self.process.training_losses(output, x0, t, noise)

    # Evaluation

    def metrics(self, data: LatentData) -> MetricCollection:
        names = ("loss", "mse", *(f"mse_q{quarter}" for quarter in range(1, QUARTERS + 1)))
        return MetricCollection({name: MeanMetric(nan_strategy="disable") for name in names})

    def evaluate(self, net: DiT, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        x0, index = batch["image"].float(), batch["index"]
        quarter = index % QUARTERS
        length = self.process.steps // QUARTERS
        t = quarter * length + (uniform("evaluation timestep", index, n=1)[:, 0] * length).long()
        noise = normal("evaluation noise", index, n=x0[0].numel()).view_as(x0)
        mse, bound = self.losses(net, x0, t, noise, batch["label"])
        scores["loss"].update(mse + bound)
        scores["mse"].update(mse)
        for number in range(QUARTERS):
            if (quarter == number).any():
                scores[f"mse_q{number + 1}"].update(mse[quarter == number])

    def draw(self, title: str) -> Figure:
        _, net = next(self.evaluated("val"))
        numbers = torch.arange(SHOWN, device=self.device)
        labels = numbers % net.classes if net.classes else None
        guidance = self.predict.guidance if net.classes and net.label_dropout else 1.0
        sampler = Sampler(self.process, "ddim", self.picture_steps, guidance, self.predict.guidance_channels)
        images = as_pixels(self.generate(sampler, net, numbers, labels, pulse_of(self.trainer)))
        return grid(images, self.names_of(labels), f"{title}: DDIM, {self.picture_steps} steps, guidance {guidance:g}")

    def generate(
        self, sampler: Sampler, net: DiT, numbers: Tensor, labels: Tensor | None, beat: Callable[[float], None]
    ) -> Tensor:
        """Images (B, C, H, W) in about [-1, 1], which a GPU may still be computing; `beat` as the sampler takes it."""
        with self.trainer.precision_plugin.forward_context():  # Lightning opens it for its own steps alone
            latents = sampler(net, numbers, labels, beat)
        return self.trainer.datamodule.decode(latents, pulse_of(self.trainer))

    def names_of(self, labels: Tensor | None) -> list[str]:
        names = self.trainer.datamodule.class_names
        return [] if labels is None else [names[label] for label in labels.tolist()]

    # Prediction: a PNG for each sample, and a picture of the first

    def setup(self, stage: str) -> None:
        limits = {"predict": self.trainer.limit_predict_batches, "test": self.trainer.limit_test_batches}
        for name, limit in limits.items():
            if stage == name and limit != 1.0:
                raise InputError(f"trainer.limit_{name}_batches: {limit} would leave samples out; give their number as "
                                 "model.predict.samples")

    def on_predict_start(self) -> None:
        self._open_folder()

    def predict_step(self, batch: dict[str, list[int]], _: int) -> None:
        self._sample(batch["number"])

    def on_predict_epoch_end(self) -> None:
        self._close_folder()

    def _open_folder(self) -> None:
        _, net = next(self.evaluated("test"))
        data, chosen = self.trainer.datamodule, self.predict
        if not net.classes:
            chosen = replace(chosen, guidance=1.0)
        steps = f"step{self.trained_steps}-" if self.trained_steps else ""
        self.folder = SampleFolder(Path(self.trainer.default_root_dir) / "samples" / f"{steps}{chosen.name}")
        self.sampler = Sampler(self.process, chosen.solver, chosen.steps, chosen.guidance, chosen.guidance_channels,
                               chosen.seed)  # fmt: skip
        self.labels = chosen.labels(net.classes)
        self.folder.open({
            "samples": chosen.samples,
            "weights": self.initialised.get("weights", "raw" if self.average is None else "ema"),
            "weights_sha256": fingerprint(net, net.beyond_shapes()),
            "trained_steps": self.trained_steps,
            "autoencoder": data.autoencoder_source,
            "autoencoder_sha256": data.fingerprint,
            **self.sampler.record(),
            "classes": chosen.classes or net.classes,
            "precision": str(self.trainer.precision),
            "autoencoder_precision": None if data.autoencoder is None else "32-true",
            "rounding": ROUNDING,
        }, self.labels)  # fmt: skip

    def _sample(self, numbers: list[int]) -> None:
        """Generates those of the samples that are not there yet."""
        numbers = self.folder.missing(numbers)
        if numbers:
            _, net = next(self.evaluated("test"))
            asked = torch.tensor(numbers), None if self.labels is None else self.labels[numbers]
            # A copy that waits would wait until a GPU has decoded the batch before.
            there = (None if some is None else some.to(self.device, non_blocking=True) for some in asked)
            self.folder.write_behind(numbers, self.generate(self.sampler, net, *there, self._beat))

    def _beat(self, share: float) -> None:
        """So much of a batch of samples is done, which may take hours."""
        pulse_of(self.trainer)()
        within_batch_of(self.trainer)(share)
        self.folder.look()

    def _close_folder(self) -> None:
        self.folder.wait()
        self.trainer.strategy.barrier()  # until every rank's samples are there
        if not self.trainer.is_global_zero:
            return
        folder, samples, channels = self.folder, self.predict.samples, self.trainer.datamodule.channels
        if samples >= min(folder.asked, GRID):  # else there is a picture of more of them
            names = self.names_of(None if self.labels is None else self.labels[:GRID])
            grid(folder.read(0, min(samples, GRID), channels), names, folder.path.name).savefig(folder.beside(".png"))
        print(f"{samples:,} samples -> {folder.path}, the first of them in {folder.beside('.png').name}")
        if self.predict.npz:
            folder.pack(samples, channels, self.labels)
            print(f"packed: {folder.beside('.npz')}")

    # Test: the same samples, judged

    def on_test_epoch_start(self) -> None:
        data = self.trainer.datamodule
        extractor = load_extractor(self.evaluation.extractor, data.root / INCEPTION_FILE)
        self.extractor = [extractor]  # in a list: no part of me
        # What is known to fail is refused before the sampling, which may take hours.
        reference = self.evaluation.reference
        self.reference = Prepared(data) if reference is None else Path(reference)
        labels = self.predict.labels(self.net.classes)
        if "agreement" not in extractor.tags:
            labels = None  # of no concern to Inception
        if labels is not None and extractor.classes != self.net.classes:
            rank_zero_warn(f"agreement is left out: {extractor.name} tells {extractor.classes} classes, the samples "
                           f"are of {self.net.classes}")
            labels = None
        self.metrics_tested = [key for key in extractor.tags if key != "agreement" or labels is not None]
        asked = Asked("model.predict.samples", self.predict.samples, data.image_size, labels)
        compared(asked, self.reference, extractor, self.metrics_tested, self.evaluation.allow_few_samples)
        self._open_folder()

    def test_step(self, batch: dict[str, list[int]], _: int) -> None:
        self._sample(batch["number"])

    def on_test_epoch_end(self) -> None:
        self._close_folder()
        trainer, data = self.trainer, self.trainer.datamodule
        [extractor] = self.extractor
        samples = Folder(self.folder.path, extractor.channels, self.predict.samples)
        values, self.record = evaluate(
            samples, self.reference, extractor.to(self.device), self.metrics_tested, data.eval_batch_size,
            self.evaluation.allow_few_samples, self.device, trainer.global_rank, trainer.world_size, pulse_of(trainer),
        )  # fmt: skip
        values = {f"test/{tag}": value for tag, value in values.items()}
        self.log_dict({"step": float(self.trained_steps), **values})
        if trainer.is_global_zero:
            write_atomically(self.folder.beside(".json"), as_json(values, self.record))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["autoencoder_sha256"] = self.trainer.datamodule.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        data = self.trainer.datamodule
        if checkpoint.get("autoencoder_sha256", data.fingerprint) != data.fingerprint:
            raise InputError(f"data.autoencoder: {data.autoencoder_source} is not the autoencoder that this run was "
                             "trained with, or has been trained anew since; its latents mean something else")

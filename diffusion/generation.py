"""Image generation: a diffusion Transformer on latents or pixels, trained to predict noise, judged by its samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from common.errors import InputError
from common.randomness import normal, uniform
from common.training.module import Cost, Experiment
from common.training.optim import Recipe
from diffusion.cost import activation_bytes, forward_flops
from diffusion.dit import DiT
from diffusion.latent_data import LatentData
from diffusion.pictures import grid
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler, SolverName, labels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = 4  # of the timesteps, whose losses are told apart
SHOWN = 16  # samples of the logged picture


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
    """

    samples: int = 64
    solver: SolverName = "ddpm"
    steps: int = 250
    guidance: float = 1.5
    guidance_channels: int = 3
    seed: int = 0
    classes: list[int] | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"model.predict.samples: {self.samples} is not a positive number of samples")

    @property
    def name(self) -> str:
        """A folder's, for samples that differ in nothing but their number."""
        guided = f"-g{self.guidance:g}" + (f"-c{self.guidance_channels}" if self.guidance_channels != 3 else "")
        classes = "-classes" + "_".join(map(str, self.classes)) if self.classes else ""
        return f"{self.solver}{self.steps}{guided}{classes}-s{self.seed}"


PUBLISHED = Sampling()


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
        dit: the model's options, see `diffusion.DiT`.
    """

    data_class = LatentData
    headline = "loss"
    higher_is_better = False
    picture = "samples"

    def __init__(
        self,
        optim: Recipe,
        conditional: bool = True,
        picture_epochs: int = 10,
        picture_steps: int = 50,
        predict: Sampling = PUBLISHED,
        **dit: Any,
    ) -> None:
        super().__init__(optim, picture_epochs)
        self.conditional, self.predict = conditional, predict
        self.picture_steps = picture_steps
        self.dit = dit
        self.process = GaussianDiffusion()

    def build(self, data: LatentData) -> DiT:
        classes = data.classes if self.conditional else 0
        return DiT(input_size=data.input_size, channels=data.input_channels, classes=classes, **self.dit)

    def cost(self, net: DiT) -> Cost:
        flops = forward_flops(net)
        parameters = sum(p.numel() for p in net.parameters())
        return Cost(net.tokens, parameters, flops, 3 * flops, activation_bytes(net, self.precision))

    def notes(self, net: DiT) -> dict[str, Any]:
        data, sampling = self.trainer.datamodule, self.predict
        forwards = sampling.steps * (2 if sampling.guidance > 1 else 1)
        return {
            "latent": "x".join(map(str, (*data.input_size, data.input_channels))),
            "sampling": f"{forwards} forwards, {forwards * forward_flops(net) / 1e9:.4g} GFLOP a sample",
        }

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
        images = self.generate(sampler, net, numbers, labels)
        return grid(images, self.names_of(labels), f"{title}: DDIM, {self.picture_steps} steps, guidance {guidance:g}")

    def generate(self, sampler: Sampler, net: DiT, numbers: Tensor, labels: Tensor | None) -> Tensor:
        """Images (B, C, H, W) uint8, with DiT's rounding (RECIPES 3.3)."""
        with self.trainer.precision_plugin.forward_context():  # Lightning opens it for its own steps alone
            images = self.trainer.datamodule.decode(sampler(net, numbers, labels))
        return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)

    def names_of(self, labels: Tensor | None) -> list[str]:
        names = self.trainer.datamodule.class_names
        return [] if labels is None else [names[label] for label in labels.tolist()]

    # Prediction: a PNG for each sample, and a picture of the first

    def predict_step(self, batch: dict[str, Any], _: int) -> None:
        from PIL import Image

        _, net = next(self.evaluated("predict"))
        chosen = self.predict
        sampler = Sampler(self.process, chosen.solver, chosen.steps, chosen.guidance if net.classes else 1.0,
                          chosen.guidance_channels, chosen.seed)  # fmt: skip
        numbers = batch["number"]
        images = self.generate(sampler, net, numbers, self.labels_of(net, numbers)).cpu().permute(0, 2, 3, 1).numpy()
        self.samples_folder.mkdir(parents=True, exist_ok=True)
        for number, image in zip(numbers.tolist(), images, strict=True):
            path = self.samples_folder / f"{number:06d}.png"
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            picture.save(path.with_suffix(".tmp"), format="PNG")
            path.with_suffix(".tmp").replace(path)  # a sample is whole, or not there

    def labels_of(self, net: DiT, numbers: Tensor) -> Tensor | None:
        if not net.classes:
            return None
        classes = self.predict.classes or list(range(net.classes))
        if not all(0 <= label < net.classes for label in classes):
            raise InputError(f"model.predict.classes: {classes} are not all among the {net.classes} classes, counted "
                             "from 0")
        return labels_of(numbers, classes, self.predict.seed)

    def on_predict_end(self) -> None:
        print(f"{self.predict.samples - len(self.missing_samples())} of {self.predict.samples} samples -> "
              f"{self.samples_folder}")

    @property
    def samples_folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / "samples" / self.predict.name

    def missing_samples(self) -> list[int]:
        """Numbers of the samples that are not there yet: a sample is a function of its number."""
        there = {path.stem for path in self.samples_folder.glob("*.png")}
        return [number for number in range(self.predict.samples) if f"{number:06d}" not in there]

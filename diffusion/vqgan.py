"""Training of the autoencoder whose latents a diffusion Transformer learns: VQGAN, or its KL form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from common.data import ImageData
from common.data.loader import Draw
from common.errors import InputError
from common.parallel.reduction import mean_over_ranks, sum_over_ranks
from common.randomness import normal, permutation, seeded
from common.training.module import Cost, Experiment
from common.training.optim import Recipe, adamw, lr_schedule, parameter_groups
from diffusion.autoencoder import Autoencoder
from diffusion.codebook import COLLAPSED, CodebookUsage, add_counts, usage
from diffusion.discriminator import PatchDiscriminator
from diffusion.evaluation import UNJUDGED, Reconstruction
from diffusion.features import full_precision
from diffusion.initialisation import initialise_autoencoder
from diffusion.metrics import ReconstructionDistance
from diffusion.objective import Adversary, Objective, Players, Pull, StepCost, step_cost
from diffusion.perceptual import LPIPS, SMALLEST, has_vgg16, vgg16_file
from diffusion.pictures import grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # images of the logged picture
MEASURED = 2048  # training images that scale and shift of the latents are measured on
SSIM_WINDOW = 11  # pixels a side

PUBLISHED = Adversary()


class AutoencoderTraining(Experiment):
    """Trains an autoencoder by reconstruction, and against a discriminator from a given step on.

    `train/loss` is the sum that is minimised, the discriminator's part included; its terms are curves of their own.
    Metrics: `loss`, which is `l1` and the weighed `perceptual` distance; `psnr` and `ssim` of images in [0, 1], means
    over images; `codebook_usage` and `codebook_perplexity` (VQ) over the whole validation, in training over a whole
    epoch; `kl` in nats of an image (KL). `ssim` needs images of 11x11 pixels. Where VGG16's weights are, `test` has
    `perceptual` without training by it, which needs 16x16 pixels. With an extractor `test` has `rfid`, the Fréchet
    distance of reconstructions from the images (`rfd_NAME` where it is not Inception).

    The last epoch ends with measuring scale and shift of the latents on training images, as the training sees them:
    they are stored with the weights. Earlier checkpoints hold 1 and 0.

    Args:
        optim: the optimiser recipe, the same for both players; gradients are clipped for each player by itself.
        perceptual: `lpips` needs VGG16's weights below `data.root`, see `python -m common.weights`.
        perceptual_weight: see `diffusion.objective.Objective`, as the two below.
        codebook_weight: of VQ.
        kl_weight: of KL.
        adversary: the discriminator and its timing.
        picture_epochs: log a picture of reconstructions every this many epochs, and after the last; 0 logs none.
        evaluation: what `test` measures besides.
        autoencoder: the model's options, see `diffusion.autoencoder.Autoencoder`.
    """

    data_class = ImageData
    headline = "loss"
    higher_is_better = False
    picture = "reconstructions"
    static_graph = False  # the discriminator learns from a step on
    makes_room = "model.adversary.norm=group (another discriminator, which normalises each image by itself)"

    def __init__(
        self,
        optim: Recipe,
        perceptual: Literal["lpips", "none"] = "lpips",
        perceptual_weight: float = 1.0,
        codebook_weight: float = 1.0,
        kl_weight: float = 1e-6,
        adversary: Adversary = PUBLISHED,
        picture_epochs: int = 10,
        evaluation: Reconstruction = UNJUDGED,
        **autoencoder: Any,
    ) -> None:
        super().__init__(optim, picture_epochs)
        if optim.layer_decay != 1:
            raise InputError(f"model.optim.layer_decay: {optim.layer_decay} needs layers in a row, which an "
                             "autoencoder has not; leave it at 1")
        self.lpips = perceptual == "lpips"
        self.objective = Objective(adversary, perceptual_weight, codebook_weight, kl_weight)
        self.whole_batch = adversary.weight > 0 and adversary.norm == "batch"
        self.evaluation = evaluation
        self.autoencoder = autoencoder
        self.discriminator: PatchDiscriminator | None = None
        self.image_size: tuple[int, int] = (0, 0)  # of the data that `build` was given
        self._step_cost: StepCost | None = None
        self._collapsed = False
        self._pull = Pull()  # of the step's micro-batches so far

    # Building and cost

    def build(self, data: ImageData) -> Autoencoder:
        if set(data.mean) != {0.5} or set(data.std) != {0.5}:
            raise InputError(f"data.mean, data.std: {list(data.mean)} and {list(data.std)}; an autoencoder takes "
                             "images in [-1, 1], so leave both at 0.5")
        net = Undecayed(image_channels=data.channels, **self.autoencoder)
        height, width = self.image_size = data.image_size
        if height % net.factor or width % net.factor:
            raise InputError(f"data.image_size: {height}x{width} is not a multiple of {net.factor}, by which "
                             f"{len(net.config['multipliers'])} multipliers reduce images")
        if self.lpips:
            vgg16_file(data.root)
            if min(height, width) < SMALLEST:
                raise InputError(f"model.perceptual: lpips needs images of {SMALLEST}x{SMALLEST} pixels at least, not "
                                 f"{height}x{width}; choose none")
        return net

    def assemble(self) -> None:
        super().assemble()
        with seeded("discriminator", self.trainer.seed):
            self.discriminator = self._adversary(self.net)
        if self.net.kind == "vq":  # of the epoch so far, on all ranks; a checkpoint within an epoch holds them
            self.register_buffer("code_counts", torch.zeros(self.net.config["codebook_size"], dtype=torch.int64))

    def initialise(self, net: Autoencoder, source: str) -> dict[str, Any]:
        return initialise_autoencoder(net, net.config, source)

    @cached_property
    def judge(self) -> LPIPS:
        """Frozen, and kept where neither checkpoints nor the optimiser nor a change of precision find it."""
        with torch.inference_mode(False):  # what a validation asked for first, a training will use
            return LPIPS().load(self.trainer.datamodule.root).to(self.device)

    @property
    def perceptual(self) -> LPIPS | None:
        """What training minimises."""
        return self.judge if self.lpips else None

    def _adversary(self, net: Autoencoder) -> PatchDiscriminator | None:
        return self.objective.adversary.build(net.config["image_channels"], self.image_size)

    def cost(self, net: Autoencoder) -> Cost:
        if self._step_cost is None:  # once: the curves ask for it at every point

            def players() -> Players:
                return Players(Autoencoder(**net.config), self._adversary(net), LPIPS() if self.lpips else None)

            self._step_cost = step_cost(self.objective, players, net.config["image_channels"], self.image_size)
        cells = self.image_size[0] * self.image_size[1] // net.factor**2
        return Cost(cells, sum(p.numel() for p in net.parameters()), *self._step_cost)

    def notes(self, net: Autoencoder) -> dict[str, Any]:
        adversary = self.objective.adversary
        height, width = (side // net.factor for side in self.image_size)
        notes = {"latents": f"{net.kind}, {height}x{width}x{net.channels}", "discriminator": "none"}
        with torch.device("meta"):
            discriminator = self._adversary(net)
        if discriminator is not None:
            parameters = sum(p.numel() for p in discriminator.parameters())
            notes["discriminator"] = f"{parameters:,} parameters, {adversary.norm} norm"
            notes["discriminator learns"] = f"from step {adversary.start - adversary.warmup:,}"
            notes["discriminator is felt"] = f"from step {adversary.start:,}"
            if self.trainer.accumulate_grad_batches > 1:
                notes["a micro-batch before the last"] = "then costs another backward, which the hours below leave out"
        return notes

    # Training

    def configure_optimizers(self) -> tuple[list, list]:
        data = self.trainer.datamodule
        lr = self.optim.peak_lr(data.global_batch)
        optimizer = adamw(self.net, self.optim, lr)
        if self.discriminator is not None:
            for group in parameter_groups(self.discriminator, self.optim, lr):
                optimizer.add_param_group(group)
        factor = self.optim.factor(data.global_batch, data.steps_per_epoch, self.trainer.max_epochs)
        return [optimizer], [lr_schedule(optimizer, factor)]

    def training_step(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        images, step = batch["image"], self.trainer.global_step
        more = (number + 1) % self.trainer.accumulate_grad_batches > 0
        players = Players(self.net, self.discriminator, self.perceptual)
        loss, terms, out = self.objective(players, images, self._noise(batch), step, mean_over_ranks, self._pull, more)
        if not more:
            self._pull = Pull()
        if out.indices is not None:
            self.code_counts += sum_over_ranks(add_counts(torch.zeros_like(self.code_counts), out.indices))
        if self.discriminator is not None and "discriminator" not in terms:
            # Distributed training waits for a gradient of every parameter in every step.
            loss = loss + 0 * sum(parameter.sum() for parameter in self.discriminator.parameters())
        return {"loss": loss, **terms}

    def _noise(self, batch: dict[str, Tensor]) -> Tensor | None:
        """KL's draws, by each image's place in the global batch."""
        if self.net.kind == "vq":
            return None
        shape = self.net.channels, *(side // self.net.factor for side in batch["image"].shape[-2:])
        keys = self.trainer.seed, self.trainer.global_step, batch["place"]
        return normal("posterior", *keys, n=shape[0] * shape[1] * shape[2]).view(-1, *shape)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        adversary = self.objective.adversary
        if self.discriminator is not None and self.trainer.global_step < adversary.start - adversary.warmup:
            for parameter in self.discriminator.parameters():
                parameter.grad = None  # a gradient of 0 would start its moments, and let weight decay shrink it

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.discriminator is not None and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), gradient_clip_val)

    def on_train_epoch_end(self) -> None:
        if self.net.kind == "vq":
            self._report_codebook()
        if self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            # Before the last checkpoint, which is written after this. Every rank measures the same images.
            for _, net in self.evaluated("train"):
                net.measure(net.moments(images) for images in training_images(self.trainer.datamodule, self.device))

    def _report_codebook(self) -> None:
        measured = {name: value.item() for name, value in usage(self.code_counts).items()}
        self.code_counts.zero_()
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics({f"train/{name}": value for name, value in measured.items()},
                                            step=self.trainer.global_step)  # fmt: skip
        share, was = measured["codebook_usage"], self._collapsed
        self._collapsed = share < COLLAPSED
        if self._collapsed and not was:
            rank_zero_warn(f"the codebook collapses: epoch {self.trainer.current_epoch + 1} used {share:.1%} of its "
                           f"{len(self.code_counts)} codes, fewer than {COLLAPSED:.0%}. Try a smaller "
                           "model.codebook_size, a lower model.optim.lr, or a later model.adversary.start")

    # Evaluation

    def metrics(self, data: ImageData) -> MetricCollection:
        scores: dict[str, Any] = {"loss": MeanMetric(), "l1": MeanMetric()}
        if self.lpips:
            scores["perceptual"] = MeanMetric()
        # Of each image, then their mean.
        scores["psnr"] = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))
        if min(data.image_size) >= SSIM_WINDOW:
            scores["ssim"] = StructuralSimilarityIndexMeasure(data_range=1.0)
        if self.net.kind == "vq":
            scores["codebook"] = CodebookUsage(self.net.config["codebook_size"])
        else:
            scores["kl"] = MeanMetric()
        return MetricCollection(scores, compute_groups=False)

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        data = self.trainer.datamodule
        # Of several ranks the first decides: all must have the same metrics, and may have other disks.
        there = self.trainer.strategy.broadcast(has_vgg16(data.root)) and min(data.image_size) >= SMALLEST
        judge = self.judge if there and not self.lpips else None  # read now: a damaged file is told before all else
        extractor = self.evaluation.load(data)
        if extractor:
            self.record = self.evaluation.record(extractor, data)
        for scores in self.scores.values():
            if extractor:
                scores.add_metrics(self.evaluation.distance(extractor))
            if judge:
                scores.add_metrics({"perceptual": MeanMetric()})
            scores.to(self.device)

    def evaluate(self, net: Autoencoder, batch: dict[str, Tensor], scores: MetricCollection) -> None:
        images = batch["image"].float()
        with torch.autocast(images.device.type, enabled=False):  # as `LatentData` encodes and decodes
            out = net(images)
        reconstructions = out.images.float()
        distances = self.objective.distances(self.perceptual, reconstructions, images)
        loss = self.objective.of_pixels(distances)
        if "perceptual" in scores and not self.lpips:
            distances["perceptual"] = self.judge(reconstructions, images)
        for name, values in {"loss": loss, **distances}.items():
            scores[name].update(values)
        made, truth = in_colours(reconstructions), in_colours(images)
        with full_precision(images.device):  # SSIM takes differences of squares, of which bf16 leaves nothing
            for name in {"psnr", "ssim"} & set(scores):
                scores[name].update(made, truth)
        if out.indices is None:
            scores["kl"].update(out.kl)
        else:
            scores["codebook"].update(out.indices)
        for score in scores.values():
            if isinstance(score, ReconstructionDistance):
                score.update(in_bytes(reconstructions), in_bytes(images))
        if self.shown is None:
            self.shown = in_bytes(images[:SHOWN]), in_bytes(reconstructions[:SHOWN])

    def draw(self, title: str) -> Figure:
        return grid(torch.cat(self.shown), [], f"{title}: images above, reconstructions below", len(self.shown[0]))

    # Prediction: for each file its reconstruction, of the model's image size

    def predict_step(self, batch: dict[str, Any], _: int) -> None:
        from torchvision.io import write_png

        _, net = next(self.evaluated("predict"))
        data = self.trainer.datamodule
        with torch.autocast(self.device.type, enabled=False):
            reconstructions = in_bytes(net(batch["image"].float()).images)
        for name, image in zip(batch["file"], reconstructions.cpu(), strict=True):
            path = Path(self.trainer.default_root_dir) / "predictions" / f"{Path(name).relative_to(data.images)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, str(path))

    def on_predict_epoch_end(self) -> None:
        print(f"reconstructions -> {Path(self.trainer.default_root_dir) / 'predictions'}")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["autoencoder"] = self.net.config  # builds the net again without the data that it was trained on


def training_images(data: ImageData, device: torch.device | str) -> Iterator[Tensor]:
    """Batches of the same 2,048 training images at most at every call, augmented as in the first epoch."""
    chosen = permutation("latents", data.trainer.seed, n=len(data.sets["train"]))[:MEASURED]
    for indices in chosen.split(data.eval_batch_size):
        batch = data.sets["train"].__getitems__([Draw(0, index, 0) for index in indices.tolist()])
        batch = {name: value.to(device) for name, value in batch.items()}
        yield ImageData.on_after_batch_transfer(data, batch, 0)["image"]


class Undecayed(Autoencoder):
    """An Autoencoder that says what of it weight decay leaves alone: codes are places, and 0 is no better a place."""

    def no_weight_decay(self) -> set[str]:
        return {"model.quantize.embedding.weight"}


def in_colours(images: Tensor) -> Tensor:
    """Images from [-1, 1] to [0, 1]."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def in_bytes(images: Tensor) -> Tensor:
    """Images from [-1, 1] to uint8, rounded."""
    return (255 * in_colours(images)).round().byte()

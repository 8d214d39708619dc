"""What generation costs beside the obvious alternative, on the CPU; peers and sampling on a GPU where --device says.

  step      the training step under the Trainer of `fit`, with curves, progress, run folder, TensorBoard and average,
            against the same net, loss, AdamW and average in a plain loop; both under bf16, or in fp32 on a processor
            that only imitates bf16
  peers     the step in fp32 beside that of diffusers' DiTTransformer2DModel of the same size; on a GPU compiled and in
            bf16, beside theirs and our own in eager fp32
  latents   images that training reads as cached latents, against images that are encoded as they come
  sampling  guided samples in batches, both predictions in one forward, against one sample at a time in two forwards;
            on a GPU compiled and in bf16, against the same and against eager fp32
  metrics   FID's statistics of images against torch-fidelity's; memory and time of precision and recall, and of the
            analysis of attention, each in a process of its own. It takes many minutes, and is no part of `all`

The sides take turns, and each figure is the median over rounds of what was measured side by side; memory is measured
once. The result is Markdown with command, hardware and versions, ready for RESULTS.md, and JSON where --json names a
file; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import Dataset

from common.advice import quieten
from common.benchmark.device import FAST, PLAIN, add_device, autocast, parsed, prepare_device, start_afresh
from common.benchmark.interleaving import interleaved, raced, ratios, timed
from common.benchmark.report import Section, check_counts, publish
from common.benchmark.trainer_cost import fit, without_lightning
from common.command import Parser, run_command
from common.data.loader import Draw, GlobalBatchData
from common.device import has_bf16
from common.training.cli import StudyCLI
from common.training.compilation import compile_blocks
from diffusion import latents
from diffusion.dit import DiT
from diffusion.generation import Generation
from diffusion.latent_data import LatentData
from diffusion.metrics import NEIGHBOUR
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler, ddim

MODES = ("step", "peers", "latents", "sampling")
ON_GPU = ("peers", "sampling")
# Of peers and samples: what a core computes soon, and the paper's DiT with as many images as keep a GPU busy.
DEFAULTS = {"cpu": {"size": "nano", "side": 8, "batch": 64, "samples": 64},
            "cuda": {"size": "large", "side": 32, "batch": 16, "samples": 16}}  # fmt: skip
BATCH = 128  # of training, as in the config
SAMPLED_AT_ONCE = 64
CHANNELS, SIDE, CLASSES = 4, 8, 10  # of the latents of a step; and the channels and classes of peers and samples
GUIDANCE = 1.5
CONFIGS = Path(__file__).parent / "configs"
RECIPE = ("--config", str(CONFIGS / "digits.yaml"), "--model.optim.warmup_epochs=0")  # the config's outlasts our epoch
STEP_COLUMNS = ("model", "latents", "batch", "plain loop ms", "Trainer ms", "Trainer / plain loop (quartiles)")
LATENTS_COLUMNS = ("autoencoder", "latents", "encoded images/s", "cached images/s", "times as fast (quartiles)")
SAMPLING_COLUMNS = ("model", "in batches", "one by one", "one by one, samples/s", "in batches, samples/s",
                    "times as fast (quartiles)")  # fmt: skip


# The training step


class TensorSet(Dataset):
    """Random latents with labels, in memory."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(images, CHANNELS, SIDE, SIDE, generator=generator)
        self.labels = torch.randint(CLASSES, (images,), generator=generator)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        epoch, index, place = torch.tensor(draws).T
        return {"image": self.latents[index], "label": self.labels[index], "epoch": epoch, "index": index,
                "place": place}  # fmt: skip


class RandomLatents(GlobalBatchData):
    """As many batches as there are steps.

    Args:
        steps: of the one epoch.
    """

    dataset, image_size, channels = "random latents", (SIDE, SIDE), CHANNELS
    input_size, input_channels, classes, fingerprint = image_size, channels, CLASSES, None  # as LatentData's

    def __init__(self, steps: int) -> None:
        super().__init__(BATCH)
        self.steps = steps

    def load(self, split: str) -> TensorSet:
        return TensorSet(self.steps * BATCH)


class TimedGeneration(Generation):
    """Generation on data that no autoencoder has made, before each of whose steps a plain loop takes one of its own.

    Both sides of a pair of steps are thus on the machine as it is at that moment. `seconds` per step are means, since
    the Trainer logs in some steps and not in others; the first pair is left out, in which both set themselves up.
    """

    data_class = RandomLatents

    def on_train_start(self) -> None:
        super().on_train_start()
        self._plain, self._sums = plain_steps(self, self.trainer.datamodule), {"plain loop": 0.0, "Trainer": 0.0}

    def on_train_batch_start(self, batch: dict[str, Tensor], i: int) -> None:  # in nobody's autocast
        ended = time.perf_counter()  # from the end of the plain step before, with all that a Trainer does in between
        next(self._plain)
        begins = time.perf_counter()
        if i >= 2:
            self._sums["Trainer"] += ended - self._began
            self._sums["plain loop"] += begins - ended
            self.seconds = {side: seconds / (i - 1) for side, seconds in self._sums.items()}
        self._began = begins


def trained(patch_size: int, steps: int, size: str = "nano") -> StudyCLI:
    """`fit` for one epoch, in turns with the plain loop, in a run folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as runs:
        return fit("diffusion", runs, "step", *RECIPE, "--model=diffusion.benchmark.TimedGeneration",
                   f"--model.size={size}", f"--model.patch_size={patch_size}",
                   "--data=diffusion.benchmark.RandomLatents", f"--data.steps={steps}",
                   f"--trainer.precision={'bf16-mixed' if has_bf16() else '32-true'}")  # fmt: skip


def plain_steps(module: Generation, data: RandomLatents) -> Iterator[None]:
    """The steps of the same training in the loop that one would write by hand."""
    recipe, process, images = module.optim, module.process, data.sets["train"]
    net = module.build(data)
    weights, average = list(net.parameters()), list(copy.deepcopy(net).parameters())
    optimizer = AdamW(weights, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    for chosen in torch.randperm(len(images)).split(BATCH):
        with without_lightning():
            x0, labels = images.latents[chosen], images.labels[chosen]
            t, noise, drops = torch.randint(process.steps, (BATCH,)), torch.randn_like(x0), torch.rand(BATCH)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                output = net(process.q_sample(x0, t, noise), t, labels, drops)
                mse, bound = process.training_losses(output, x0, t, noise)
                loss = (mse + bound).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - recipe.ema)
        yield


def measure_step(patch_size: int, steps: int, rounds: int, size: str = "nano") -> tuple[str, ...]:
    """A row of the table; a round is a run of the Trainer, in turns with the plain loop."""
    trained(patch_size, steps, size)  # imports and first calls are over before the clock runs
    plain, own = zip(*(trained(patch_size, steps, size).model.seconds.values() for _ in range(rounds)), strict=True)
    return (
        f"{size}/{patch_size}", f"{SIDE}x{SIDE}x{CHANNELS}", str(BATCH),
        *(f"{1e3 * statistics.median(values):.1f}" for values in (plain, own)), f"{ratios(plain, own):.3f}",
    )  # fmt: skip


# Reading latents


def latent_data(kind: str, folder: Path) -> dict[str, LatentData]:
    """The data of a training on the embedded autoencoder's latents: encoded as they come, and cached in `folder`."""
    once = "--trainer.limit_train_batches=1"  # weights are good enough for their speed
    config = str(CONFIGS / "autoencoder_digits.yaml")
    autoencoder = fit("diffusion", folder, f"autoencoder-{kind}", "--config", config, "--model.kind", kind, once)
    options = [*RECIPE, "--data.autoencoder", str(autoencoder.folder)]
    cache = folder / f"latents-{kind}"
    with redirect_stdout(None):
        latents.main([str(cache), *options])
    data = {}
    for side, more in {"encoded": [], "cached": ["--data.latents", str(cache)]}.items():
        cli = fit("diffusion", folder, f"{side}-{kind}", *options, *more, once)
        cli.trainer.training = True  # as it was in the epoch that is over
        data[side] = cli.datamodule
    return data


def batches(data: LatentData) -> Iterator[dict[str, Tensor]]:
    """An epoch as a model is given it."""
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch, 0)


def images_read(data: LatentData) -> int:
    return sum(len(batch["image"]) for batch in batches(data))


def measure_latents(kind: str, rounds: int) -> tuple[str, ...]:
    """A row of the table; a round is an epoch of both sides."""
    with tempfile.TemporaryDirectory() as folder:
        data = latent_data(kind, Path(folder))
        images = {side: images_read(some) for side, some in data.items()}  # and the first calls are over
        seconds = interleaved({side: timed(partial(images_read, some)) for side, some in data.items()}, rounds)
    speeds = (f"{images[side] / statistics.median(values):,.0f}" for side, values in seconds.items())
    shape = "x".join(map(str, (*data["cached"].input_size, data["cached"].input_channels)))
    return kind, shape, *speeds, f"{ratios(seconds['cached'], seconds['encoded']):.1f}"


# Sampling


def untrained(options: argparse.Namespace, patch_size: int) -> DiT:
    """The net of peers and samples."""
    torch.manual_seed(0)
    return DiT(options.side, patch_size, CHANNELS, CLASSES, size=options.size).to(options.device)


def in_batches(net: DiT, sampler: Sampler, numbers: Tensor, labels: Tensor) -> Tensor:
    chunks = zip(numbers.split(SAMPLED_AT_ONCE), labels.split(SAMPLED_AT_ONCE), strict=True)
    return torch.cat([sampler(net, *chunk) for chunk in chunks])


@torch.no_grad()
def one_by_one(net: DiT, sampler: Sampler, numbers: Tensor, labels: Tensor) -> Tensor:
    """The same samples in the loop that one would write by hand."""
    scheduler, timesteps = ddim(sampler.visited), sampler.visited.timesteps.to(numbers.device)
    samples, nothing = [], labels.new_tensor([net.classes])
    for number, label in zip(numbers.split(1), labels.split(1), strict=True):
        x = sampler.noise("sample", number, (net.channels, *net.input_size))
        for step in scheduler.timesteps.tolist():
            timestep = timesteps[step][None]
            conditional = net(x, timestep, label)[:, : net.channels].float()
            null = net(x, timestep, nothing)[:, : net.channels].float()
            x = scheduler.step(null + sampler.guidance * (conditional - null), step, x).prev_sample
        samples.append(x)
    return torch.cat(samples)


def measure_sampling(net: DiT, samples: int, steps: int, rounds: int, fast: bool = False) -> Iterator[tuple[str, ...]]:
    """A row of the table for each numerics of the samples that are drawn one by one; a round is all samples of both
    sides. Both are in fp32; or those in batches are `fast`, compiled and in bf16, and the others that as well, or not.
    """
    start_afresh()
    device = next(net.parameters()).device
    numbers = torch.arange(samples, device=device)
    sampler = Sampler(GaussianDiffusion(), "ddim", steps, GUIDANCE, guidance_channels=CHANNELS)
    nets = {PLAIN: net.eval()}
    if fast:
        nets = {FAST: copy.deepcopy(net), f"eager {PLAIN}": net}
        compile_blocks(nets[FAST])

    def drawn(side: Callable[..., Tensor], numerics: str) -> Tensor:
        with autocast(device, numerics == FAST):
            return side(nets[numerics], sampler, numbers, numbers % CLASSES)

    together = next(iter(nets))
    for alone in nets:
        ours, theirs, ratio = raced(partial(drawn, in_batches, together), partial(drawn, one_by_one, alone), rounds,
                                    device)  # fmt: skip
        yield (f"/{net.patch_size}, {net.depth} x {net.width}", together, alone,
               *(f"{samples / seconds:,.1f}" for seconds in (theirs, ours)), f"{ratio:.2f}")


# The command


def sections(options: argparse.Namespace) -> Iterator[Section]:
    fast = options.device == "cuda"
    tf32 = "; products in fp32 are TF32's" if fast else ""
    if options.mode in ("step", "all"):
        rows = [measure_step(patch_size, options.steps, options.rounds, options.size) for patch_size in (1, 2)]
        precision = "under bf16" if has_bf16() else "in fp32"
        yield Section(f"Training step {precision}, {options.steps} steps:", STEP_COLUMNS, rows)
    if options.mode in ("peers", "all"):
        from diffusion import peers

        rows = [row for patch_size in (1, 2) for row in peers.measure(
            untrained(options, patch_size), options.batch * patch_size, options.rounds, fast)]
        yield Section(f"Training step, beside diffusers' DiTTransformer2DModel{tf32}:", peers.COLUMNS, rows)
    if options.mode in ("latents", "all"):
        rows = [measure_latents(kind, options.rounds) for kind in ("vq", "kl")]
        yield Section("Latents of digits for training, by the autoencoder of autoencoder_digits.yaml:",
                      LATENTS_COLUMNS, rows)
    if options.mode in ("sampling", "all"):
        rows = [row for patch_size in (1, 2) for row in measure_sampling(
            untrained(options, patch_size), options.samples, options.solver_steps, options.rounds, fast)]
        shape = f"{options.side}x{options.side}x{CHANNELS}"
        yield Section(f"{options.samples} samples of {shape} in batches of {SAMPLED_AT_ONCE}, {options.solver_steps} "
                      f"steps of DDIM, guidance {GUIDANCE}{tf32}:", SAMPLING_COLUMNS, rows)
    if options.mode == "metrics":
        from diffusion import metrics_cost as cost  # matplotlib, which the other modes do without

        rows = [cost.measure_statistics(side, options.images, options.rounds) for side in cost.SIDES]
        clock = "the processor's time" if options.threads == 1 else "the clock"
        yield Section("Mean and covariance of Inception's 2048 features (random weights) of uint8 images in memory, "
                      f"{cost.BATCH} at once, fp32, by torch-fidelity {version('torch-fidelity')} and the suite; by "
                      f"{clock}:", cost.FID_COLUMNS, rows)
        rows = [cost.measure_gathering(cost.SIDES[0], options.images),
                cost.measure_precision_recall(options.generated, options.references, cost.FEATURES),
                cost.measure_attention(cost.ATTENDING, cost.ATTENDED, options.analysed)]
        yield Section("Memory of a process of its own at its peak, above what it held before, measured once:",
                      cost.MEMORY_COLUMNS, rows)


def _parser() -> Parser:
    parser = Parser("python -m diffusion.benchmark", __doc__)
    parser.add_argument("mode", nargs="?", choices=[*MODES, "metrics", "all"], default="all", help="default: all")
    cpu, gpu = DEFAULTS.values()
    parser.add_argument("--size", default=cpu["size"], help="step, peers, sampling: row of the table of sizes (default "
                        f"{cpu['size']}; on a GPU {gpu['size']})")  # fmt: skip
    for name, default, text in [
        ("rounds", 15, "pairs that a median is taken over"),
        ("threads", 1, "threads of torch; one is the least noisy on a shared machine"),
        ("steps", 20, "step: steps of each round"),
        ("side", cpu["side"], f"peers, sampling: of the latents, in latent pixels; on a GPU {gpu['side']}"),
        ("batch", cpu["batch"], f"peers: latents of a step at /1; twice as many at /2; on a GPU {gpu['batch']}"),
        ("samples", cpu["samples"], f"sampling: samples of each round; on a GPU {gpu['samples']}"),
        ("solver_steps", 10, "sampling: steps of DDIM"),
        ("images", 64, "metrics: images of each round whose statistics are taken"),
        ("generated", 50_000, "metrics: samples that precision and recall are of"),
        ("references", 10_000, "metrics: images that they are compared with"),
        ("analysed", 20, "metrics: images whose attention is analysed"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    add_device(parser, ON_GPU)
    parser.add_argument("--json", metavar="FILE", help="write the tables as JSON too")
    return parser


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What `sections` is told by a command line."""
    return parsed(_parser(), arguments, DEFAULTS)


def main(arguments: list[str]) -> int:
    options = options_of(arguments)
    prepare_device(options, ON_GPU)
    check_counts(options, rounds=1, threads=1, steps=3, side=2, batch=1, samples=1, solver_steps=2, images=2,
                 generated=NEIGHBOUR + 1, references=NEIGHBOUR + 1, analysed=1)
    torch.set_num_threads(options.threads)
    quieten()
    publish("diffusion.benchmark", arguments, options.rounds, sections(options), options.json)
    return 0


if __name__ == "__main__":
    run_command(main)

"""What the suite costs, and beside what users would take instead.

  step     a training step of any study's config, on noise: milliseconds, images/s, FLOPs, share of the device's peak,
           memory. Further options of `fit` follow --, as in `step --batch 64 -- --model.size tiny --model.patch_size 1`
  peers    forward, backward and AdamW of our VisionTransformer against timm's of the same size, weights and numerics,
           and of ours in bf16 against timm's in fp32; then MAE's against the same through timm's blocks, and DiT's
           against diffusers', as python -m mae.benchmark and python -m diffusion.benchmark measure them
  sample   DiT's samples in batches against one by one, as python -m diffusion.benchmark measures them
  trainer  the Trainer of `fit`, with curves, progress, run folder and TensorBoard, against a plain loop: of a model
           that does nothing, and of ViT-T on 32x32 pixels in patches of 2x2
  augment  crop, flip, jitter and grayscale of 32x32 images in batches against PIL, which works image by image
  data     random crops of 28x28 of photographs on disk: decoded by PIL, by the suite, and from its store, a core each;
           with --device cuda also by a GPU that holds the store
  store    writing such a store on all cores against PIL's doing the same, and against decoding alone; no part of `all`
  sequence what a device keeps for the backward of an image whose tokens it shares with another one, against a formula
  growth   time and memory of a step against the number of tokens, up to 50,176, and against the width, with the fitted
           curve beside the formula. It takes minutes, and is no part of `all`
  scaling  `fit` over several processes of this machine against one, with the same global batch and with the same batch
           on each; and, computed, the paper's configs over 8 and 64 H200. It takes minutes, and is no part of `all`.
           Further options of `fit` follow --, as in `scaling -- --model.patch_size 2`
  startup  seconds from pressing enter until a command has ended: help, a mistake in a config, a list; beside a bare
           `import lightning`. A round takes most of a minute, so that --rounds 5 is enough; no part of `all`
  gpu      all that only a GPU shows, in about 20 minutes, and no part of `all`: see common/benchmark/gpu.py

`step` runs where `fit` would, `peers`, `sample` and `data` where --device says, the others on the CPU. The sides take
turns, and each figure is the median over rounds of what was measured side by side. The result is Markdown with command,
hardware and versions, ready for RESULTS.md, and JSON where --json names a file; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from common.advice import quieten
from common.benchmark.device import add_device, parsed, prepare_device
from common.benchmark.report import Section, check_counts, publish
from common.command import Parser, run_command
from common.errors import InputError
from common.figure import check_file

MODES = ("step", "peers", "sample", "trainer", "augment", "data", "sequence")
ON_GPU = ("peers", "sample", "data")
DEFAULTS = {"cpu": {"depth": 2}, "cuda": {"depth": None}}
CONFIG = "supervised/configs/digits.yaml"


def sections(options: argparse.Namespace) -> Iterator[Section]:
    # The modes are imported where they run: Lightning and timm cost seconds.
    if options.mode in ("step", "all"):
        from common.benchmark import step

        rows = [step.measure(config, options.fit, options.batch or 128, options.compile, options.rounds)
                for config in options.config]
        yield Section("Training step of a config, on noise:", step.COLUMNS, rows)
    if options.mode in ("peers", "all"):
        from common.benchmark import peers

        device = torch.device(options.device)
        rows = [peers.measure(case, options.rounds, device)
                for case in peers.cases(options.depth, options.batch, device)]
        yield Section(f"Training step (forward, backward, AdamW); MB are {peers.MEMORY[device.type]}:", peers.COLUMNS,
                      rows)
        for study in ("mae", "diffusion"):
            yield from of_study(study, "peers", options)
    if options.mode in ("sample", "all"):
        yield from of_study("diffusion", "sampling", options)
    if options.mode in ("trainer", "all"):
        from common.benchmark import trainer_cost

        rows = trainer_cost.measure(options.steps, options.rounds)
        yield Section("Training step under the Trainer and in plain loops, fp32:", trainer_cost.COLUMNS, rows)
    if options.mode in ("augment", "all"):
        from common.benchmark import augmentation

        rows = augmentation.measure(options.images, options.rounds)
        yield Section(f"Augmentation of {options.images} images, one thread:", augmentation.COLUMNS, rows)
    if options.mode in ("data", "all"):
        from common.benchmark import pipelines

        rows = pipelines.measure(options.folder, options.side, options.crops, options.rounds,
                                 torch.device(options.device))
        yield Section(f"Random resized crops to 28x28, {options.crops} images, one thread:", pipelines.COLUMNS, rows)
    if options.mode == "store":
        from common.benchmark import building

        workers = os.cpu_count()
        rows = building.measure(options.folder, options.side, options.crops, workers, options.rounds)
        yield Section(f"{options.crops} images by {workers} processes of one thread:", building.COLUMNS, rows)
    if options.mode in ("sequence", "all"):
        from common.benchmark import sequence

        yield Section("Kept of one block for the backward of one image, fp32, one device and two:",
                      sequence.MEASURED_COLUMNS, list(sequence.measured_rows()))
        yield Section("ViT-B/1 at 224x224 (50,177 tokens), bf16-mixed, one image a step, by formula, per device:",
                      sequence.COMPUTED_COLUMNS, list(sequence.computed_rows()))
    if options.mode == "growth":
        from common.benchmark import growth

        points = growth.measured(growth.cases(options.depth), options.rounds, options.seconds)
        yield Section(growth.caption(points), growth.COLUMNS, growth.rows(points))
        growth.draw(points, Path(options.figure))
    if options.mode == "scaling":
        from common.benchmark import scaling

        rows = scaling.measured(options.config[0], options.fit, options.batch or 128, options.processes,
                                options.threads, options.rounds)  # fmt: skip
        yield Section(f"Measured with {options.config[0]}: whole runs of `fit`, the median over their steps:",
                      scaling.MEASURED_COLUMNS, rows)
        yield Section(scaling.assumptions(options.mfu), scaling.COMPUTED_COLUMNS, list(scaling.computed(options.mfu)))
    if options.mode == "startup":
        from common.benchmark import startup

        yield Section("From pressing enter until the command has ended:", startup.COLUMNS,
                      startup.measure(options.rounds))


def of_study(study: str, mode: str, options: argparse.Namespace) -> Iterator[Section]:
    """The tables of a study's own benchmark, at its own sizes; named, since the studies build on this package."""
    benchmark = importlib.import_module(f"{study}.benchmark")
    return benchmark.sections(benchmark.options_of(
        [mode, "--rounds", str(options.rounds), "--device", options.device]))  # fmt: skip


def _parser() -> Parser:
    parser = Parser("python -m common.benchmark", __doc__)
    parser.add_argument("mode", nargs="?", choices=[*MODES, "store", "growth", "scaling", "startup", "gpu", "all"],
                        default="all", help="default: all")
    for name, default, text in [
        ("rounds", 15, "pairs that a median is taken over"),
        ("threads", 1, "threads of torch; one is the least noisy on a shared machine"),
        ("depth", DEFAULTS["cpu"]["depth"], "peers, growth: blocks of the models; ViT-Tiny has 12, and all on a GPU"),
        ("batch", None, "images of a step. peers, of ViT: default 128 up to 16x16 pixels and 8 at 32x32; 64 on a GPU. "
                        "step, scaling: default 128, in scaling of one process"),
        ("steps", 2000, "trainer: steps of each round, of the null model"),
        ("images", 2048, "augment: images of each round"),
        ("crops", 1024, "data, store: images of each round"),
        ("side", 96, "data, store: pixels of the store's squares"),
        ("seconds", 60, "growth: that the steps of a model may take; what would take longer is left out"),
        ("processes", 2, "scaling: processes beside one, each of so many threads"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=text + (f" (default {default})" if default else ""))
    add_device(parser, ON_GPU)
    parser.add_argument("--folder", metavar="DIR",
                        help="data, store: class folders of photographs (default: three that scikit-image ships)")
    parser.add_argument("--config", nargs="+", default=[CONFIG], metavar="FILE",
                        help=f"step, scaling: STUDY/configs/NAME.yaml that is trained (default {CONFIG})")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="step: compile the blocks (default: on a GPU alone)")
    parser.add_argument("--mfu", type=float, default=0.6, metavar="SHARE",
                        help="scaling: of 790 TFLOP/s that an H200 is taken to reach (default %(default)s)")
    parser.add_argument("--figure", default="runs/benchmark/growth.png", metavar="FILE",
                        help="growth: its figure (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the tables as JSON too")
    return parser


def main(arguments: list[str]) -> int:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = parsed(_parser(), own, DEFAULTS)
    options.fit = arguments[len(own) + 1 :]
    prepare_device(options, ON_GPU)
    check_counts(options, rounds=1, threads=1, depth=1, batch=1, steps=2, images=1, crops=1, side=1, seconds=1,
                 processes=2)
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu {options.mfu}: give a share above 0, up to 1")
    if options.mode == "scaling" and len(options.config) > 1:
        raise InputError(f"--config: scaling trains one, and there are {len(options.config)}")
    if options.mode == "growth":
        check_file(Path(options.figure))  # before minutes of measuring
    if options.mode == "gpu":
        from common.benchmark import gpu

        return gpu.run()
    torch.set_num_threads(options.threads)
    quieten()
    publish("common.benchmark", arguments, options.rounds, sections(options), options.json)
    return 0


if __name__ == "__main__":
    run_command(main)

"""What a training step costs, and how it scales, on the CPU; a GPU is not used.

  step     forward, backward and AdamW of our VisionTransformer against timm's of the same size, weights and numerics
  trainer  the Trainer of `fit`, with curves, progress, run folder and TensorBoard, against a plain loop: null model
  augment  crop, flip, jitter and grayscale of 32x32 images in batches against PIL, which works image by image
  data     random crops of 28x28 of photographs on disk: decoded by PIL, by the suite, and from its store, a core each
  sequence what a device keeps for the backward of an image whose tokens it shares with another one, against a formula
  scaling  `fit` over several processes of this machine against one, with the same global batch and with the same batch
           on each; and, computed, the paper's configs over 8 and 64 H200. It takes minutes, and is no part of `all`.
           Further options of `fit` follow --, as in `scaling -- --model.patch_size 2`

The sides take turns, and each figure is the median over rounds of what was measured side by side. The result is
Markdown with command, hardware and versions, ready for RESULTS.md; progress goes to standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from common.benchmark.report import check_counts, circumstances, quieten_lightning, table
from common.command import run_command
from common.errors import InputError

MODES = ("step", "trainer", "augment", "data", "sequence")


def results(options: argparse.Namespace) -> Iterator[str]:
    # The modes are imported where they run: Lightning and timm cost seconds.
    if options.mode in ("step", "all"):
        from common.benchmark import training_step

        rows = [training_step.measure(case, options.rounds)
                for case in training_step.cases(options.depth, options.batch)]
        yield from ("", "Training step (forward, backward, AdamW):", "", *table(training_step.COLUMNS, rows))
    if options.mode in ("trainer", "all"):
        from common.benchmark import trainer_cost

        rows = trainer_cost.measure(options.steps, options.rounds)
        yield from ("", f"Null model, {options.steps} steps:", "", *table(trainer_cost.COLUMNS, rows))
    if options.mode in ("augment", "all"):
        from common.benchmark import augmentation

        rows = augmentation.measure(options.images, options.rounds)
        yield from ("", f"Augmentation of {options.images} images, one thread:", "", *table(augmentation.COLUMNS, rows))
    if options.mode in ("data", "all"):
        from common.benchmark import pipelines

        rows = pipelines.measure(options.folder, options.side, options.crops, options.rounds)
        yield from ("", f"Random resized crops to 28x28, {options.crops} images, one thread:", "",
                    *table(pipelines.COLUMNS, rows))
    if options.mode in ("sequence", "all"):
        from common.benchmark import sequence

        yield from ("", "Kept of one block for the backward of one image, fp32, one device and two:", "")
        yield from table(sequence.MEASURED_COLUMNS, list(sequence.measured_rows()))
        yield from ("", "ViT-B/1 at 224x224 (50,177 tokens), bf16-mixed, one image a step, by formula, per device:", "")
        yield from table(sequence.COMPUTED_COLUMNS, list(sequence.computed_rows()))
    if options.mode == "scaling":
        from common.benchmark import scaling

        rows = scaling.measured(options.config, options.fit, options.batch or 128, options.processes, options.threads,
                                options.rounds)  # fmt: skip
        yield from ("", f"Measured with {options.config}: whole runs of `fit`, the median over their steps:", "",
                    *table(scaling.MEASURED_COLUMNS, rows))
        yield from ("", scaling.assumptions(options.mfu), "",
                    *table(scaling.COMPUTED_COLUMNS, list(scaling.computed(options.mfu))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m common.benchmark", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=[*MODES, "scaling", "all"], default="all", help="default: all")
    for name, default, text in [
        ("rounds", 15, "pairs that a median is taken over"),
        ("threads", 1, "threads of torch; one is the least noisy on a shared machine"),
        ("depth", 2, "step: blocks of the model at CIFAR's size; ViT-Tiny has 12"),
        ("batch", None, "step: images; default 128 at 8x8 pixels and 8 at 32x32. scaling: of one process, default 128"),
        ("steps", 2000, "trainer: steps of each round"),
        ("images", 2048, "augment: images of each round"),
        ("crops", 1024, "data: images of each round"),
        ("side", 96, "data: pixels of the store's squares"),
        ("processes", 2, "scaling: processes beside one, each of so many threads"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N",
                            help=text + (f" (default {default})" if default else ""))
    parser.add_argument("--folder", metavar="DIR",
                        help="data: class folders of photographs (default: three that scikit-image ships)")
    parser.add_argument("--config", default="supervised/configs/digits.yaml", metavar="FILE",
                        help="scaling: STUDY/configs/NAME.yaml that is trained (default %(default)s)")
    parser.add_argument("--mfu", type=float, default=0.6, metavar="SHARE",
                        help="scaling: of 790 TFLOP/s that an H200 is taken to reach (default %(default)s)")
    return parser


def main(arguments: list[str]) -> int:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    options = _parser().parse_args(own)
    options.fit = arguments[len(own) + 1 :]
    check_counts(options, rounds=1, threads=1, depth=1, batch=1, steps=2, images=1, crops=1, side=1, processes=2)
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu {options.mfu}: give a share above 0, up to 1")
    torch.set_num_threads(options.threads)
    quieten_lightning()
    for line in [*circumstances("common.benchmark", arguments, options.rounds), *results(options)]:
        print(line)
    return 0


if __name__ == "__main__":
    run_command(main)

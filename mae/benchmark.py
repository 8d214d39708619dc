"""What masked autoencoding costs; python -m common.benchmark step has the configs' steps.

  masking  what masking saves of a step's time and memory, next to the formulas of mae.cost. The encoder sees a quarter
           of the tokens and the decoder all of them, so that the decoder decides how much is left of the saving: three
           are measured. The loss is taken over all tokens on both sides, since without a mask there are no masked ones
  peers    the step through our blocks against timm's, at the demo's size and at CIFAR's, on pixels and on patches; on a
           GPU, where --device says so, at CIFAR's on pixels, in bf16 and compiled

A step is forward, loss, backward and AdamW, in fp32 on the CPU. The sides take turns, and each ratio is the median over
rounds of what was measured side by side. The result is Markdown for RESULTS.md, and JSON where --json names a file.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial

import torch

from common.advice import quieten
from common.benchmark.device import FAST, PLAIN, add_device, prepare_device
from common.benchmark.interleaving import interleaved, ratios, timed
from common.benchmark.memory import kept_bytes
from common.benchmark.report import Section, check_counts, publish
from common.command import Parser, run_command
from mae.cost import activation_bytes, forward_flops
from mae.model import MaskedAutoencoder
from mae.step import MASKED, WHOLE, Decoder, Step, autoencoder

TIME_COLUMNS = ("decoder", "ms at 0.75", "ms at 0", "measured ratio (quartiles)", "ratio of FLOPs", "apart")
MEMORY_COLUMNS = ("decoder", "MB at 0.75", "blocks at 0.75", "MB at 0", "blocks at 0", "ratio", "ratio of blocks")
# One narrower than any, that of our configs, MAE's.
DECODERS = (Decoder(192, 8, 3), Decoder(256, 8, 8), Decoder(512, 8, 16))


def measure(net: MaskedAutoencoder, batch: int, rounds: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A row of the table of times, and one of the table of memory per image."""
    name = f"{net.decoder_width} x {net.decoder_depth} x {net.decoder_heads}"
    step = Step(net, batch)
    kept = {side: kept_bytes(partial(step.loss, side), net.parameters()) / batch for side in (MASKED, WHOLE)}
    formula = {side: activation_bytes(net, side) for side in kept}
    memory = (
        name, *(f"{count / 1e6:.1f}" for side in kept for count in (kept[side], formula[side])),
        f"{kept[MASKED] / kept[WHOLE]:.3f}", f"{formula[MASKED] / formula[WHOLE]:.3f}",
    )  # fmt: skip

    for side in (MASKED, WHOLE):
        step(side)  # the first allocates the optimiser's state
    sides = {"masked": timed(partial(step, MASKED)), "whole": timed(partial(step, WHOLE))}
    seconds = interleaved(sides, rounds)
    measured = ratios(seconds["whole"], seconds["masked"])  # below 1: the share of a whole step that is left
    expected = forward_flops(net, MASKED) / forward_flops(net, WHOLE)
    return (
        name, *(f"{1e3 * statistics.median(times):.0f}" for times in seconds.values()),
        f"{measured:.3f}", f"{expected:.3f}", f"{100 * (measured.median / expected - 1):+.1f} %",
    ), memory  # fmt: skip


def sections(options: argparse.Namespace) -> Iterator[Section]:
    if options.mode in ("masking", "all"):
        yield from masking(options)
    if options.mode in ("peers", "all"):
        from mae import peers  # timm costs a second

        device, fast = torch.device(options.device), options.device == "cuda"
        rows = [peers.measure(case.net().to(device), case.batch, options.rounds, fast) for case in peers.cases(device)]
        yield Section(f"Training step, {FAST if fast else PLAIN}, through our blocks and through timm's:",
                      peers.COLUMNS, rows)


def masking(options: argparse.Namespace) -> Iterator[Section]:
    rows = [measure(autoencoder(options.size, options.patch_size, options.image, 3, decoder), options.batch,
                    options.rounds) for decoder in DECODERS]  # fmt: skip
    model = f"{options.size}/{options.patch_size} at {options.image}x{options.image}, batch {options.batch}, {PLAIN}"
    times, memory = zip(*rows, strict=True)
    yield Section(f"Training step of {model}; decoders as width x blocks x heads:", TIME_COLUMNS, times)
    yield Section("Kept for the backward, per image, measured and of the blocks alone by formula:", MEMORY_COLUMNS,
                  memory)


def _parser() -> Parser:
    parser = Parser("python -m mae.benchmark", __doc__)
    parser.add_argument("mode", nargs="?", choices=["masking", "peers", "all"], default="all", help="default: all")
    parser.add_argument("--size", default="tiny", help="masking: row of the table of sizes (default tiny)")
    for name, default, text in [
        ("patch_size", 1, "masking: side of a patch in pixels"),
        ("image", 32, "masking: side of an image in pixels"),
        ("batch", 2, "masking: images of a step"),
        ("rounds", 12, "pairs that a median is taken over"),
        ("threads", 1, "threads of torch; one is the least noisy on a shared machine"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    add_device(parser, ["peers"])
    parser.add_argument("--json", metavar="FILE", help="write the tables as JSON too")
    return parser


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What `sections` is told by a command line."""
    return _parser().parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = options_of(arguments)
    prepare_device(options, ["peers"])
    check_counts(options, patch_size=1, image=1, batch=1, rounds=1, threads=1)
    torch.set_num_threads(options.threads)
    quieten()
    publish("mae.benchmark", arguments, options.rounds, sections(options), options.json)
    return 0


if __name__ == "__main__":
    run_command(main)

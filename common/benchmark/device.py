"""Where the sides of a benchmark run, the CPU or a GPU: the option, and what a GPU asks for."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from common.errors import InputError

CPU = torch.device("cpu")
FAST, PLAIN = "bf16, compiled", "fp32"  # how a step runs by default on a GPU, and on the CPU


def add_device(parser: argparse.ArgumentParser, modes: Sequence[str]) -> None:
    """Adds --device for the modes that take it."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help=f"{', '.join(modes)}: cpu (default), or cuda, where models are the paper's and run in "
                             "bf16, compiled")


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str], defaults: Mapping[str, Mapping[str, Any]]
) -> argparse.Namespace:
    """The options of a command line, of which those that were left out are the defaults of the device that it names."""
    parser.set_defaults(**defaults[parser.parse_args(arguments).device])
    return parser.parse_args(arguments)


def prepare_device(options: argparse.Namespace, modes: Sequence[str]) -> None:
    """Has fp32 on a GPU be TF32, as `fit` has it.

    Args:
        options: with `device` and `mode`.
        modes: that take the device.

    Raises:
        InputError: a GPU for a mode that takes none, or that is not there.
    """
    if options.device == "cpu":
        return
    if options.mode not in modes:
        raise InputError(f"--device cuda: {options.mode} does not take it; {', '.join(modes[:-1])} and "
                         f"{modes[-1]} do")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that torch can use; give cpu, or leave it out")
    torch.set_float32_matmul_precision("high")


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Without the cache of casts, as Lightning's bf16-mixed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def start_afresh() -> None:
    """Gives back a GPU what earlier measurements hold in circles of references, and forgets their compiled forms, which
    would be tried before one's own.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()


def peak_bytes(step: Callable[[], object], net: nn.Module) -> int:
    """What a training step of the net takes on its GPU at most, above what lies there before its gradients do."""
    net.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before

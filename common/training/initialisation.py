"""init_from: weights of another run, of a checkpoint, of a published timm or MAE model, and what of them was loaded."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from common.errors import InputError
from common.model import VisionTransformer, resample_position, sincos_position
from common.runs import trained
from common.training.checkpoints import newest_readable, read

REQUIRED = "required"  # what a config says that makes no sense without trained weights


def check_source(source: str) -> None:
    """Refuses a source that is not there before anything is built."""
    if source in (REQUIRED, ""):  # the second: of an empty variable of the shell
        raise InputError("--init_from: this config starts from trained weights; name a run folder or a checkpoint, or "
                         "null to start from random weights")
    if not Path(source).exists():
        raise InputError(f"--init_from: there is no run folder or file {source}")
    if (there := trained(source)) and there["status"] != "finished":
        rank_zero_warn(f"--init_from: {source} is not finished ({there['status']}, step {there['step']}); its newest "
                       "checkpoint is taken")


def state_dict_of(source: str | Path, weights: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """The net's weights in a run folder, a checkpoint of the suite, or a plain state dict (`model`, `state_dict`).

    `ema` takes the average where the checkpoint holds one.
    """
    return weights_in(content_of(source), weights, source)


def content_of(source: str | Path) -> dict[str, Any]:
    """What a checkpoint holds; of a run folder its newest readable one."""
    path = Path(source)
    if not path.is_dir():
        return read(path)
    checkpoint = newest_readable(path / "checkpoints")
    if checkpoint is None:
        raise InputError(f"--init_from: {path} is not a run folder with a checkpoint")
    return read(checkpoint)


def weights_in(
    content: dict[str, Any], weights: Literal["ema", "raw"], source: str | Path
) -> dict[str, Tensor]:
    """The net's weights in the content of a checkpoint that `source` names."""
    if "loops" in content:  # written by the suite: the LightningModule's `net`
        if weights == "ema" and "ema" in content:
            return content["ema"]["state_dict"]
        return {k.removeprefix("net."): v for k, v in content["state_dict"].items() if k.startswith("net.")}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"--init_from: {source} holds no weights")
    return tensors


def initialise(net: nn.Module, backbone: VisionTransformer, source: str) -> dict[str, Any]:
    """Loads what fits of `source` into `net` and says what was loaded, missing, unexpected, resampled.

    A position table of another grid is resampled, which brings a 2D prior back (paper, section 2.2): it is said, and
    recorded as `position_prior: interpolated`. The head may differ (another task), and so may a decoder; the encoder
    must be covered.

    Raises:
        InputError: parameters of the encoder are not in the source, or differ in shape, or it has more blocks.
    """
    content = content_of(source)
    weights, beyond = weights_in(content, "ema", source), content.get("beyond_shapes", {})
    for name, value in backbone.beyond_shapes().items():
        if name != "grid" and beyond.get(name, value) != value:
            raise InputError(f"--init_from: {source} was trained with {name}={beyond[name]}, and model.{name} is "
                             f"{value}; the shapes of the weights do not tell, but what they compute does")
    report: dict[str, Any] = {"source": str(source), "trained": trained(source), "loaded": [], "missing": [],
                              "unexpected": [], "resampled": []}  # fmt: skip
    prefix = next((f"{name}." for name, module in net.named_modules() if module is backbone and name), "")
    if not any(key.startswith(prefix) for key in weights):  # a classifier's weights for a net around a backbone
        weights = {prefix + key: value for key, value in weights.items()}
    own = net.state_dict()
    for name in backbone.position_tables:
        _fit_table(f"{prefix}{name}", own, weights, net, backbone, beyond.get("grid"), report)
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    projection = f"{prefix}patch_embed.proj.weight"
    kernel = (backbone.width, backbone.channels, backbone.patch_size, backbone.patch_size)
    if projection in own and projection in weights and weights[projection].shape == kernel:
        fitting[projection] = weights[projection]  # a convolution's, which the patch embedding reshapes
    fresh = tuple(f"{prefix}{name}" for name in backbone.fresh_for_a_task)
    for part in fresh:  # a head or a decoder as a whole or not at all: another one's half would be noise
        if any(key.startswith(part) and key not in fitting for key in [*own, *weights]):
            fitting = {key: value for key, value in fitting.items() if not key.startswith(part)}
    report["loaded"] = [key for key in own if key in fitting]
    report["missing"] = [key for key in own if key not in fitting]
    report["unexpected"] = [key for key in weights if key not in fitting]
    report["resampled"] = [key for key in report["resampled"] if key in fitting]
    uncovered = [key for key in report["missing"] if key.startswith(prefix) and not key.startswith(fresh)]
    if uncovered:
        raise InputError(f"--init_from: {source} does not cover the encoder: {_shapes(uncovered, own, weights)}")
    dropped = [key for key in report["unexpected"] if key.startswith(f"{prefix}blocks.")]
    if dropped:
        raise InputError(f"--init_from: {source} has blocks that this encoder lacks: {_shapes(dropped, weights, own)}")
    net.load_state_dict(fitting, strict=False)
    if report["resampled"]:
        rank_zero_warn(f"{', '.join(report['resampled'])}: the position table was interpolated to another grid, which "
                       "brings a 2D prior back that learned positions do not have (position_prior: interpolated)")
        report["position_prior"] = "interpolated"
    print_report(report)
    return report


@rank_zero_only
def print_report(report: dict[str, Any]) -> None:
    for name in ("loaded", "missing", "unexpected", "resampled"):
        print(f"init_from {name}: {len(report[name])} {_summary(report[name])}")


def _shapes(keys: list[str], here: dict[str, Tensor], there: dict[str, Tensor]) -> str:
    """The first of the keys with their shapes here and there."""
    shapes = [f"{key} {tuple(here[key].shape)} "
              + (f"(there {tuple(there[key].shape)})" if key in there else "(absent)") for key in keys]
    return ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")


def _summary(keys: list[str]) -> str:
    """The keys, or where they are many the modules that they belong to; results.json names them all."""
    if len(keys) <= 8:
        return ", ".join(keys)
    modules = Counter(key.partition(".")[0] for key in keys)
    return "tensors in " + ", ".join(f"{module} ({count})" for module, count in modules.items())


def _fit_table(
    table: str, own: dict[str, Tensor], weights: dict[str, Tensor], net: nn.Module, backbone: VisionTransformer,
    grid: list[int] | None, report: dict[str, Any],
) -> None:  # fmt: skip
    """Makes a position table of `weights` fit, or takes it out of the comparison where the net's own is computed."""
    learned = table in dict(net.named_parameters())
    if not learned:  # it stays as its config says
        own.pop(table, None)
    if table not in weights:
        return
    grid = _grid(weights[table], backbone, grid)
    fixed = _is_fixed(weights[table], backbone, grid)
    if not learned and fixed:
        weights.pop(table)
    elif not learned:
        rank_zero_warn(f"--init_from: {table} is not taken, since model.position={backbone.position}; the weights were "
                       "trained with it")
    elif weights[table].shape[:-1] != own[table].shape[:-1] or grid not in (None, backbone.grid):
        weights[table] = _resampled(weights[table], backbone, grid)
        report["resampled"].append(table)
    if learned and fixed:
        report["position_prior"] = "sincos"


def _grid(table: Tensor, backbone: VisionTransformer, known: list[int] | None) -> tuple[int, int] | None:
    """The grid of a table: what the suite's checkpoints say, or a square; None where neither fits."""
    places = table.shape[1] - backbone.num_prefix_tokens
    grid = tuple(known) if known else (math.isqrt(max(places, 0)),) * 2
    return grid if grid[0] * grid[1] == places else None


def _is_fixed(table: Tensor, backbone: VisionTransformer, grid: tuple[int, int] | None) -> bool:
    """Whether a table is that of sines and cosines, as published MAE's."""
    if grid is None or table.shape[2] % 4:
        return False
    computed = sincos_position(grid, table.shape[2], backbone.num_prefix_tokens)
    return torch.allclose(table.float(), computed, atol=1e-3, rtol=0)


def _resampled(table: Tensor, backbone: VisionTransformer, grid: tuple[int, int] | None) -> Tensor:
    prefix = backbone.num_prefix_tokens
    if grid is None:
        raise InputError(f"--init_from: a position table of {table.shape[1]} rows is of no square grid with {prefix} "
                         "prefix rows, so it cannot be resampled")
    return resample_position(table, grid, backbone.grid, prefix)

"""Trained autoencoders from local files: of a run of this study, or published by others.

Of others two layouts are read: diffusers' (a folder with `config.json` and the weights, such as sd-vae-ft-ema) and that
of latent diffusion's own checkpoints (`state_dict` with `encoder.down.0.block.0...`, such as vq-f8's `model.ckpt`).
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from common.errors import InputError
from common.training.checkpoints import newest_readable, read
from common.training.initialisation import state_dict_of
from diffusion.autoencoder import Autoencoder

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Names of latent diffusion, and of diffusers before its attention had today's, as regular expressions, to diffusers'.
_NAMES = [
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
]

# diffusers' classes, and what the Autoencoder calls them.
_KINDS = {"VQModel": "vq", "AutoencoderKL": "kl"}

# Entries of diffusers' config that change no latent, or are taken over as scale and shift.
_BESIDE_THE_NET = ("sample_size", "force_upcast", "scaling_factor", "shift_factor")


def load_autoencoder(source: str | Path, **options: Any) -> Autoencoder:
    """An Autoencoder with trained weights.

    A run's brings its scale and shift along, and is the average where the run keeps one. A published KL model takes
    them from `scaling_factor` and `shift_factor` of its config, 0.18215 and 0 where there are none, as diffusers does.
    A published VQ model has none (diffusers' class fills in Stable Diffusion's) and starts from 1 and 0 for
    `Autoencoder.measure`, as does a file of either kind.

    Args:
        source: a run folder or one of its checkpoints, a folder in diffusers' layout, or a file in either layout.
        options: of the Autoencoder, where a file holds another than its defaults; runs and folders tell all but
            `beta` and `legacy`.

    Raises:
        InputError: a file that is missing or cannot be read, a config that the Autoencoder cannot express, or weights
            that do not fit one by one: unknown, missing or of another shape.
    """
    net = _loaded(Path(source), options)
    if net.scale == 1 and not net.shift.any():
        rank_zero_warn(f"{source}: the scale of its latents has not been measured, which the last epoch of a training "
                       "does, and python -m diffusion.measure; they are taken as they are")
    return net


def _loaded(source: Path, options: dict[str, Any]) -> Autoencoder:
    if (source / "checkpoints").is_dir():
        checkpoint = newest_readable(source / "checkpoints")
        if checkpoint is None:
            raise InputError(f"{source}: there is no checkpoint yet")
        return _of_run(checkpoint, options)
    if source.is_dir():
        return _of_folder(source, options)
    content = _content(source)
    if "autoencoder" in content:
        return _of_run(source, options)
    net = Autoencoder(**options)
    _fill(net, content, source)
    return net


def _of_run(checkpoint: Path, options: dict[str, Any]) -> Autoencoder:
    config = read(checkpoint).get("autoencoder")
    if config is None:
        raise InputError(f"{checkpoint}: holds no autoencoder; name a run that trained one")
    net = Autoencoder(**{**config, **options})
    net.load_state_dict(state_dict_of(checkpoint))
    return net


def _of_folder(folder: Path, options: dict[str, Any]) -> Autoencoder:
    config = _config(folder / "config.json")
    net = _net(config, folder / "config.json", options)
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise InputError(f"{folder}: there is neither {' nor '.join(WEIGHTS)}")
    _fill(net, _content(weights), weights)
    if net.kind == "kl":
        net.scale.fill_(config.get("scaling_factor") or 0.18215)
        net.shift.fill_(config.get("shift_factor") or 0.0)
    return net


def _config(path: Path) -> dict[str, Any]:
    """diffusers' config of a model. Where an entry is left out, as in the files of its first versions, it is the
    default of the class, as `from_pretrained` takes it.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; a folder of diffusers' layout holds one beside its weights")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a {type(config).__name__}, not the config of a model")
    if config.get("_class_name") not in _KINDS:
        raise InputError(f"{path}: _class_name={config.get('_class_name')!r} is not one of {', '.join(_KINDS)}")
    import diffusers  # costs 4 s

    own = inspect.signature(getattr(diffusers, config["_class_name"])).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in own}
    # As a config.json has it, which knows no tuples.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (defaults | config).items()}


def _net(config: dict[str, Any], path: Path, options: dict[str, Any]) -> Autoencoder:
    """The Autoencoder of diffusers' config, every entry of which is then compared with what was built."""
    kind = _KINDS[config["_class_name"]]
    widths = config["block_out_channels"]
    described = {
        "kind": kind,
        "image_channels": config["in_channels"],
        "channels": config["latent_channels"],
        "base": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "res_blocks": config["layers_per_block"],
        "groups": config["norm_num_groups"],
        "attention": "coarsest" if "AttnDownEncoderBlock2D" in config["down_block_types"] else
                     "middle" if config["mid_block_add_attention"] else "none",
    }  # fmt: skip
    if kind == "vq":
        described["codebook_size"] = config["num_vq_embeddings"]
    net = Autoencoder(**{**described, **options})
    built = dict(net.model.config)
    for key, value in config.items():
        if value is None or key.startswith("_") or key in _BESIDE_THE_NET:
            continue
        if key not in built:
            raise InputError(f"{path}: {key} is not known")
        if value != built[key]:
            raise InputError(f"{path}: {key}={value} is not supported; with the other entries it must be {built[key]}")
    return net


def _fill(net: Autoencoder, content: dict[str, Any], path: Path) -> None:
    """Loads the weights of a file, each of which must find its place.

    Those of the training's loss (LPIPS and the discriminator) are left out.
    """
    own = net.model.state_dict()
    levels = len(net.config["multipliers"])
    weights, names = {}, {}
    for name, tensor in content.get("state_dict", content).items():
        if not isinstance(tensor, Tensor) or name.startswith("loss."):
            continue
        new = _renamed(name, levels)
        if new in own and own[new].ndim == 2:  # attention's projections were convolutions of one pixel
            tensor = tensor.reshape(tensor.shape[:2]) if tensor.shape[2:] == (1, 1) else tensor
        weights[new], names[new] = tensor, name
    if not weights:
        raise InputError(f"{path}: holds no weights")
    problems = {
        "unknown": [names[key] for key in weights if key not in own],
        "missing": [key for key in own if key not in weights],
        "of another shape": [f"{names[key]} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
                             for key in own if key in weights and weights[key].shape != own[key].shape],
    }
    if any(problems.values()):
        raise InputError(f"{path} does not fit the autoencoder: "
                         + "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys))
    net.model.load_state_dict(weights)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _renamed(name: str, levels: int) -> str:
    """diffusers' name of a weight; its decoder counts levels from the coarsest, latent diffusion's from the finest."""
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _content(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return _safetensors(path)
    with torch.serialization.safe_globals(_stand_ins(path)):
        return read(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: truncated, or not a file of safetensors ({error})") from error


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Empty classes under the names of those that a checkpoint mentions beside its tensors.

    Latent diffusion's checkpoints name callbacks of an old Lightning, for which `read` would refuse the whole file. So
    they load, and none of the code that the file names runs.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # `read` says what is wrong with the file
        return []
    return [(type("StandIn", (), {"__init__": lambda self, *_: None}), name) for name in names]

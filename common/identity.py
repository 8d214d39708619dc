"""Which keys of a config its results depend on: what tells two runs apart, and what makes them repeats of one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

# Devices, nodes, workers, logging and paths do not belong to it.
COVERED = ("model.", "data.", "seed_everything", "init_from", "continue_from", "copy_of")
COVERED_TRAINER = ("max_epochs", "precision", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches",
                   "overfit_batches", "callbacks")
NOT_COVERED = ("data.root", "data.workers", "data.batch_per_device", "data.eval_batch_size", "data.images",
               "data.max_unreadable", "data.on_device", "data.latents", "model.picture_epochs", "model.picture_steps",
               "model.checkpoint_blocks")
# Whose values may be run folders.
RUNS = ("init_from", "continue_from", "copy_of", "data.autoencoder", "model.evaluation.extractor")
# Options of what is done with a trained run, which answers to all of them.
AFTERWARDS = ("model.predict.", "model.evaluation.")


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config as dotted keys, as a user types them: without `init_args`."""

    def items(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            path = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key
            if isinstance(value, dict) and value:
                yield from items(value, path)
            else:
                yield path, value

    return dict(items(config, ""))


def covered(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that its results depend on, flattened; what is unset is left out."""
    trainer = tuple(f"trainer.{name}" for name in COVERED_TRAINER)
    return {key: value for key, value in flatten(config).items()
            if value is not None and (key.startswith(COVERED) or key in trainer)
            and key not in NOT_COVERED and not key.startswith(AFTERWARDS)}


def afterwards(config: dict[str, Any]) -> dict[str, Any]:
    """What a run is to be tested by, flattened; it tells copies of a run apart."""
    return {key: value for key, value in flatten(config).items() if key.startswith(AFTERWARDS)}


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of two flattened configs whose values differ, sorted, with both values; None where one has none."""
    return {key: (one.get(key), other.get(key)) for key in sorted(one.keys() | other.keys())
            if one.get(key) != other.get(key)}


def config_hash(config: dict[str, Any]) -> str:
    return _digest(covered(config))


def arm_hash(config: dict[str, Any]) -> str:
    """Equal for runs that differ in seed alone.

    The seed of the run that they start from is no further difference: runs/mae/digits-nano-p1-s3 is a repeat of
    runs/mae/digits-nano-p1-s0.
    """
    keys = covered(config) | (afterwards(config) if config.get("copy_of") else {})
    keys.pop("seed_everything", None)
    for key in keys.keys() & set(RUNS):
        keys[key] = of_any_seed(keys[key])
    return _digest(keys)


def of_any_seed(run: Any) -> str:
    """A run folder without its seed: -s3 ends a part of the path, or stands before the hash of further overrides."""
    return re.sub(r"-s\d+(?=(-[0-9a-f]{6})?(/|$))", "-s*", str(run))


def _digest(keys: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(keys), sort_keys=True).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Equal for values that are equal: a parser may read 35 as 35.0, and both are one number."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

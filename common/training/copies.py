"""--copy_of: a finished run under another name, to be tested by other options than its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from common.errors import InputError
from common.files import write_atomically
from common.identity import config_hash, covered, differing
from common.runs import weights_of
from common.training.checkpoints import LAST, damage, link
from common.training.events import Events
from common.training.run import (
    discard,
    log_hyperparameters,
    own_results,
    read_config,
    read_results,
    refuse_another_axis,
    refuse_changed_source,
)


def copy(source: Path, folder: Path, config: dict[str, Any], overwrite: bool = False) -> None:
    """Makes `folder` a run with the weights of `source` and what its training came to, but for what it was tested by.

    The checkpoint takes no second place on the disk. What is cut off is made anew by the same command, since results
    are written last.

    Args:
        config: of the copy.
        overwrite: discard what is in `folder`; else a copy that is there stays as it is.

    Raises:
        InputError: a source that is not finished, was trained by another config, or has a damaged checkpoint; a folder
            of another run, or of a copy whose source has been trained anew.
    """
    if folder.resolve() == source.resolve():
        raise InputError(f"--copy_of: {source} is the run itself; choose another --run_name")
    if not overwrite and own_results(folder, config).get("status") == "finished":
        print(f"finished: {folder}, a copy of {source}; make it anew with --overwrite")
        return
    if not (source / "config.yaml").is_file():
        raise InputError(f"--copy_of: {source} is no run folder")
    results, checkpoint = read_results(source), source / "checkpoints" / LAST
    refuse_changed_source(source, results)
    refuse_another_axis(source, config["x_axis"])  # the copy's points are put where the source's are
    if results.get("status") != "finished":
        raise InputError(f"--copy_of: {source} is not a finished run ({results.get('status')})")
    if reason := damage(checkpoint):
        raise InputError(f"--copy_of: {checkpoint} cannot be read ({reason})")
    if otherwise := differing(_trained_by(read_config(source / "config.yaml")), _trained_by(config)):
        raise InputError(f"--copy_of: {source} was trained otherwise: " + "; ".join(
            f"{key}: {there} there, {here} here" for key, (there, here) in otherwise.items()))
    if overwrite:
        discard(folder)
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))  # before the weights it tells of
    link(checkpoint, folder / "checkpoints" / LAST)
    results |= {
        "run_name": folder.name,
        "config_hash": config_hash(config),
        "metrics": {tag: value for tag, value in results["metrics"].items() if not tag.startswith("test/")},
        "copy_of": {"source": str(source), "trained": weights_of(results)},
    }
    for of_the_source in ("evaluation", "job"):
        results.pop(of_the_source, None)
    _log(folder, results)
    write_atomically(folder / "results.json", json.dumps(results, indent=2))
    print(f"copied: {source} -> {folder}, to be tested by the same options")


def _trained_by(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in covered(config).items() if key != "copy_of"}


def _log(folder: Path, results: dict[str, Any]) -> None:
    """A row of HPARAMS, and the last point of the source's curves."""
    in_images = results.get("x_axis") == "images"
    events = Events(folder, (lambda: results["batch_size"]) if in_images else None)
    log_hyperparameters(events, results)
    last = {tag: value for tag, value in results["metrics"].items() if tag.startswith("val")}
    events.log_metrics(last, results["step"])
    events.finalize("success")

"""A trained run as it lies in its folder: the experiment, its net with weights, its data. For what comes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import Dataset

from common.data.loader import Draw, GlobalBatchData
from common.errors import InputError
from common.runs import read_run
from common.training.checkpoints import newest_readable, read
from common.training.initialisation import weights_in
from common.training.module import Experiment
from common.training.run import read_config
from common.training.trainer import Trainer


class Trained(NamedTuple):
    """What a run has left. The net is in evaluation mode, its weights the average where the run keeps one."""

    experiment: Experiment
    net: nn.Module
    data: GlobalBatchData
    checkpoint: Path


def load(
    folder: Path, what: str, check: Callable[[Experiment, GlobalBatchData], None] = lambda *_: None
) -> Trained:
    """Reads a run folder.

    The classes are those that the run's config names. The data's classes are read, and so may need their files.

    Args:
        what: the argument that names the folder; messages begin with it.
        check: refuses an experiment of a kind that is not wanted, before its weights are looked for.

    Raises:
        InputError: not a run folder, a run without a checkpoint, or a checkpoint that does not fit the config.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise InputError(f"{what}: {folder} is no run folder; it has no config.yaml")
    config = read_config(file)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Experiment, "model", subclass_mode=True)
    parser.add_lightning_class_args(GlobalBatchData, "data", subclass_mode=True)
    try:
        built = parser.instantiate(parser.parse_object({key: config.get(key) for key in ("model", "data")}))
    except ArgumentError as error:
        reason = " ".join(str(error).split("    - ")[:2][-1].split())  # the first subtype's, of a Union
        raise InputError(f"{what}: {file} is not the config of an experiment ({reason})") from error
    check(built.model, built.data)
    checkpoint = newest_readable(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{what}: {folder} holds no checkpoint; train the run first")
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)
    trainer.seed, trainer.datamodule = config.get("seed_everything", 0), built.data
    built.model.trainer = built.data.trainer = trainer
    built.model.configure_model()  # what an ablation holds beside the net is in the checkpoint too
    found = read_run(folder)
    if found.status in ("unfinished", "failed"):
        rank_zero_warn(f"{what}: {folder} is {found.status} {found.problem}; its last checkpoint is used")
    content = read(checkpoint)
    try:
        built.model.load_state_dict(content["state_dict"])
        built.model.net.load_state_dict(weights_in(content, "ema", checkpoint))
    except RuntimeError as error:
        raise InputError(f"{what}: {checkpoint} does not fit the config of its run folder "
                         f"({' '.join(str(error).split())[:200]})") from error
    return Trained(built.model.eval(), built.model.net, built.data, checkpoint)


def evaluation_set(data: GlobalBatchData, images: Path | None = None) -> Dataset:
    """The validation split, or the image files below a folder, as an evaluation reads them."""
    split = "val" if images is None else "predict"
    data.trainer.state.stage = RunningStage.VALIDATING if images is None else RunningStage.PREDICTING
    if images is not None:
        data.images = str(images)
    data.setup("validate" if images is None else "predict")
    return data.sets[split]


def evenly_spaced(of: int, count: int) -> list[int]:
    """`count` places among `of`, or all where there are no more."""
    count = min(count, of)
    return [i * of // count for i in range(count)]


def evaluation_batches(
    data: GlobalBatchData, images: Path | None = None, count: int | None = None, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """Batches as an evaluation's net sees them, of `evaluation_set`.

    Args:
        count: of images, evenly spaced, since class folders are sorted and the first ones are of few classes. The
            others are not read; all are where it is left out.
        most: images in a batch, where that is less than in the run's own evaluation.
    """
    found = evaluation_set(data, images)
    chosen = evenly_spaced(len(found), len(found) if count is None else count)
    size = min(data.eval_batch_size, most or data.eval_batch_size)
    draws = [Draw(0, index, 0) for index in chosen]
    order = [draws[start : start + size] for start in range(0, len(draws), size)]
    with torch.no_grad():
        for batch in data.loader("val" if images is None else "predict", order):
            yield data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)

"""config.yaml replays the run, and TensorBoard's file holds it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shipped import CONFIGS, study_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from common.training.checkpoints import read

TIMED = ("train/images_per_second", "train/data_wait")
RANDOM = [  # everything that draws random numbers or has a state
    "--model.optim.ema", "0.9", "--data.batch_per_device", "16", "--data.batch_size", "32", "--seed_everything", "3",
    "--data.augment.crop_scale", "[0.3,1.0]", "--data.augment.flip", "0.5",
]  # fmt: skip
LABELLED = [
    "--model.drop_path", "0.2", "--model.mixup", "0.8", "--model.cutmix", "1.0", "--model.label_smoothing", "0.1",
]  # fmt: skip
COLOUR = [
    "--data.source.train", "96", "--trainer.limit_val_batches", "1", "--data.augment.jitter", "[0.4,0.4,0.4,0.1]",
    "--data.augment.grayscale", "0.2", "--data.augment.rand_augment", "rand-m9-mstd0.5-inc1",
]  # fmt: skip


@pytest.mark.parametrize("name, more", [
    ("supervised/digits", LABELLED), ("supervised/shapes", LABELLED + COLOUR), ("mae/digits", []),
])  # fmt: skip
def test_the_saved_config_replays_the_run(name: str, more: list[str], command: Callable, tmp_path: Path) -> None:
    study = study_of(name)
    folders = [tmp_path / "runs" / study / run for run in ("first", "replay")]
    assert command("fit", "--run_name", "first", *RANDOM, *more, config=CONFIGS[name], study=study).code == 0
    saved = folders[0] / "config.yaml"
    assert command("fit", "--run_name", "replay", config=saved, small=False, study=study).code == 0
    first, replay = (read(folder / "checkpoints" / "last.ckpt") for folder in folders)
    for part in (lambda c: c["state_dict"], lambda c: c["ema"]["state_dict"]):
        assert part(first).keys() == part(replay).keys()
        assert all(torch.equal(value, part(replay)[key]) for key, value in part(first).items())
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    scores = [{tag: value for tag, value in result["metrics"].items() if tag not in TIMED}
              for result in results]  # fmt: skip
    assert scores[0] == scores[1] and results[0]["headline"].replace("val/", "val_raw/") in scores[0]


def test_the_event_file_of_rooms_holds_curves_hparams_and_pictures(command: Callable, tmp_path: Path) -> None:
    rooms = ["--run_name", "a", "--data.source.train", "48", "--data.source.val", "4", "--data.source.test", "4",
             "--trainer.log_every_n_steps", "1", "--model.patch_size", "6", "--model.picture_epochs", "1"]  # fmt: skip
    assert command("fit", *rooms, config=CONFIGS["supervised/rooms"]).code == 0
    assert command("test", *rooms, config=CONFIGS["supervised/rooms"]).code == 0
    folder = tmp_path / "runs" / "supervised" / "a"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    measured = {tag: [e.step for e in events.Scalars(tag) if not math.isnan(e.value)]
                for tag in events.Tags()["scalars"]}  # HPARAMS writes a NaN of each headline
    for tag in ("train/loss", "train/lr", "train/images_per_second", "train/data_wait"):
        assert measured[tag] == [1, 2, 3, 4, 5, 6]
    for tag in ("val/rmse", "val/rae", "val/rmse_low", "val/delta1"):
        assert measured[tag] == [3, 6]
    assert measured["test/rmse"] == measured["test/rae"] == [6] and measured["val/acc1"] == []
    assert events.Tags()["images"] == ["val/depth"]
    pictures = events.Images("val/depth")
    assert [picture.step for picture in pictures] == [3, 6]
    assert all(picture.width > picture.height > 300 and picture.encoded_image_string[1:4] == b"PNG"
               for picture in pictures)  # fmt: skip
    parts = [HParamsPluginData.FromString(content) for content in events.PluginTagToContent("hparams").values()]
    values = {key: value for part in parts for key, value in part.session_start_info.hparams.items()}
    assert (values["dataset"].string_value, values["patch_size"].number_value) == ("rooms", 6)

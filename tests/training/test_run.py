"""The run folder: what names it, what lies in it, what a command may do there."""

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from common.errors import InputError
from common.identity import arm_hash, config_hash, flatten
from common.training import run
from common.training.checkpoints import read
from supervised import Classification

CONFIG = {
    "model": {"class_path": "A", "init_args": {"size": "tiny", "patch_size": 1, "width": None, "optim": {"lr": 1e-3}}},
    "data": {"class_path": "B", "init_args": {"image_size": 32, "batch_size": 128, "root": "data", "workers": 0}},
    "trainer": {"max_epochs": 3, "precision": "32-true", "devices": 1},
    "seed_everything": 0,
    "init_from": None,
    "run_name": "x",
}


def changed(key: str, value: object) -> dict:
    config = json.loads(json.dumps(CONFIG))
    node = config
    *path, last = key.split(".")
    for name in path:
        node = node.setdefault(name, {})
        node = node.get("init_args", node)
    node[last] = value
    return config


def test_keys_are_flattened_as_a_user_types_them():
    flat = flatten({**CONFIG, "checkpoint": {"milestones": [1, 2]}, "empty": {}})
    assert flat["model.optim.lr"] == 1e-3 and flat["model.class_path"] == "A" and flat["data.image_size"] == 32
    assert flat["checkpoint.milestones"] == [1, 2] and flat["empty"] == {}
    assert not any("init_args" in key for key in flat)


@pytest.mark.parametrize("key, value", [
    ("model.patch_size", 2), ("model.optim.lr", 2e-3), ("model.width", 64), ("model.class_path", "C"),
    ("data.batch_size", 64), ("data.image_size", 16), ("trainer.max_epochs", 4), ("trainer.precision", "bf16-mixed"),
    ("trainer.gradient_clip_val", 1.0), ("seed_everything", 1), ("init_from", "weights.pth"), ("continue_from", "run"),
    ("copy_of", "run"),
    ("trainer.callbacks", [{"class_path": "C"}]),
])  # fmt: skip
def test_what_results_depend_on_is_in_the_hash(key, value):
    config = changed(key, value)
    assert config_hash(config) != config_hash(CONFIG)
    assert run.differences(CONFIG, config) == {key: (flatten(CONFIG).get(key), value)}


@pytest.mark.parametrize("key, value", [
    ("trainer.devices", 8), ("trainer.num_nodes", 2), ("trainer.strategy", "ddp"), ("trainer.log_every_n_steps", 5),
    ("data.workers", 4), ("data.batch_per_device", 16), ("data.root", "/mnt"), ("data.eval_batch_size", 8),
    ("run_name", "y"), ("checkpoint.every_n_steps", 3), ("model.heads", None),
])  # fmt: skip
def test_what_they_do_not_depend_on_is_not(key, value):
    assert config_hash(changed(key, value)) == config_hash(CONFIG)
    assert run.differences(CONFIG, changed(key, value)) == {}


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)


def test_equal_numbers_hash_equally():
    def hashes(clip, betas, flag=True):
        callbacks = [{"class_path": "C", "init_args": {"betas": betas, "flag": flag}}]
        config = changed("trainer.gradient_clip_val", clip) | {"trainer.callbacks": callbacks}
        return config_hash(config), arm_hash(config)

    assert hashes(35, [1, 0.9]) == hashes(35.0, (1.0, 0.9))
    assert len({hashes(35.5, [1, 0.9]), hashes(35, [1, 0.9]), hashes(35, [1, 0.9], False), hashes(35, [1])}) == 4


def test_the_default_name():
    assert run.default_name("digits", CONFIG, CONFIG) == "digits-tiny-p1-s0"
    # Size, patch and seed are in the name; anything else that results depend on becomes a hash.
    for key, value in [("model.patch_size", 2), ("model.size", "base"), ("seed_everything", 7)]:
        assert run.default_name("digits", changed(key, value), CONFIG).count("-") == 3
    assert run.default_name("digits", changed("model.patch_size", 2), CONFIG) == "digits-tiny-p2-s0"
    assert run.default_name("digits", changed("trainer.devices", 2), CONFIG) == "digits-tiny-p1-s0"
    rates = {run.default_name("digits", changed("model.optim.lr", lr), CONFIG) for lr in (2e-3, 4e-3, 1e-3)}
    assert len(rates) == 3 and "digits-tiny-p1-s0" in rates
    assert all(name.startswith("digits-tiny-p1-s0") for name in rates)
    assert run.default_name("digits", changed("model.optim.lr", 2e-3), CONFIG) in rates


def test_copies_that_are_tested_otherwise_have_other_folders():
    """Of what they are tested by the overrides alone are in the name: a new option leaves it as it is."""

    def tested(copy_of: str | None = "run", **options: float) -> dict:
        return {**CONFIG, "model": {"predict": {"guidance": 1.5, **options}}, "copy_of": copy_of}

    plain = tested(None)
    names = [run.default_name("digits", tested(guidance=guidance), plain) for guidance in (1.5, 1.0, 4.0)]
    assert run.default_name("digits", tested(None, guidance=4.0), plain) == "digits-s0"
    assert len({"digits-s0", *names}) == 4
    assert run.default_name("digits", tested(guidance=4.0, new=0), tested(None, new=0)) == names[-1]


def test_the_command_line_finds_the_same_folder(command: Callable, tmp_path: Path):
    for devices in ([], ["--data.workers", "1"], ["--data.batch_per_device", "64"]):
        assert command("fit", *devices).code == 0
    assert len(list((tmp_path / "runs/supervised").iterdir())) == 1


# What lies in it

SCHEMA = {
    "study": str, "run_name": str, "status": str, "config_hash": str, "metrics": dict, "epoch": int, "step": int,
    "images_seen": int, "train_seconds": float, "parameters": int, "seed": int, "weights": str, "versions": dict,
    "hardware": str, "commit": str,
}  # fmt: skip


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_results_of_a_run_and_its_test(command: Callable, scalars: Callable, tmp_path: Path):
    more = ["--run_name", "a", "--model.optim.ema", "0.9", "--trainer.max_epochs", "3", "--seed_everything", "4"]
    assert command("fit", *more).code == 0
    folder = tmp_path / "runs/supervised/a"
    found = results(folder)
    assert {key: type(found[key]) for key in SCHEMA} == SCHEMA
    assert (found["study"], found["run_name"], found["status"]) == ("supervised", "a", "finished")
    assert (found["epoch"], found["step"], found["images_seen"]) == (3, 27, 27 * 128)
    assert (found["weights"], found["seed"], found["parameters"]) == ("ema", 4, 3850)
    assert found["config_hash"] == config_hash(yaml.safe_load((folder / "config.yaml").read_text()))
    assert found["recipe"]["steps"] == 27 and found["recipe"]["learning rate"] == found["lr"] == 4e-3

    curves, metrics = scalars(folder), found["metrics"]
    for tag in ("val/loss", "val/acc1", "val/acc5", "val_raw/loss", "val_raw/acc1", "val_raw/acc5"):
        assert metrics[tag] == pytest.approx(curves[tag][-1][1])
        assert [step for step, value in curves[tag] if not math.isnan(value)] == [9, 18, 27]
    accuracy = [value for _, value in curves["val/acc1"]][-3:]  # behind the NaN of HPARAMS
    assert metrics["best/val/acc1"] == pytest.approx(max(accuracy))
    assert metrics["best/epoch"] == accuracy.index(max(accuracy)) + 1
    assert metrics["best/val/loss"] == pytest.approx(curves["val/loss"][-3:][int(metrics["best/epoch"]) - 1][1])
    assert metrics["train/loss"] == pytest.approx(curves["train/loss"][-1][1])

    assert command("test", *more).code == 0
    tested = results(folder)
    assert {"test/acc1", "test/acc5", "test/loss", "test_raw/acc1"} <= tested["metrics"].keys()
    tested["metrics"] = {tag: value for tag, value in tested["metrics"].items() if not tag.startswith("test")}
    assert tested == found


def hyperparameters(folder: Path) -> tuple[dict, set[str]]:
    """The values and the metric names that TensorBoard's HPARAMS page shows."""
    events = EventAccumulator(str(folder))
    events.Reload()
    parts = [HParamsPluginData.FromString(content) for content in events.PluginTagToContent("hparams").values()]
    values = {k: v for part in parts for k, v in part.session_start_info.hparams.items()}
    names = {info.name.tag for part in parts for info in part.experiment.metric_infos}
    return {k: v.number_value if v.HasField("number_value") else v.string_value for k, v in values.items()}, names


def test_hparams_read_back(command: Callable, scalars: Callable, tmp_path: Path):
    assert command("fit", "--run_name", "a", "--model.position", "none").code == 0
    values, names = hyperparameters(tmp_path / "runs/supervised/a")
    assert values == {"study": "supervised", "dataset": "digits", "size": "nano", "patch_size": 4, "position": "none",
                      "pool": "cls", "lr": 0.004, "batch_size": 128, "epochs": 2, "seed": 0}  # fmt: skip
    assert names == set(run.HEADLINES)
    curves = scalars(tmp_path / "runs/supervised/a")
    assert math.isnan(curves["test/fid"][0][1])  # a column of other studies
    assert not math.isnan(curves["val/acc1"][-1][1])


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    training_step = Classification.training_step

    def failing(self, batch: dict, index: int) -> torch.Tensor:
        if self.trainer.global_step == step:
            raise RuntimeError("a cosmic ray")
        return training_step(self, batch, index)

    monkeypatch.setattr(Classification, "training_step", failing)


LOGGED = ["--trainer.log_every_n_steps", "1", "--checkpoint.every_n_steps", "4"]


@pytest.mark.parametrize("step, said", [
    (2, "interrupted at step 2; the same command begins anew, for no checkpoint was saved"),
    (6, "interrupted at step 6; the same command goes on from the last checkpoint"),
])
def test_an_interrupted_run_says_where_it_goes_on(command, at, tmp_path, step, said):
    """As Ctrl-C does it, upon which Lightning leaves with 1 and ignores the next."""
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(module, *_):
        if module.trainer.global_step == step:
            raise KeyboardInterrupt

    at("on_train_batch_start", interrupted)
    try:
        outcome = command("fit", "--run_name", "a", *LOGGED)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert outcome.code == 130 and said in outcome.err.splitlines(), outcome.err


def test_a_failed_run_says_so_and_goes_on(command, scalars, tmp_path, monkeypatch):
    assert command("fit", "--run_name", "whole", *LOGGED).code == 0
    with monkeypatch.context() as fault:
        fail_at(fault, 14)
        outcome = command("fit", "--run_name", "a", *LOGGED)
    assert outcome.code == 1 and "failed: RuntimeError: a cosmic ray" in outcome.err and "Traceback" not in outcome.err
    folder, whole = tmp_path / "runs/supervised/a", tmp_path / "runs/supervised/whole"
    failed = results(folder)
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: a cosmic ray")
    assert (failed["epoch"], failed["step"]) == (1, 14)
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == 12

    time.sleep(1.1)  # event files are ordered by the second of their start
    assert command("fit", "--run_name", "a", *LOGGED).code == 0
    for tag in ("train/loss", "train/lr", "val/acc1"):  # no step twice, none missing
        assert scalars(folder)[tag] == [pytest.approx(point, nan_ok=True) for point in scalars(whole)[tag]]
    assert hyperparameters(folder) == hyperparameters(whole)
    found, expected = results(folder), results(whole)
    for differing in ("train_seconds", "run_name"):
        found.pop(differing), expected.pop(differing)
    for each in (found, expected):
        for timed in ("train/images_per_second", "train/data_wait"):
            each["metrics"].pop(timed)
    assert found == expected


def test_a_run_that_ended_before_it_could_say_so_has_the_same_results(command, tmp_path, monkeypatch):
    def killed(*_) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as fault:
        fault.setattr(run.RunFolder, "on_fit_end", killed)
        command("fit", "--run_name", "a", *LOGGED)
    folder = tmp_path / "runs/supervised/a"
    before = results(folder)
    assert (before["status"], before["epoch"], before["step"]) == ("running", 2, 18)
    assert command("fit", "--run_name", "a", *LOGGED).code == 0
    after = results(folder)
    assert after.pop("status") == "finished" and before.pop("status")
    assert after.pop("train_seconds") >= 0 and before.pop("train_seconds") >= 0
    assert after == before


def test_a_training_that_a_callback_ends_is_not_finished(command, tmp_path, monkeypatch):
    def stop(module: Classification) -> None:
        module.trainer.should_stop = True

    with monkeypatch.context() as early:
        early.setattr(Classification, "on_train_epoch_end", stop)
        outcome = command("fit", "--run_name", "a")
    folder = tmp_path / "runs/supervised/a"
    assert outcome.code == 1 and outcome.err.splitlines()[-1] == (
        "not finished: runs/supervised/a, after 1 of 2 epochs: a callback has ended the training")
    assert (results(folder)["status"], results(folder)["epoch"]) == ("running", 1)
    assert command("fit", "--run_name", "a").code == 0
    assert (results(folder)["status"], results(folder)["epoch"]) == ("finished", 2)


def test_a_training_that_a_callback_ends_within_an_epoch_loses_what_is_not_saved(command, tmp_path):
    """Lightning counts such an epoch as whole: saved so, its other steps would never be trained."""

    def stop(module: Classification, *_: object) -> None:
        module.trainer.should_stop = module.trainer.global_step == 14

    assert command("fit", "--run_name", "whole", *LOGGED).code == 0
    with pytest.MonkeyPatch.context() as early:
        early.setattr(Classification, "on_train_batch_end", stop)
        outcome = command("fit", "--run_name", "a", *LOGGED)
    assert outcome.code == 2 and "stopped the training within an epoch, at step 14" in outcome.err
    folder, whole = tmp_path / "runs/supervised/a", tmp_path / "runs/supervised/whole"
    assert results(folder)["status"] == "failed"
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == 12
    assert command("fit", "--run_name", "a", *LOGGED).code == 0
    one, other = (read(place / "checkpoints/last.ckpt")["state_dict"] for place in (folder, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_start_that_failed_leaves_no_config(command, tmp_path, monkeypatch):
    with monkeypatch.context() as fault:
        fail_at(fault, 0)
        assert command("fit", "--run_name", "a").code == 1
    assert not (tmp_path / "runs/supervised/a/config.yaml").exists()
    assert command("fit", "--run_name", "a", "--model.optim.lr", "1e-3").code == 0


def test_config_yaml_replays_the_run(command: Callable, tmp_path: Path):
    assert command("fit", "--run_name", "a", "--model.drop_path", "0.1", "--model.mixup", "0.8").code == 0
    saved = tmp_path / "runs/supervised/a/config.yaml"
    assert command("fit", "--run_name", "b", config=saved, small=False).code == 0
    weights = [read(tmp_path / f"runs/supervised/{name}/checkpoints/last.ckpt")["state_dict"] for name in "ab"]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert results(tmp_path / "runs/supervised/b")["config_hash"] == results(saved.parent)["config_hash"]


def test_overwriting_leaves_what_the_user_put_there(command: Callable, tmp_path: Path):
    assert command("fit", "--run_name", "a").code == 0
    folder = tmp_path / "runs/supervised/a"
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    (folder / "checkpoints").symlink_to(tmp_path / "elsewhere")
    run.discard(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert (tmp_path / "elsewhere" / "last.ckpt").exists()
    run.discard(tmp_path / "absent")


def test_overwriting_waits_until_the_new_run_trains(command: Callable, scalars: Callable, tmp_path: Path):
    assert command("fit", "--run_name", "a").code == 0
    before = results(tmp_path / "runs/supervised/a")
    assert command("fit", "--run_name", "a", "--overwrite", "--model.patch_size", "3").code == 2
    assert results(tmp_path / "runs/supervised/a") == before
    assert "finished" in command("fit", "--run_name", "a").out
    assert command("fit", "--run_name", "a", "--overwrite", "--seed_everything", "1").code == 0
    after = results(tmp_path / "runs/supervised/a")
    assert (after["seed"], after["step"], after["status"]) == (1, before["step"], "finished")
    points = scalars(tmp_path / "runs/supervised/a")["val/acc1"]
    assert [step for step, value in points if math.isfinite(value)] == [9, 18]  # the new run's alone


@pytest.mark.parametrize("text, message", [("{", "results.json: damaged"), ("[1", "results.json: damaged")])
def test_damaged_results_are_named(tmp_path: Path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=message):
        run.read_results(tmp_path)
    assert run.read_results(tmp_path / "absent") == {}


@pytest.mark.parametrize("text", ["a: [", "- a", ""])
def test_a_damaged_config_is_named(tmp_path: Path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="config.yaml: not"):
        run.refuse_another_config(tmp_path, CONFIG)

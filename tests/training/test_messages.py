"""What the command says to a mistake: one line with the key or the file, the value and what would be right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from common.errors import InputError
from common.training.checkpoints import read
from common.training.cli import run_folder
from common.training.messages import given_configs, with_extended

DIGITS = Path(__file__).parents[2] / "supervised" / "configs" / "digits.yaml"


def refused(outcome) -> str:
    """The one line of a refusal."""
    assert outcome.code == 2, outcome
    *before, line = outcome.err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in outcome.err and not any("error" in b for b in before)
    return line


@pytest.mark.parametrize("arguments, expected", [
    (["--model.patchsize", "1"], ["model.patchsize", "command line", "model.patch_size"]),
    (["--model.optim.l", "1"], ["model.optim.l:", "command line", "model.optim.lr"]),
    (["--data.batchsize", "1"], ["data.batchsize", "data.batch_size"]),
    (["--data.augment.flipp", "0.5"], ["data.augment.flipp", "data.augment.flip"]),
    (["--trainer.max_epoch", "1"], ["trainer.max_epoch", "trainer.max_epochs"]),
    (["--checkpoint.every_n_step", "1"], ["checkpoint.every_n_step", "checkpoint.every_n_steps"]),
    (["--run_nam", "x"], ["run_nam", "did you mean run_name"]),
    (["--overwrit"], ["overwrit", "did you mean overwrite"]),
    (["--model.patch_size", "one"], ["model.patch_size: one is not an int"]),
    (["--model.optim.lr", "x"], ["model.optim.lr: x is not a float"]),
    (["--data.image_size", "x"], ["data.image_size: x is not an int or a tuple"]),
    (["--trainer.max_epochs", "x"], ["trainer.max_epochs: x is not an int"]),
    (["--model.patch_size", "3"], ["patch_size=3", "8x8", "nearest that do"]),
    (["--model.heads", "5"], ["heads=5"]),
    (["--model.size", "huge"], ["huge", "nano"]),
    (["--model.optim.base_lr", "1e-3"], ["optim", "lr=0.004 and base_lr=0.001"]),
    (["--model.optim.schedule", "linear"], ["model.optim.schedule: linear is none of cosine, constant"]),
    (["--model.optim.warmup_epochs", "9"], ["optim.warmup_epochs", "9", "2 epochs"]),
    (["--model.mixup", "-1"], ["model.mixup: -1"]),
    (["--data.batch_size", "1006", "--data.batch_per_device", "33"], ["batch_size: 1006", "at most 33; 1008 would"]),
    (["--data.batch_size", "0"], ["data.batch_size: 0"]),
    (["--trainer.max_epochs", "-1"], ["trainer.max_epochs: -1"]),
    (["--trainer.max_steps", "10"], ["trainer.max_epochs", "max_steps"]),
    (["--trainer.max_time", "00:00:10:00"], ["trainer.max_time: 00:00:10:00 is not used", "timeout --signal USR1"]),
    (["--trainer.precision", "16-mixed"], ["trainer.precision: 16-mixed is not used", "bf16-mixed"]),
    (["--trainer.fast_dev_run", "true"], ["trainer.fast_dev_run: True is not used", "limit_train_batches"]),
    (["--trainer.accumulate_grad_batches", "3"], ["accumulate_grad_batches: 3 is not used", "data.batch_per_device"]),
    (["--trainer.log_every_n_steps", "0"], ["trainer.log_every_n_steps: 0 is not a positive"]),
    (["--trainer.check_val_every_n_epoch", "0"], ["trainer.check_val_every_n_epoch: 0 is not a positive"]),
    (["--seed_everything", "true"], ["seed_everything: True is not between"]),
    (["--checkpoint.every_n_steps", "0"], ["checkpoint.every_n_steps: 0"]),
    (["--seed_everything", "x"], ["seed_everything: x is not ", "int"]),
    (["--continue_from", "absent"], ["--continue_from", "absent"]),
])  # fmt: skip
def test_mistakes_on_the_command_line(command: Callable, arguments, expected):
    outcome = command("fit", *arguments)
    line = refused(outcome)
    assert all(part in line for part in expected), line


SHAPES = DIGITS.parents[2] / "locality_ablation" / "configs" / "shapes.yaml"  # whose source has keys of its own
SEGMENTED = ["--data", "locality_ablation.SegmentedImages", "--data.segmentation"]


@pytest.mark.parametrize("typed, expected", [
    (["--model.position", "foo"], "model.position: foo is none of learned, sincos, none"),
    (["--model.permutation.delta", "Inf"], "model.permutation.delta: Inf is not an int, nor one of inf"),
    (["--data.source.lable", "both"],
     "data.source.lable: unknown key in the command line; did you mean data.source.label?"),
    ([*SEGMENTED, "locality_ablation.Slic", "--data.segmentation.iteration", "3"],
     "data.segmentation.iteration: unknown key in the command line; did you mean data.segmentation.iterations?"),
    (["--data", "locality_ablation.Nope"], "data.class_path: locality_ablation.Nope in the command line cannot be"),
])  # fmt: skip
def test_keys_of_classes_within_classes(command: Callable, typed, expected):
    outcome = command("fit", *typed, config=SHAPES, study="locality_ablation", small=False)
    assert refused(outcome).startswith(f"error: {expected}")


@pytest.mark.parametrize("change, expected", [
    ({"model": {"init_args": {"patchsize": 1}}}, ["model.patchsize", "mine.yaml", "model.patch_size"]),
    ({"model": {"init_args": {"optim": {"l": 1}}}}, ["model.optim.l:", "mine.yaml", "model.optim.lr"]),
    ({"trainer": {"max_epoch": 1}}, ["trainer.max_epoch", "mine.yaml", "trainer.max_epochs"]),
    ({"modell": {"x": 1}}, ["modell", "mine.yaml"]),
    ({"model": {"class_path": "supervised.Clasification"}}, ["Clasification"]),
    ({"model": {"class_path": "absent.Model"}}, ["absent"]),
    ({"data": {"init_args": {"source": "common.data.Digit"}}}, ["data.source", "common.data.Digit"]),
    ({"extends": "absent.yaml"}, ["mine.yaml", "absent.yaml", "no file"]),
    ({"extends": "mine.yaml"}, ["mine.yaml", "extends itself"]),
])  # fmt: skip
def test_mistakes_in_a_file(command: Callable, tmp_path: Path, change, expected):
    config = yaml.safe_load(DIGITS.read_text())
    for key, value in change.items():
        node = config.get(key)
        if isinstance(node, dict) and "init_args" in value:
            node["init_args"] |= value["init_args"]
        else:
            config[key] = {**node, **value} if isinstance(node, dict) else value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    line = refused(command("fit", config="mine.yaml"))
    assert all(part in line for part in expected), line


@pytest.mark.parametrize("text, expected", [("model: [", "not readable as YAML"), ("- 1", "not a mapping"),
                                            ("", "not a mapping"), ("\0", "not readable")])  # fmt: skip
def test_a_file_that_is_no_config(command: Callable, tmp_path: Path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    line = refused(command("fit", config="mine.yaml"))
    assert "mine.yaml" in line and expected in line


def test_a_missing_file_suggests_the_near_name(command: Callable):
    line = refused(command("fit", config=DIGITS.with_name("digit.yaml")))
    assert f"there is no file {DIGITS.with_name('digit.yaml')}; did you mean {DIGITS}?" in line


def test_mistakes_are_explained_for_the_arguments_that_were_parsed(monkeypatch: pytest.MonkeyPatch):
    """Another command, whose own command line is different, asks for a study's run folder."""
    monkeypatch.setattr("sys.argv", ["paper", "run", "T3a", "--scale", "demo"])
    with pytest.raises(InputError, match="model.patchsize: unknown key in the command line; did you mean .*patch_size"):
        run_folder("supervised", ["--config", str(DIGITS), "--model.patchsize", "1"])
    with pytest.raises(InputError, match="there is no file .*digit.yaml; did you mean .*digits.yaml"):
        run_folder("supervised", ["--config", str(DIGITS.with_name("digit.yaml"))])


def test_without_a_config_the_command_says_what_to_name(monkeypatch, capsys):
    from common.training.cli import main

    monkeypatch.setattr("sys.argv", ["supervised", "fit"])
    with pytest.raises(SystemExit) as leaving:
        main("supervised")
    assert leaving.value.code == 2 and "--config" in capsys.readouterr().err.splitlines()[-1]


# Files that extend others


def test_later_files_win(tmp_path: Path, command: Callable):
    (tmp_path / "parent.yaml").write_text(f"extends: {DIGITS}\ntrainer: {{max_epochs: 7, log_every_n_steps: 3}}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\ntrainer: {max_epochs: 1}\n"
                                         "model: {init_args: {optim: {warmup_epochs: 0}}}\n")
    arguments = ["fit", "--config", str(tmp_path / "child.yaml"), "--x", "1"]
    expected = [DIGITS, tmp_path / "parent.yaml", tmp_path / "child.yaml"]
    assert [str(path) for path in given_configs(with_extended(arguments))] == [str(path) for path in expected]
    assert with_extended(arguments)[-2:] == ["--x", "1"]
    small = ["--model.patch_size", "4", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
    assert command("fit", "--run_name", "a", *small, config="child.yaml", small=False).code == 0
    saved = yaml.safe_load((tmp_path / "runs/supervised/a/config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 1 and saved["trainer"]["log_every_n_steps"] == 3
    assert "extends" not in saved


def test_a_cycle_of_files_is_named(tmp_path: Path, command: Callable):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    line = refused(command("fit", config="a.yaml"))
    assert "a.yaml: extends itself by way of" in line
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.yaml").write_text("extends: ../deep/c.yaml")
    assert "extends itself" in refused(command("fit", config="deep/c.yaml"))


def test_help_lists_the_keys_of_the_config_first(command: Callable):
    outcome = command("fit", "--help", small=False)
    assert outcome.code == 0
    assert 0 <= outcome.out.index("--model.optim.lr") < outcome.out.index("--trainer.max_epochs")
    assert "--data.batch_size" in outcome.out and "--run_name" in outcome.out


# The same command again


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read(folder / "checkpoints/last.ckpt")["state_dict"]


def test_the_same_command_again(command: Callable, tmp_path: Path):
    folder = tmp_path / "runs/supervised/a"
    assert command("fit", "--run_name", "a").code == 0
    first, written = weights(folder), (folder / "checkpoints/last.ckpt").stat().st_mtime_ns

    again = command("fit", "--run_name", "a")
    assert again.code == 0 and f"finished: {Path('runs/supervised/a')}, epoch 2" in again.out
    assert (folder / "checkpoints/last.ckpt").stat().st_mtime_ns == written

    line = refused(command("fit", "--run_name", "a", "--model.optim.lr", "1e-3", "--trainer.max_epochs", "3"))
    assert "model.optim.lr: 0.004 there, 0.001 here" in line and "trainer.max_epochs: 2 there, 3 here" in line
    assert "--run_name" in line and "--overwrite" in line
    assert all(torch.equal(value, weights(folder)[key]) for key, value in first.items())
    assert refused(command("test", "--run_name", "a", "--model.optim.lr", "1e-3"))

    assert command("fit", "--run_name", "a", "--model.optim.lr", "1e-3", "--overwrite").code == 0
    assert not all(torch.equal(value, weights(folder)[key]) for key, value in first.items())


@pytest.mark.parametrize("subcommand", ["test", "validate"])
def test_evaluation_without_a_checkpoint_is_refused(command: Callable, subcommand):
    assert "there is no checkpoint" in refused(command(subcommand, "--run_name", "absent"))


def test_two_epochs_and_three_are_five(command: Callable, scalars: Callable, tmp_path: Path):
    constant = ["--model.optim.schedule", "constant", "--model.optim.ema", "0.9", "--model.drop_path", "0.1"]
    assert command("fit", "--run_name", "two", *constant).code == 0
    further = ["--trainer.max_epochs", "5", *constant]
    assert command("fit", "--run_name", "five", *further).code == 0
    source = ["--continue_from", tmp_path / "runs/supervised/two"]
    assert command("fit", "--run_name", "on", *further, *source).code == 0
    on, five = (read(tmp_path / f"runs/supervised/{name}/checkpoints/last.ckpt") for name in ("on", "five"))
    assert on["global_step"] == five["global_step"] == 45
    for state in (lambda c: c["state_dict"], lambda c: c["ema"]["state_dict"]):
        assert all(torch.equal(value, state(five)[key]) for key, value in state(on).items())

    assert "test/fid" in scalars(tmp_path / "runs/supervised/on")  # a column of HPARAMS
    line = refused(command("fit", "--run_name", "x", *constant, *source))
    assert "trainer.max_epochs: 2 is no more than the 2 of" in line
    line = refused(command("fit", "--run_name", "x", *further, *source, "--model.patch_size", "2"))
    assert "was trained otherwise: model.patch_size: 4 there, 2 here" in line
    line = refused(command("fit", "--run_name", "two", *further, *source, "--overwrite"))  # nothing is lost of it
    assert "two is the run itself; choose another --run_name" in line
    assert (tmp_path / "runs/supervised/two/checkpoints/last.ckpt").is_file()
    assert command("fit", "--run_name", "cosine").code == 0
    line = refused(command("fit", "--run_name", "x", "--trainer.max_epochs", "5", "--continue_from",
                           tmp_path / "runs/supervised/cosine"))  # fmt: skip
    assert "optim.schedule=constant" in line


def test_check_trains_nothing(command: Callable, tmp_path: Path):
    outcome = command("check")
    assert outcome.code == 0, outcome.err
    assert "training images" in outcome.out and "1,197" in outcome.out
    assert not (tmp_path / "runs").exists()


def test_a_model_refuses_data_of_another_kind(command: Callable) -> None:
    rooms = ["--data", "supervised.DepthData", "--data.source", "supervised.Rooms", "--data.image_size", "[24,32]"]
    refused = command("fit", *rooms, "--data.batch_size", "16")
    assert refused.code == 2 and "DepthData does not go with Classification, which takes ImageData" in refused.err


def test_a_logger_of_ones_own_is_refused_and_not_dropped(command: Callable) -> None:
    arguments = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "."]
    refused = command("fit", *arguments)
    assert refused.code == 2 and "trainer.logger" in refused.err


def test_a_start_that_failed_leaves_no_folder(command: Callable, tmp_path: Path) -> None:
    assert command("fit", "--model.patch_size", "3", small=False).code == 2
    assert command("fit", "--model.optim.warmup_epochs", "7").code == 2
    assert not (tmp_path / "runs").exists()
    assert "finished: runs/supervised/" in command("fit").out


def test_an_average_under_true_bf16_is_refused(command: Callable) -> None:
    refused = command("fit", "--model.optim.ema", "0.9", "--trainer.precision", "bf16-true")
    assert refused.code == 2 and "model.optim.ema" in refused.err and "bf16-mixed" in refused.err

"""Nothing that was saved is lost: atomic writing, falling back, refusing what is no checkpoint."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import assert_identical, leftovers

from common.errors import InputError
from common.lock import LostRunFolder
from common.training import checkpoints
from common.training.checkpoints import AtomicCheckpointIO, Checkpoints, damage, newest_readable, read

COMPLETE = {"loops": {}, "optimizer_states": [], "accumulation": 1}


def content(value: float) -> dict:
    return {"state_dict": {"net.weight": torch.full((1000,), value)}, **COMPLETE}


def value(path: Path) -> float:
    return read(path)["state_dict"]["net.weight"][0].item()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with last.ckpt (2) and previous.ckpt (1)."""
    for number in (1.0, 2.0):
        AtomicCheckpointIO().save_checkpoint(content(number), tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path / "checkpoints"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing


def test_the_checkpoint_before_stays(folder: Path):
    assert files(folder) == ["last.ckpt", "previous.ckpt"]
    assert (value(folder / "last.ckpt"), value(folder / "previous.ckpt")) == (2.0, 1.0)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch, fault):
    def half(content: dict, file) -> None:
        file.write(b"PK\x03\x04" + bytes(500))
        raise fault

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(fault)):
        AtomicCheckpointIO().save_checkpoint(content(3.0), folder / "last.ckpt")
    assert files(folder) == ["last.ckpt", "previous.ckpt"]
    assert newest_readable(folder) == folder / "last.ckpt" and value(folder / "last.ckpt") == 2.0


def test_a_kill_between_the_renames_leaves_the_checkpoint_before(folder: Path, monkeypatch: pytest.MonkeyPatch):
    renamed = []

    def replace(source: Path, target: Path) -> None:
        if renamed:
            raise SystemExit("killed")
        renamed.append(os.rename(source, target))

    monkeypatch.setattr(checkpoints.os, "replace", replace)
    with pytest.raises(SystemExit):
        AtomicCheckpointIO().save_checkpoint(content(3.0), folder / "last.ckpt")
    assert value(newest_readable(folder)) == 2.0


def test_it_is_on_the_disk_before_it_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(checkpoints.os, "fsync", lambda file: calls.append("sync"))
    replace = os.replace
    monkeypatch.setattr(checkpoints.os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    AtomicCheckpointIO().save_checkpoint(content(3.0), folder / "last.ckpt")
    assert calls == ["sync", "rename", "rename"]


@pytest.mark.parametrize("links", [True, False])
def test_best_is_another_name_or_a_copy_of_last(folder: Path, monkeypatch: pytest.MonkeyPatch, links):
    if not links:
        def link(*_) -> None:
            raise OSError("no hard links on this file system")

        monkeypatch.setattr(checkpoints.os, "link", link)
    checkpoints.link(folder / "previous.ckpt", folder / "best.ckpt")
    checkpoints.link(folder / "last.ckpt", folder / "best.ckpt")  # over an older one
    assert (folder / "best.ckpt").samefile(folder / "last.ckpt") == links
    AtomicCheckpointIO().save_checkpoint(content(3.0), folder / "last.ckpt")
    assert (value(folder / "last.ckpt"), value(folder / "best.ckpt")) == (3.0, 2.0)
    assert files(folder) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_a_copy_that_fails_leaves_the_best_there_was(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Where there are no links, on a disk that is full."""

    def link(*_) -> None:
        raise OSError("no hard links on this file system")

    def copyfile(source: Path, target: Path) -> None:
        target.write_bytes(bytes(100))
        raise OSError(28, "No space left on device")

    checkpoints.link(folder / "previous.ckpt", folder / "best.ckpt")
    monkeypatch.setattr(checkpoints.os, "link", link)
    monkeypatch.setattr(checkpoints.shutil, "copyfile", copyfile)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.link(folder / "last.ckpt", folder / "best.ckpt")
    assert files(folder) == ["best.ckpt", "last.ckpt", "previous.ckpt"] and value(folder / "best.ckpt") == 1.0


# Reading


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit of a weight, which torch.load alone does not notice."""
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.full((100,), 2.0).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(whole)
    read(path)


def text(path: Path) -> None:
    path.write_text("hello\n")


def foreign(path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 3}, path)


def listed(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize("harm", [truncated, emptied, flipped, text, foreign, listed])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(folder: Path, harm):
    harm(folder / "last.ckpt")
    with pytest.warns(UserWarning, match="last.ckpt cannot be read .*falling back"):
        assert newest_readable(folder) == folder / "previous.ckpt"


def test_a_missing_last_falls_back_to_previous_then_to_the_newest_of_the_others(folder: Path):
    (folder / "last.ckpt").unlink()
    assert newest_readable(folder) == folder / "previous.ckpt"
    (folder / "previous.ckpt").unlink()
    for age, name in enumerate(["epoch=9.ckpt", "best.ckpt", "epoch=10.ckpt"]):
        torch.save(content(age), folder / name)
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert newest_readable(folder) == folder / "epoch=9.ckpt"


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_where_none_can_be_read_there_is_no_fresh_start(folder: Path):
    emptied(folder / "last.ckpt")
    truncated(folder / "previous.ckpt")
    with pytest.raises(InputError, match="no checkpoint of 2 can be read.*--overwrite"):
        newest_readable(folder)


def test_no_checkpoint_is_none(tmp_path: Path):
    assert newest_readable(tmp_path) is None
    assert newest_readable(tmp_path / "absent") is None
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half")
    assert newest_readable(tmp_path) is None


class Trap:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, save):
    save({**content(1.0), "trap": Trap(tmp_path / "sprung")}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last.ckpt: .*tensors and plain values alone"):
        read(tmp_path / "last.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_any_damage_is_one_error_that_names_the_file(folder: Path):
    whole, generator = (folder / "last.ckpt").read_bytes(), torch.Generator().manual_seed(0)
    legacy = folder / "legacy.ckpt"
    torch.save(content(1.0), legacy, _use_new_zipfile_serialization=False)
    path, outcomes = folder / "harmed.ckpt", []
    for original in (whole, legacy.read_bytes()) * 60:
        harmed = bytearray(original)
        start, length = torch.randint(len(harmed) - 400, (2,), generator=generator).tolist()
        harmed[start : start + length] = torch.randint(256, (length // 2,), generator=generator).tolist()
        path.write_bytes(harmed)
        try:
            outcomes.append(damage(path) is None)  # anything else than InputError within would come out here
            read(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert not all(outcomes)


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="absent.ckpt: there is no such file"):
        read(tmp_path / "absent.ckpt")
    with pytest.raises(InputError, match="there is no such file"):
        read(tmp_path)


# When


def saved_steps(folder: Path) -> dict[str, int]:
    return {path.name: read(path)["global_step"] for path in folder.glob("*.ckpt")}


def test_the_rhythm(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps, save = [], AtomicCheckpointIO.save_checkpoint

    def record(self, content: dict, path: Path, storage_options=None) -> None:
        steps.append((content["global_step"], content["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]))
        save(self, content, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", record)
    monkeypatch.setattr(Checkpoints, "_improved", lambda *_: False)
    # 5 steps an epoch; step 10 is an epoch's last and waits for the validation, in a checkpoint of no due epoch.
    train(Checkpoints(every_n_steps=2, every_n_epochs=3, milestones=[1]), epochs=5, batch_per_device=4)
    assert [step for step, _ in steps] == [2, 4, 5, 6, 8, 12, 14, 15, 16, 18, 22, 24, 25]
    assert files(tmp_path / "run" / "checkpoints") == ["epoch=1.ckpt", "last.ckpt", "previous.ckpt"]
    assert saved_steps(tmp_path / "run" / "checkpoints") == {"epoch=1.ckpt": 5, "last.ckpt": 25, "previous.ckpt": 24}


@pytest.mark.parametrize("higher, expected", [(True, [True, False, True, False, False, False]),
                                              (False, [True, True, False, False, False, True])])  # fmt: skip
def test_best_in_both_directions(higher, expected):
    callback, trainer = Checkpoints(), SimpleNamespace(check_val_every_n_epoch=1, current_epoch=0)
    module = SimpleNamespace(headline="score", higher_is_better=higher)
    found = []
    for score in (3.0, 2.0, 4.0, 4.0, float("nan"), 1.0):
        trainer.callback_metrics = {"val/score": torch.tensor(score)}
        found.append(callback._improved(trainer, module))
    assert found == expected
    restored = Checkpoints()
    restored.load_state_dict(callback.state_dict())
    trainer.callback_metrics = {"val/score": torch.tensor(2.5)}
    assert restored._improved(trainer, module) is False


def test_best_is_not_linked_in_a_folder_that_is_another_s_by_then(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lost between a checkpoint, whose own check was passed, and its second name."""
    looks = iter(["when last.ckpt is written"])

    def check() -> None:
        if next(looks, None) is None:
            raise LostRunFolder("it is another's")

    monkeypatch.setattr(AtomicCheckpointIO, "__init__", lambda self: setattr(self, "check", check))
    monkeypatch.setattr(Checkpoints, "_improved", lambda *_: True)
    with pytest.raises(LostRunFolder):
        train(Checkpoints(), epochs=1)
    assert files(tmp_path / "run" / "checkpoints") == ["last.ckpt"]


def test_a_stale_validation_is_not_an_improvement(train: Callable, tmp_path: Path):
    callback, improved = Checkpoints(every_n_epochs=10), []
    found, callback._improved = callback._improved, lambda *both: improved.append(found(*both)) or improved[-1]
    train(callback, epochs=3, check_val_every_n_epoch=2)
    assert improved[:2] == [False, True]  # nothing was measured after the first
    train(callback := Checkpoints(), epochs=4, check_val_every_n_epoch=2, folder="stale")
    assert saved_steps(tmp_path / "stale" / "checkpoints")["best.ckpt"] in (10, 20)


def test_the_last_epoch_is_validated_whatever_the_rhythm(train: Callable, scalars: Callable, tmp_path: Path):
    train(Checkpoints(), epochs=3, check_val_every_n_epoch=2)
    assert [step for step, _ in scalars(tmp_path / "run")["val/acc1"]] == [10, 15]


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_epochs": -1}])
def test_a_rhythm_that_is_none_is_named(options):
    with pytest.raises(InputError, match=f"checkpoint.{next(iter(options))}"):
        Checkpoints(**options)


# Faults of a whole run: what is lost are the steps since the checkpoint before

RUN = ["--run_name", "run", "--model.optim.ema", "0.9", "--checkpoint.every_n_steps", "4"]


@pytest.fixture
def stopped(command: Callable, at: Callable, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run that has left after step 14 of 18, and the checkpoints of one that has not: last.ckpt is of step 14,
    previous.ckpt of 12, best.ckpt of 9.
    """
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    assert command("fit", *RUN, "--runs", undisturbed).code == 0
    at("on_train_batch_start", lambda m, *_: m.trainer.global_step == 13 and os.kill(os.getpid(), signal.SIGTERM))
    assert command("fit", *RUN).code == 75
    at("on_train_batch_start", lambda *_: None)
    folder = tmp_path / "runs/supervised/run/checkpoints"
    assert saved_steps(folder) == {"last.ckpt": 14, "previous.ckpt": 12, "best.ckpt": 9}
    return folder, undisturbed / "supervised/run/checkpoints"


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut_at(share: float) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * share))

    return cut


def zeroed_in_the_middle(path: Path) -> None:
    """As after a crash of the machine: the length is right, and a block was never written."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def of_another(path: Path) -> None:
    torch.save({"model": {"head.bias": torch.zeros(3)}, "optimizer": {}}, path)


TEN = [emptied, zeroed, zeroed_in_the_middle, of_another, text, *map(cut_at, (0.001, 0.13, 0.5, 0.87, 0.9999))]


def test_ten_damaged_checkpoints_cost_the_steps_since_the_one_before(
    command: Callable, stopped: tuple[Path, Path], scalars: Callable
) -> None:
    folder, undisturbed = stopped
    saved = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    for harm in TEN:
        shutil.rmtree(folder.parent)
        folder.mkdir(parents=True)
        for path, data in saved.items():
            path.write_bytes(data)
        harm(folder / "last.ckpt")
        with pytest.warns(UserWarning, match="last.ckpt cannot be read .*falling back"):
            assert command("fit", *RUN).code == 0
        assert_identical(folder, undisturbed)
        assert [step for step, _ in scalars(folder.parent)["train/loss"]] == [10]  # log_every_n_steps of the config


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_where_all_are_damaged_a_run_is_refused_and_left(command: Callable, stopped: tuple[Path, Path]) -> None:
    folder, _ = stopped
    for path, harm in zip(sorted(folder.iterdir()), (cut_at(0.5), zeroed, emptied), strict=True):
        harm(path)
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    outcome = command("fit", *RUN)
    assert outcome.code == 2
    assert "runs/supervised/run/checkpoints: no checkpoint of 3 can be read" in outcome.err.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before
    assert command("fit", *RUN, "--overwrite").code == 0


def test_a_full_disk(command: Callable, start: Callable, stopped: tuple[Path, Path]) -> None:
    """No file may have more than 64 kB, which a checkpoint has: no half of one stays, nor is the old one lost."""
    folder, undisturbed = stopped
    assert (folder / "last.ckpt").stat().st_size > 65536
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = start("fit", *RUN, largest_file=65536)
    assert process.wait(timeout=60) == 1
    assert process.stderr.splitlines()[-1] == (
        "failed: OSError: runs/supervised/run/checkpoints/last.ckpt could not be written ([Errno 27] File too large); "
        "what was saved before is intact. Make room, and the same command goes on (--debug shows where)")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads((folder.parent / "results.json").read_text())["status"] == "failed"
    assert not leftovers(folder.parent)
    assert command("fit", *RUN).code == 0
    assert_identical(folder, undisturbed)

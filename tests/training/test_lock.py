"""One process per run folder: others are refused, a dead one is no obstacle, and one that Slurm gave up leaves."""

import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import free_port
from processes import assert_identical, children, freeze, leftovers, until, written

from common import lock
from common.errors import InputError
from common.lock import LostRunFolder, RunLock
from common.training.checkpoints import read
from common.training.run import restarted

RUN = ["--run_name", "run", "--trainer.max_epochs", "25", "--model.optim.ema", "0.9", "--data.batch_per_device", "32"]
OFTEN = [*RUN, "--checkpoint.every_n_steps", "2"]


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "supervised" / "run"


def status(folder: Path) -> str:
    return json.loads((folder / "results.json").read_text())["status"]


def content(folder: Path) -> dict[Path, bytes]:
    """Without the lock: a process that opens and closes a file loses its lock on it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_nodes_that_lightning_starts_train_in_one_folder(start: Callable, folder: Path) -> None:
    """Each node's first process takes itself for rank 0 until there is a Trainer."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [start("fit", "--run_name", "run", "--trainer.num_nodes", "2", "--trainer.devices", "1",
                   variables={**meeting, "NODE_RANK": str(node)}) for node in (0, 1)]  # fmt: skip
    assert [node.wait() for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert status(folder) == "finished"


def test_a_second_process_is_refused_and_a_killed_one_is_no_obstacle(
    command: Callable, start: Callable, folder: Path, tmp_path: Path
) -> None:
    """In a new folder, in that of a run, and to overwrite it. Then the first dies, and leaves two loaders behind."""
    process = start("fit", *OFTEN, "--data.workers", "2")

    def refused(*more: str) -> None:
        outcome = command("fit", *OFTEN, *more)
        assert process.poll() is None
        assert outcome.code == 2 and outcome.err.splitlines()[-1] == (
            f"error: {folder.relative_to(tmp_path)}: process {process.pid} on {socket.gethostname()} is training in "
            "this folder; wait for it or stop it, or choose another --run_name")

    until(process, lambda: (folder / "lock").exists() and (folder / "lock").read_bytes())
    freeze(process)
    refused()
    refused("--overwrite")
    assert not (folder / "config.yaml").exists()
    os.kill(process.pid, signal.SIGCONT)
    until(process, (folder / "checkpoints/last.ckpt").exists)
    freeze(process)
    before = content(folder)
    refused()
    refused("--overwrite")
    assert content(folder) == before
    assert command("fit", *OFTEN, "--run_name", "beside", "--trainer.max_epochs", "2").code == 0
    assert not leftovers(folder.with_name("beside")) and content(folder) == before

    loaders = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(loaders) >= 2 and all(Path(f"/proc/{pid}").exists() for pid in loaders)
    assert (folder / "lock").exists()
    assert command("fit", *OFTEN).code == 0 and not leftovers(folder)
    assert command("fit", *OFTEN, "--runs", "whole").code == 0
    assert_identical(tmp_path / "whole/supervised/run/checkpoints", folder / "checkpoints")


def test_a_first_ends_as_if_alone(command: Callable, start: Callable, folder: Path, tmp_path: Path) -> None:
    """It can be tested while it goes on, which takes no lock, and refusals do not disturb it."""
    process = start("fit", *OFTEN)
    until(process, (folder / "checkpoints/previous.ckpt").exists)
    freeze(process)
    for subcommand in ("check", "test"):
        assert command(subcommand, *OFTEN).code == 0
    os.kill(process.pid, signal.SIGCONT)
    outcomes = []
    while status(folder) == "running":
        outcomes.append(command("fit", *OFTEN))
    assert process.wait(timeout=60) == 0, process.stderr
    *refusals, _ = outcomes  # it may have finished before the last one looked
    assert refusals and all(said.code == 2 and f"process {process.pid} " in said.err for said in refusals)


class Taken:
    """A training of Slurm job 7, stopped somewhere, whose folder the same job's next start has taken over.

    Args:
        after: the checkpoint that it has written when it is stopped.
    """

    def __init__(self, start: Callable, folder: Path, *options: str, after: str = "last.ckpt") -> None:
        self.folder = folder
        self.process = start("fit", *options, variables={"SLURM_JOB_ID": "7"})
        until(self.process, (folder / "checkpoints" / after).exists)
        freeze(self.process)

    def wake(self) -> str:
        os.kill(self.process.pid, signal.SIGCONT)
        return "".join(self.process.communicate(timeout=60))


# The old start's own event file is its own, and may grow until it notices.
def of_the_newcomer(folder: Path, old: set[Path]) -> dict[Path, bytes]:
    return {path: data for path, data in content(folder).items() if path not in old}


@pytest.mark.parametrize("rhythm, after", [("2", "last.ckpt"), ("1000", "best.ckpt")])
def test_a_start_of_the_same_job_takes_over_and_the_old_one_leaves(
    command: Callable, start: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch, rhythm, after
) -> None:
    """And nothing of the newcomer is touched, whether the old one wakes at the next checkpoint or an epoch's end."""
    options = [*RUN, "--checkpoint.every_n_steps", rhythm]
    taken = Taken(start, folder, *options, after=after)
    old = set(folder.glob("events.*"))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert f"process {taken.process.pid} " in command("fit", *options).err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert f"process {taken.process.pid} " in command("fit", *options).err

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ours = RunLock(folder)
    ours.acquire()
    before = of_the_newcomer(folder, old)
    output = taken.wake()
    assert taken.process.returncode == 1
    assert "a later start of this job has taken the folder over; leaving it alone" in output
    assert "Traceback" not in output and output.count("taken the folder over") == 1
    assert of_the_newcomer(folder, old) == before
    assert not list(folder.rglob("*.tmp"))
    ours.check()
    ours.release()
    assert not leftovers(folder)


def test_the_old_one_leaves_also_when_the_newcomer_has_finished(
    command: Callable, start: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(start, folder, *OFTEN)
    old = set(folder.glob("events.*"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert command("fit", *OFTEN).code == 0
    assert status(folder) == "finished" and not leftovers(folder)
    before = of_the_newcomer(folder, old)
    output = taken.wake()
    assert taken.process.returncode == 1 and "taken the folder over" in output, output
    assert of_the_newcomer(folder, old) == before and status(folder) == "finished"


@pytest.mark.parametrize("text", ['{"host": "n1", "process": 1, "job": "7"}', "", "{", "[1, 2]"])
def test_a_stale_lock_file_is_no_obstacle(command: Callable, folder: Path, text) -> None:
    folder.mkdir(parents=True)
    (folder / "lock").write_text(text)
    assert command("fit", *RUN, "--trainer.max_epochs", "1").code == 0
    assert status(folder) == "finished" and not leftovers(folder)


def test_a_lock_that_is_a_folder_is_named(command: Callable, folder: Path) -> None:
    (folder / "lock").mkdir(parents=True)
    outcome = command("fit", *RUN)
    assert outcome.code == 2 and "runs/supervised/run/lock: Is a directory" in outcome.err
    assert (folder / "lock").is_dir()


@pytest.mark.parametrize("options, code", [
    ([], 0),
    (["--model.optim.lr", "1e30"], 1),
    (["--data.batch_size", "1006", "--data.batch_per_device", "33"], 2),
    (["--model.optim.warmup_epochs", "9"], 2),
    (["--init_from", "absent"], 2),
    (["--data.source", "common.data.Absent"], 2),
    (["--requeue_signal", "none"], 2),
])  # fmt: skip
def test_nothing_is_left_behind(command: Callable, folder: Path, tmp_path: Path, options, code) -> None:
    """However a command ends; and one that failed before its first step leaves no folder."""
    assert command("fit", "--run_name", "run", *options).code == code
    assert not leftovers(tmp_path)
    assert (tmp_path / "runs").exists() == (code != 2)


def test_a_failed_start_keeps_the_folders_of_others(command: Callable, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "notes.txt").touch()
    assert command("fit", *RUN, "--model.optim.warmup_epochs", "99").code == 2
    assert list(folder.iterdir()) == [folder / "notes.txt"]


# The lock itself


def held(lock: RunLock) -> bool:
    """Whether another process finds it taken."""
    probe = "import fcntl, sys\nfcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run(["python3", "-c", probe, lock.path], stderr=subprocess.DEVNULL).returncode != 0


def test_it_is_held_from_acquire_to_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = RunLock(tmp_path / "runs" / "a")
    lock.check()  # not held: nothing to lose
    lock.acquire()
    lock.check()
    assert held(lock)
    line = subprocess.run(["cat", lock.path], capture_output=True, text=True).stdout  # to open it here would unlock it
    assert json.loads(line) == {"host": socket.gethostname(), "process": os.getpid(), "job": "7"}
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_or_has_content_stays(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "runs" / "a")
    (tmp_path / "runs").mkdir()
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"] and not list((tmp_path / "runs").iterdir())
    lock.acquire()
    (lock.folder / "config.yaml").touch()
    lock.release()
    assert list(lock.folder.iterdir()) == [lock.folder / "config.yaml"]


def test_who_lost_the_folder_leaves_it_as_it_is(tmp_path: Path) -> None:
    """Its lock file was replaced by another's, or is gone with the other that has finished."""
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / "other").write_text("theirs")
    os.replace(tmp_path / "other", lock.path)
    with pytest.raises(LostRunFolder, match="a later start of this job has taken the folder over"):
        lock.check()
    lock.path.unlink()
    with pytest.raises(LostRunFolder, match="or lock was removed"):
        lock.check()
    lock.path.write_text("theirs")
    lock.release()
    assert lock.path.read_text() == "theirs"


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_holder_that_leaves_while_another_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_folder: bool
) -> None:
    """It removes its file, and the folder that it made, between the other's opening and locking it."""
    ours, tried = RunLock(tmp_path / "a"), []

    def locked(file: int) -> bool:
        if not tried:
            ours.path.unlink()
            if with_folder:
                ours.folder.rmdir()
        tried.append(file)
        return True

    monkeypatch.setattr(lock, "_locked", locked)
    ours.acquire()
    assert len(tried) == 2 and os.path.samestat(os.fstat(tried[1]), ours.path.stat())
    ours.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="no locks; see that no other process"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_holder_that_has_not_written_its_line_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number) -> None:
    """Also in a job: only a line with its number is Slurm's word."""

    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(InputError, match="another process is training in this folder"):
        RunLock(tmp_path).acquire()


# --overwrite in a job that Slurm starts again


@pytest.mark.parametrize("variables, job, expected", [
    ({}, "7", False),
    ({"SLURM_JOB_ID": "7"}, "7", False),  # the first start of a job
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}, "7", False),
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "7", True),
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "12"}, "7", True),
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, "6", False),  # another job's run
    ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, None, False),  # one outside Slurm
])  # fmt: skip
def test_whose_run_a_restarted_job_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables, job, expected):
    (tmp_path / "results.json").write_text(json.dumps({"status": "running", **({"job": job} if job else {})}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert restarted(tmp_path) == expected
    (tmp_path / "results.json").unlink()
    assert not restarted(tmp_path)


def test_overwriting_in_a_job_that_is_started_again(
    command: Callable, at: Callable, scalars: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start discards what was there, the next goes on, and the next job's start discards that."""
    short = ["--run_name", "run", "--trainer.log_every_n_steps", "1"]

    def stop_at(step: int) -> None:
        at("on_train_batch_start", lambda m, *_: m.trainer.global_step == step and os.kill(os.getpid(), signal.SIGTERM))

    assert command("fit", *short, "--model.optim.lr", "1e-3").code == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    stop_at(3)
    assert command("fit", *short).code == 2  # another config
    assert command("fit", *short, "--overwrite").code == 75
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == 4
    assert not (folder / "checkpoints/previous.ckpt").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stop_at(11)
    assert command("fit", *short, "--overwrite").code == 75
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, 13))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert command("fit", *short, "--overwrite").code == 0
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, 19))
    assert len(list(folder.glob("events.*"))) == 3
    seen = written(folder / "checkpoints/last.ckpt")
    outcome = command("fit", *short, "--overwrite")
    assert outcome.code == 0 and "finished: " in outcome.out and written(folder / "checkpoints/last.ckpt") == seen

    monkeypatch.setenv("SLURM_JOB_ID", "8")  # whose first start ended before it could discard
    assert command("fit", *short, "--overwrite").code == 75
    assert len(list(folder.glob("events.*"))) == 1 and json.loads((folder / "results.json").read_text())["job"] == "8"

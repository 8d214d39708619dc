"""A signal costs no step: the run leaves with 75 and a checkpoint, and the same command ends as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ROOT
from processes import assert_identical, children, leftovers, until, written
from small import SMALL

from common.training.checkpoints import read
from common.training.requeue import Requeue, requeue
from supervised import Classification

# 9 steps an epoch, of 4 micro-batches each; all that has a state or draws random numbers.
RUN = ["--run_name", "run", "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--model.optim.ema", "0.9",
       "--model.drop_path", "0.2", "--data.batch_per_device", "32", "--checkpoint.every_n_steps", "4",
       "--checkpoint.milestones", "[1]"]  # fmt: skip
DIGITS = ROOT / "supervised" / "configs" / "digits.yaml"
LONG = [*RUN, "--trainer.max_epochs", "25"]  # seconds
TWO = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]
EVERY_STEP = list(range(1, 28))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an undisturbed run of these options, made once."""
    made: dict[tuple, Path] = {}

    def run(start: Callable, *options: str) -> Path:
        if options not in made:
            runs = tmp_path_factory.mktemp("undisturbed")
            start("fit", *options, "--runs", runs)
            made[options] = runs / "supervised" / "run"
            assert status(made[options]) == "finished"
        return made[options]

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "supervised" / "run"


@pytest.fixture
def as_typed(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Starts the command that `start` stands for, with nothing imported; further ranks are launched by Lightning."""

    def run(*options: object, within: Sequence[str] = ()) -> subprocess.Popen:
        words = [*within, sys.executable, "-m", "supervised", "fit", "--config", DIGITS, *SMALL, *options]
        return subprocess.Popen([str(word) for word in words], cwd=tmp_path, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    return run


def status(folder: Path) -> str:
    return json.loads((folder / "results.json").read_text())["status"]


def once(moment: Callable[..., bool], number: int) -> Callable[..., None]:
    """A hook that signals this process the first time that `moment(module, ...)` holds."""
    sent = []

    def act(module, *arguments) -> None:
        if not sent and moment(module, *arguments):
            sent.append(os.kill(os.getpid(), number))

    return act


def assert_stopped(outcome, folder: Path, name: str, step: int) -> None:
    lines = [line for line in outcome.out.splitlines() if line.startswith("stopped")]
    assert outcome.code == 75, outcome
    assert lines == [f"stopped after {name} at step {step}, all is saved; the same command goes on"]
    assert "failed" not in outcome.err and "error" not in outcome.err
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == step
    assert status(folder) == "running" and not leftovers(folder)


@pytest.mark.parametrize("options, number, name, step", [
    ([], signal.SIGTERM, "SIGTERM", 5),
    ([], signal.SIGUSR1, "SIGUSR1", 12),  # whose checkpoint is due then anyway
    (["--requeue_signal", "SIGUSR2"], signal.SIGUSR2, "SIGUSR2", 14),
    (["--requeue_signal", "USR2"], signal.SIGTERM, "SIGTERM", 1),
])  # fmt: skip
def test_a_signal_in_mid_epoch(
    command: Callable, reference: Callable, at: Callable, scalars: Callable, folder: Path, options, number, name, step
) -> None:
    """Never between the micro-batches of a step, and the line, the status and the checkpoint are that step's."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    at("on_train_batch_start", once(lambda m, _, i: m.trainer.global_step == step - 1 and i % 4 == 1, number))
    assert_stopped(command("fit", *RUN, *options), folder, name, step)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == before
    assert [s for s, _ in scalars(folder)["train/loss"]] == EVERY_STEP[:step]

    assert command("fit", *RUN, *options).code == 0
    undisturbed = reference(command, *RUN)
    assert_identical(undisturbed / "checkpoints", folder / "checkpoints")
    assert scalars(folder)["train/loss"] == scalars(undisturbed)["train/loss"]
    assert [s for s, _ in scalars(folder)["train/loss"]] == EVERY_STEP
    assert status(folder) == "finished" and not leftovers(folder)


@pytest.mark.parametrize("hook, moment", [
    ("on_train_batch_start", lambda m, _, i: m.trainer.global_step == 8 and i == 35),  # the epoch's last
    ("on_validation_batch_start", lambda m, *_: m.trainer.global_step == 9),
    ("on_validation_end", lambda m: m.trainer.global_step == 9),
])  # fmt: skip
def test_a_signal_at_an_epochs_end_is_answered_after_the_validation(
    command: Callable, reference: Callable, at: Callable, scalars: Callable, folder: Path, hook, moment
) -> None:
    """With what the end of an epoch leaves: the validation's scores, the best checkpoint and the milestone."""
    at(hook, once(moment, signal.SIGTERM))
    assert_stopped(command("fit", *RUN), folder, "SIGTERM", 9)
    assert "val/acc1" in json.loads((folder / "results.json").read_text())["metrics"]
    names = ("best.ckpt", "epoch=1.ckpt", "last.ckpt")
    assert [read(folder / "checkpoints" / name)["global_step"] for name in names] == [9, 9, 9]

    assert command("fit", *RUN).code == 0
    undisturbed = reference(command, *RUN)
    assert_identical(undisturbed / "checkpoints", folder / "checkpoints")
    ours, theirs = scalars(folder), scalars(undisturbed)
    assert ours["train/loss"] == theirs["train/loss"]
    assert ours["val/acc1"][1:] == theirs["val/acc1"][1:]  # before it the NaN of HPARAMS
    assert [step for step, _ in ours["val/acc1"]] == [0, 9, 18, 27]
    found, expected = (read(place / "checkpoints/best.ckpt") for place in (folder, undisturbed))
    assert found["global_step"] == expected["global_step"]
    assert all(torch.equal(found["state_dict"][key], value) for key, value in expected["state_dict"].items())


def test_a_signal_before_the_first_step_is_answered_after_it(command: Callable, at: Callable, folder: Path) -> None:
    at("on_fit_start", once(lambda m: True, signal.SIGTERM))
    assert_stopped(command("fit", *RUN), folder, "SIGTERM", 1)
    assert command("fit", *RUN).code == 0 and status(folder) == "finished"


@pytest.mark.parametrize("hook, moment", [
    ("on_train_batch_start", lambda m, _, i: m.trainer.global_step == 26),
    ("on_validation_batch_start", lambda m, *_: m.trainer.global_step == 27),
])  # fmt: skip
def test_after_the_last_step_a_run_just_finishes(command: Callable, at: Callable, folder: Path, hook, moment) -> None:
    at(hook, once(moment, signal.SIGTERM))
    outcome = command("fit", *RUN)
    assert outcome.code == 0 and "stopped" not in outcome.out and status(folder) == "finished"


def test_two_signals_are_one(command: Callable, at: Callable, folder: Path) -> None:
    """Slurm sends its own SIGTERM after the requeue signal, maybe while the checkpoint is being written."""

    def twice(module, _, i: int) -> None:
        if module.trainer.global_step == 4 and i == 16:
            os.kill(os.getpid(), signal.SIGUSR1)

    at("on_train_batch_start", twice)
    save = Classification.on_save_checkpoint
    at("on_save_checkpoint", lambda module, content: (os.kill(os.getpid(), signal.SIGTERM), save(module, content)))
    outcome = command("fit", *RUN)
    assert outcome.code == 75 and outcome.out.count("stopped after ") == 1
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == 5


@pytest.mark.parametrize("fault", [["--model.patch_size", "3"], ["--trainer.devices", "0"], ["--nonfinite", "skp"]])
def test_a_start_that_fails_restores_the_handlers(command: Callable, fault) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    assert command("fit", *RUN, *fault).code == 2
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("name", ["SIGNONE", "10", "sigterm"])
def test_an_unknown_signal_is_named(command: Callable, tmp_path: Path, name) -> None:
    outcome = command("fit", *RUN, "--requeue_signal", name)
    assert outcome.code == 2 and f"--requeue_signal: {name} is no signal; give one such as SIGUSR1" in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_signal_that_cannot_be_caught_is_refused(command: Callable, tmp_path: Path, name) -> None:
    outcome = command("fit", *RUN, "--requeue_signal", name)
    assert outcome.code == 2 and f"--requeue_signal: {name}" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


# From outside


def test_a_shell_does_not_go_on_and_loader_processes_are_no_obstacle(
    command: Callable, as_typed: Callable, reference: Callable, scalars: Callable, folder: Path
) -> None:
    """Slurm signals every process of a job: here a shell, that outlasts it, the training, and its two loaders."""
    lines = 'trap : TERM; "$@" && echo next; code=$?; exit $code'
    with as_typed(*LONG, "--data.workers", "2", within=["bash", "-c", lines, "-"]) as process:
        until(process, (folder / "checkpoints/last.ckpt").exists)
        assert len(children(children(process.pid)[0])) >= 2
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "next" not in output and "failed" not in output, output
    assert output.count("stopped after SIGTERM at step ") == 1
    step = int(output.split("stopped after SIGTERM at step ")[1].split(",")[0])
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == step < 225
    assert status(folder) == "running" and not leftovers(folder)
    assert command("fit", *LONG, "--data.workers", "1").code == 0
    undisturbed = reference(command, *LONG)
    assert_identical(undisturbed / "checkpoints", folder / "checkpoints")
    assert scalars(folder)["train/loss"] == scalars(undisturbed)["train/loss"]


def test_one_rank_that_is_signalled_is_enough(
    start: Callable, as_typed: Callable, reference: Callable, scalars: Callable, folder: Path
) -> None:
    """The first in one start, the second in the next; and both ranks leave at the same step.

    Started as torchrun does; the undisturbed run by Lightning's own launcher.
    """
    steps, last = [0], folder / "checkpoints/last.ckpt"
    for rank in (0, 1):
        before = written(last)
        process = start("fit", *LONG, *TWO, ranks=2)
        until(process, lambda before=before: written(last) > before)
        os.kill(process.pids[rank], signal.SIGUSR1)
        assert process.wait(timeout=60) == 75, process.stderr
        output = process.stdout
        name = "a signal on another rank" if rank else "SIGUSR1"
        assert f"stopped after {name} at step " in output and output.count("stopped after") == 1, output
        steps.append(int(output.split(f"{name} at step ")[1].split(",")[0]))
        assert steps[-2] < read(last)["global_step"] == steps[-1] < 225
        assert status(folder) == "running" and not leftovers(folder)
    process = start("fit", *LONG, *TWO, ranks=2)
    assert process.wait() == 0, process.stderr
    undisturbed = reference(lambda _, *options: as_typed(*options).communicate(), *LONG, *TWO)
    assert_identical(undisturbed / "checkpoints", folder / "checkpoints")
    assert scalars(folder)["train/loss"] == scalars(undisturbed)["train/loss"]


@pytest.mark.parametrize("other, said", [(8, None), (12, "8 to 12"), (0, "0 to 8")])
def test_ranks_that_found_different_checkpoints_do_not_train(monkeypatch: pytest.MonkeyPatch, other, said) -> None:
    """As a network's file system may show them; a stand-in for the other rank of the reduction."""
    monkeypatch.setattr("common.training.requeue.dist.all_reduce", lambda ends, **_: ends.copy_(
        torch.maximum(ends, torch.tensor([other, -other]))))  # fmt: skip
    groups, patience = [], timedelta(hours=2)
    monkeypatch.setattr("common.training.requeue.dist.new_group", lambda **options: groups.append(options))
    trainer = SimpleNamespace(world_size=2, global_step=8, strategy=SimpleNamespace(_timeout=patience))
    with pytest.raises(RuntimeError, match=f"steps, {said}: .*start the same command") if said else nullcontext():
        Requeue("SIGUSR1").on_train_start(trainer, None)
    assert groups == [{"backend": "gloo", "timeout": patience}]  # that of the other collectives


def test_an_evaluation_that_is_ended_is_no_success(
    command: Callable, start: Callable, folder: Path, tmp_path: Path
) -> None:
    """Nothing is caught there: what comes after it must not take it for done."""
    assert command("fit", *RUN).code == 0
    before = (folder / "results.json").read_bytes()
    interrupted = ("import os, signal, supervised; from common.training.cli import main\n"
                   "hook = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
                   "supervised.Classification.on_{}_batch_start = hook; main('supervised')")
    for subcommand, hook in (("test", "test"), ("validate", "validation")):
        (tmp_path / f"{subcommand}_interrupted.py").write_text(interrupted.format(hook))
        process = start(subcommand, *RUN, module=f"{subcommand}_interrupted")
        assert process.wait(timeout=60) == -signal.SIGTERM, process.stderr
        assert (folder / "results.json").read_bytes() == before


# What Slurm is asked for

SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
if [ "$1" = show ]; then
    echo "JobId=7 JobName=pixels"
    echo "   JobState=$STATE Reason=$REASON Dependency=(null)"
    echo "   Requeue=1 Restarts=0 BatchFlag=1"
else
    [ -z "$REFUSAL" ] || { echo "$REFUSAL" >&2; exit 1; }
fi
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Puts a stand-in first in PATH that shows a job in this state; returns what it was called with."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)

    def shows(state: str, reason: str = "None", refusal: str = "") -> Callable[[], list[str]]:
        for name, value in [("STATE", state), ("REASON", reason), ("REFUSAL", refusal)]:
            monkeypatch.setenv(name, value)
        return lambda: (tmp_path / "calls").read_text().splitlines()

    return shows


@pytest.mark.parametrize("state, reason", [("RUNNING", "None"), ("COMPLETING", "TimeLimit"), ("TIMEOUT", "TimeLimit")])
def test_a_job_that_runs_or_ran_out_of_time_is_requeued(scontrol: Callable, state, reason) -> None:
    calls = scontrol(state, reason)
    assert requeue() == "job 7 is requeued"
    assert calls() == ["show job 7", "requeue 7"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", "PENDING", "COMPLETED", "NODE_FAIL", ""])
def test_a_job_that_was_ended_is_left_alone(scontrol: Callable, state) -> None:
    """A cancelled one must stay so, and Slurm itself requeues a preempted one."""
    calls = scontrol(state)
    assert requeue() == "job 7 is not requeued, since it was ended; the same command goes on"
    assert calls() == ["show job 7"]


def test_a_task_of_an_array_is_requeued_alone(scontrol: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scontrol("RUNNING")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue() == "job 5_3 is requeued"
    assert calls() == ["show job 5_3", "requeue 5_3"]


def test_a_request_that_fails_is_reported(scontrol: Callable) -> None:
    scontrol("RUNNING", refusal="slurm_requeue error: Requested operation is presently disabled")
    assert requeue() == "slurm_requeue error: Requested operation is presently disabled; the same command goes on"


def test_the_run_tells_what_came_of_it(command: Callable, at: Callable, scontrol: Callable) -> None:
    calls = scontrol("RUNNING")
    at("on_train_batch_start", once(lambda m, *_: m.trainer.global_step == 4, signal.SIGTERM))
    outcome = command("fit", *RUN)
    assert outcome.code == 75
    assert "stopped after SIGTERM at step 5, all is saved; job 7 is requeued\n" in outcome.out
    assert calls() == ["show job 7", "requeue 7"]


@pytest.mark.soak
def test_the_other_rank_waits_while_the_first_asks(
    as_typed: Callable, scontrol: Callable, folder: Path, tmp_path: Path
) -> None:
    """Lightning's launcher looks every five seconds whether a rank has left, and kills the others."""
    calls = scontrol("RUNNING")
    (tmp_path / "bin/scontrol").write_text(SCONTROL.replace("else\n", "else\n    sleep 12\n"))
    with as_typed(*LONG, *TWO) as process:
        until(process, (folder / "checkpoints/last.ckpt").exists)
        os.kill(process.pid, signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "job 7 is requeued" in output, output
    assert calls() == ["show job 7", "requeue 7"]


def test_without_scontrol_it_is_said_at_the_start(
    command: Callable, at: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    at("on_train_batch_start", once(lambda m, *_: m.trainer.global_step == 4, signal.SIGTERM))
    with pytest.warns(UserWarning, match="scontrol is not found: .* exit code 75, and the batch script has to requeue"):
        outcome = command("fit", *RUN)
    assert outcome.code == 75 and "the same command goes on" in outcome.out


def test_outside_slurm_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, scontrol: Callable, tmp_path: Path) -> None:
    scontrol("RUNNING")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue() == "the same command goes on" and not (tmp_path / "calls").exists()

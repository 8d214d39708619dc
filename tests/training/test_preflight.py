"""A job whose tasks are not the Trainer's devices ends at once, and is told what would agree."""

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import ROOT
from lightning.fabric.accelerators.mps import MPSAccelerator
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from small import SMALL

from common.errors import InputError
from common.lock import LostRunFolder
from common.training.cli import StudyCLI
from common.training.preflight import check_devices, check_tasks

# What srun gives to each process of `sbatch --nodes 2 --ntasks-per-node 4`, in so far as it matters here.
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pixels", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4",
       "SLURM_NNODES": "2", "SLURM_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
       "SLURM_NODEID": "0"}  # fmt: skip
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize("environment", [
    {},
    {"SLURM_NTASKS": "1"},
    {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"},
    JOB,
])  # fmt: skip
def test_tasks_that_are_known(environment) -> None:
    check_tasks(environment)


@pytest.mark.parametrize("tasks", ["2", "8"])
def test_tasks_without_a_plan(tasks) -> None:
    with pytest.raises(InputError, match=f"SLURM_NTASKS: {tasks} tasks, .*--nodes and --ntasks-per-node in place of"):
        check_tasks({"SLURM_NTASKS": tasks})


@pytest.mark.parametrize("tasks, on, nodes, devices", [
    (8, 2, 2, 4), (1, 1, 1, 1), (2, 2, 2, 1), (2, 1, 1, 2), (6, 3, 3, 2),
])  # fmt: skip
def test_tasks_that_agree(tasks, on, nodes, devices) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": f"{tasks}", "SLURM_STEP_NUM_NODES": f"{on}"}
    check_devices(nodes, devices, step)


@pytest.mark.parametrize("tasks, on, nodes, devices, options", [
    (8, 2, 1, 1, "--trainer.num_nodes 2 --trainer.devices 4, or sbatch --nodes 1 --ntasks-per-node 1"),
    (2, 1, 1, 1, "--trainer.num_nodes 1 --trainer.devices 2, or sbatch --nodes 1 --ntasks-per-node 1"),  # two copies
    (8, 2, 4, 2, "--trainer.num_nodes 2 --trainer.devices 4, or sbatch --nodes 4 --ntasks-per-node 2"),  # as many
    (8, 2, 2, 8, "--trainer.num_nodes 2 --trainer.devices 4, or sbatch --nodes 2 --ntasks-per-node 8"),
    (8, 1, 2, 4, "--trainer.num_nodes 1 --trainer.devices 8, or sbatch --nodes 2 --ntasks-per-node 4"),
    (5, 2, 2, 2, "--trainer.num_nodes 2 --trainer.devices N, or sbatch --nodes 2 --ntasks-per-node 2"),
])  # fmt: skip
def test_tasks_that_do_not(tasks, on, nodes, devices, options) -> None:
    step = {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": f"{tasks}", "SLURM_STEP_NUM_NODES": f"{on}"}
    with pytest.raises(InputError) as refusal:
        check_devices(nodes, devices, step)
    assert str(refusal.value) == (f"trainer.num_nodes: {nodes}, trainer.devices: {devices}: Slurm has started {tasks} "
                                  f"tasks on {on} nodes; give {options}")


def test_a_batch_script_without_srun() -> None:
    check_devices(1, 1, JOB)
    for nodes, devices in [(2, 1), (1, 2), (2, 4)]:
        with pytest.raises(InputError, match="Slurm has started one process, .* start the command with srun"):
            check_devices(nodes, devices, JOB)


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def put(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


CPUS = ["--run_name", "run", "--trainer.accelerator", "cpu", "--trainer.devices"]
NO_PLAN = {name: value for name, value in JOB.items() if name != "SLURM_NTASKS_PER_NODE"}


@pytest.mark.parametrize("variables, devices, part", [
    (STEP, "1", "trainer.num_nodes: 1, trainer.devices: 1: Slurm has started 8 tasks on 2 nodes; give --trainer.num_"),
    (JOB, "4", "start the command with srun"),
    (NO_PLAN, "4", "SLURM_NTASKS: 8 tasks, and Slurm was not told how many on a node"),
])  # fmt: skip
@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_the_command_refuses(command: Callable, within: Callable, tmp_path: Path, variables, devices, part, subcommand):
    """Every command that would train or judge a copy in each task; before there is anything in the run folder."""
    if subcommand == "test":
        assert command("fit", *CPUS, "1").code == 0
    within(variables)
    outcome = command(subcommand, *CPUS, devices)
    assert outcome.code == 2 and part in outcome.err.splitlines()[-1], outcome
    assert (tmp_path / "runs").exists() == (subcommand == "test")


@pytest.mark.parametrize("variables", [
    {**STEP, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_NUM_TASKS": "1",
     "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_NODELIST": "n1"},
    {**STEP, "SLURM_JOB_NAME": "bash"},  # a shell within a job, whose variables are the job's
    {**STEP, "SLURM_JOB_NAME": "interactive"},
])  # fmt: skip
def test_the_command_goes_on(command: Callable, within: Callable, variables) -> None:
    within(variables)
    assert command("fit", *CPUS, "1").code == 0


def test_a_process_of_a_mistaken_job_ends_in_seconds(start: Callable, tmp_path: Path) -> None:
    """In place of waiting for ranks that never come."""
    began = time.monotonic()
    process = start("fit", *CPUS, "4", variables=STEP)
    assert process.wait(timeout=100) == 2 and time.monotonic() - began < 90
    said = process.stderr.splitlines()[-1]
    assert said.startswith("error: trainer.num_nodes: 1, trainer.devices: 4: Slurm has started 8 ")
    assert not (tmp_path / "runs").exists()


def test_apples_gpu_is_not_taken_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cli = StudyCLI("supervised", ["check", "--config", "supervised/configs/digits.yaml", "--runs", str(tmp_path)])
    assert cli.trainer.strategy.root_device.type == "cpu"


@pytest.mark.parametrize("error, code, alone", [(RuntimeError("a cosmic ray"), 1, True),
                                                (LostRunFolder("taken"), "taken", True), (SystemExit(75), 75, False)])
def test_a_rank_that_fails_alone_waits_for_no_other_at_its_exit(
    command: Callable, at: Callable, monkeypatch: pytest.MonkeyPatch, error: BaseException,
    code: int | str, alone: bool,
) -> None:
    """As Lightning's handler would, which takes NCCL's groups down together with all ranks."""
    unregistered = []
    monkeypatch.setattr(atexit, "unregister", unregistered.append)

    def fail(*_: object) -> None:
        raise error

    at("training_step", fail)
    assert command("fit").code == code
    assert (_destroy_dist_connection in unregistered) == alone


def test_a_step_of_several_ranks_asks_nothing_of_lightnings_handlers(tmp_path: Path) -> None:
    """Which have been replaced: it would wait for the device in every micro-batch. Without a group it would raise."""
    cli = StudyCLI("supervised", ["check", "--config", "supervised/configs/digits.yaml", "--runs", str(tmp_path),
                                  *CPUS, "2", "--hang_timeout", "7200"])  # fmt: skip
    cli.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert cli.trainer.strategy._timeout.total_seconds() > 7200  # the watchdog's word before NCCL's


FAILING = """
import os, pathlib, time
import lightning as L

class Failing(L.Callback):
    def on_train_start(self, trainer, module):
        ready = pathlib.Path("ready")
        if trainer.global_rank:
            ready.write_text(str(os.getpid()))
            time.sleep(600)
        while not (ready.is_file() and ready.read_text()):
            time.sleep(0.01)
        raise OSError(28, "the disk is full")
"""


def test_ranks_that_lightning_started_end_with_the_first(tmp_path: Path) -> None:
    """It fails by itself, while the other would wait for minutes."""
    (tmp_path / "failing.py").write_text(FAILING)
    words = ["-m", "supervised", "fit", "--config", ROOT / "supervised/configs/digits.yaml", *SMALL, *CPUS, "2",
             "--trainer.callbacks", "failing.Failing"]  # fmt: skip
    outcome = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
                             timeout=200)  # fmt: skip
    assert outcome.returncode == 1 and "the disk is full" in outcome.stderr
    rank = Path("/proc", (tmp_path / "ready").read_text())
    deadline = time.monotonic() + 20
    while rank.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not rank.is_dir()

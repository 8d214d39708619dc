"""What takes minutes on a real Slurm: a time limit, a lost node, an array over the arms of a table."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import ROOT, Cluster

pytestmark = pytest.mark.soak
TRAIN = Path("common/slurm/train.sbatch")
EPOCH = 18  # steps
DIGITS = ["--config", "supervised/configs/digits.yaml", "--data.batch_size", "64", "--model.patch_size", "2",
          "--model.optim.warmup_epochs", "1", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
          "--checkpoint.every_n_steps", "5"]  # fmt: skip
TABLE = """\
four:
  shows: two patch sizes at two depths
  metric: val/acc1
  arms:
    2/2: {model.patch_size: 2, model.depth: 2}
    2/1: {model.patch_size: 2, model.depth: 1}
    4/2: {model.patch_size: 4, model.depth: 2}
    4/1: {model.patch_size: 4, model.depth: 1}
  scales:
    demo:
      config: digits
      set: {trainer.max_epochs: 2, model.optim.warmup_epochs: 1, trainer.accelerator: cpu}
"""


def finished(folder: Path, epochs: int, scalars: Callable) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished" and results["step"] == epochs * EPOCH
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, epochs * EPOCH + 1))
    assert not [*folder.rglob("*.tmp"), *folder.glob("lock*")]


def test_a_time_limit_costs_a_restart_and_no_step(cluster: Cluster, tmp_path: Path, scalars: Callable) -> None:
    """A minute, the shortest there is, in a run that is far longer; Slurm's SIGTERM ends it, and it goes on."""
    folder = tmp_path / "runs" / "supervised" / "limited"
    job = cluster.run(TRAIN, "supervised", "fit", *DIGITS, "--runs", tmp_path / "runs", "--run_name", folder.name,
                      "--trainer.max_epochs", 10_000,
                      options=["--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=USR2@0"])  # fmt: skip
    deadline = time.monotonic() + 300
    while cluster.restarts(job) == 0 or not len(list(folder.glob("events.*"))) == 2:
        assert time.monotonic() < deadline, cluster.logs(job)
        time.sleep(0.5)
    stopped = int(cluster.logs(job).split("stopped after SIGTERM at step ")[1].split(",")[0])
    steps: list[int] = []
    while not steps or steps[-1] <= stopped:
        assert time.monotonic() < deadline, cluster.logs(job)
        steps = [step for step, _ in scalars(folder)["train/loss"]]
    cluster.command("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, tmp_path: Path, scalars: Callable, node: str
) -> None:
    """Slurm starts the job again when the node is back, and the same job takes its folder over."""
    epochs, runs = 40, tmp_path / "runs"
    job = cluster.run(TRAIN, "supervised", "fit", *DIGITS, "--runs", runs, "--run_name", "lost", "--trainer.max_epochs",
                      epochs, options=["--nodes=2", "--ntasks-per-node=1"])
    last = runs / "supervised" / "lost" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert time.monotonic() < deadline, cluster.logs(job)
        time.sleep(0.05)
    cluster.fail(node)
    while cluster.restarts(job) == 0:
        assert time.monotonic() < deadline + 120, cluster.logs(job)
        time.sleep(0.5)
    cluster.revive(node)
    assert cluster.wait(job, seconds=300) == "COMPLETED", cluster.logs(job)
    finished(runs / "supervised" / "lost", epochs, scalars)


def test_an_array_trains_the_arms_of_a_table(cluster: Cluster, tmp_path: Path) -> None:
    """By the command of a user, in a copy of the suite that has a small table of its own."""
    copy = tmp_path / "suite"
    listed = subprocess.run(["git", "ls-files", "*.py", "*.yaml", "*.sbatch"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "supervised" / "paper.yaml").write_text(TABLE)
    submit = [cluster.environment["PYTHON"], "-m", "common.submit", "four", "--scale", "demo", "--gpus", "0", "--cpus",
              "1", "--go"]  # fmt: skip
    printed = subprocess.run(submit, cwd=copy, env=cluster.environment, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    job = int(printed.stdout.split("job ")[1])
    assert cluster.wait(job, seconds=300) == "COMPLETED", printed.stdout
    folders = sorted((copy / "runs" / "supervised").iterdir())
    assert len(folders) == 4
    assert {json.loads((folder / "results.json").read_text())["status"] for folder in folders} == {"finished"}
    again = subprocess.run(submit, cwd=copy, env=cluster.environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == "four, demo: all 4 runs are finished\n"

"""Slurm's plan of a job against the Trainer's: a mismatch hangs, or trains a copy of the model in every task."""

from __future__ import annotations

import os
from collections.abc import Mapping

from common.errors import InputError


def check_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a job that says how many tasks it has and not how many on a node, which Lightning needs to know."""
    tasks = int(environment.get("SLURM_NTASKS", 1))
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise InputError(f"SLURM_NTASKS: {tasks} tasks, and Slurm was not told how many on a node; give sbatch "
                         "--nodes and --ntasks-per-node in place of --ntasks")


def check_devices(nodes: int, devices: int, environment: Mapping[str, str] = os.environ) -> None:
    """Compares the nodes and devices per node of the Trainer with the tasks that Slurm has started.

    Raises:
        InputError: they differ; with the options that would agree.
    """
    job = f"trainer.num_nodes: {nodes}, trainer.devices: {devices}"
    if "SLURM_STEP_ID" not in environment:  # in the batch script itself
        if nodes * devices > 1:
            raise InputError(f"{job}: Slurm has started one process, and the others would never come; start the "
                             "command with srun")
        return
    tasks, on = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
    if (tasks, on) != (nodes * devices, nodes):
        per_node = f"{tasks // on}" if tasks % on == 0 else "N"
        raise InputError(f"{job}: Slurm has started {tasks} tasks on {on} nodes; give --trainer.num_nodes {on} "
                         f"--trainer.devices {per_node}, or sbatch --nodes {nodes} --ntasks-per-node {devices}")

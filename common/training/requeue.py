"""Leaving in time: a signal before the time limit, a preemption, a cancelled job, and going on after it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from types import FrameType

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from common.errors import InputError
from common.training.checkpoints import Checkpoints

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: all is saved, and the same command goes on


class Requeue(Checkpoint):
    """After SIGTERM or the requeue signal: a checkpoint, a request to Slurm for another start, exit code 75.

    The handler only sets a flag, since it may run anywhere in a step. At the end of a step all ranks agree, so that
    none waits for another that has left: each asks the others after every step, and looks at the answer one step later,
    when it has long arrived. A signal in the last batch of an epoch is answered after the validation.

    It is one of Lightning's checkpoint callbacks because those come last, when the others are done with a step.

    Args:
        name: of the signal beside SIGTERM, as in Slurm's `--signal SIGUSR1@120`.
    """

    def __init__(self, name: str) -> None:
        self.signals = (signal.SIGTERM, _signal(name))
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, object] = {}
        self._group: dist.ProcessGroup | None = None
        self._question: tuple[dist.Work, torch.Tensor] | None = None

    def listen(self) -> None:
        """From here on the signals do not end the process."""
        self._handlers = {number: signal.signal(number, self._note) for number in self.signals}

    def restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            # On the CPU: asking must not wait for a GPU. With the patience of the other collectives.
            self._group = dist.new_group(backend="gloo", timeout=trainer.strategy._timeout)
            self._compare_steps(trainer.global_step)
        if "SLURM_JOB_ID" in os.environ and shutil.which("scontrol") is None:
            rank_zero_warn(f"scontrol is not found: after a signal this command saves and leaves with exit code "
                           f"{STOPPED}, and the batch script has to requeue the job")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: object, b: object, i: int) -> None:
        if (i + 1) % trainer.accumulate_grad_batches:
            return
        agreed = self._agreed()
        if i + 1 < trainer.num_training_batches and agreed:
            self._leave(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 < trainer.max_epochs and self._agreed():
            _checkpoints(trainer).on_train_epoch_end(trainer, module)  # whose turn would come: best.ckpt, a milestone
            self._leave(trainer, module)

    def _compare_steps(self, step: int) -> None:
        """Each rank has found its checkpoint by itself, on a file system that may show one of them an older state."""
        ends = torch.tensor([step, -step])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        if ends.sum():
            raise RuntimeError(f"ranks go on from different steps, {-ends[1]} to {ends[0]}: not all of them see the "
                               "newest checkpoint yet; start the same command again")

    def _agreed(self) -> bool:
        """Whether any rank had received a signal when it was asked last."""
        if self._group is None:
            return self.received is not None
        before, flag = self._question, torch.tensor([self.received is not None], dtype=torch.int32)
        self._question = dist.all_reduce(flag, group=self._group, async_op=True), flag
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    def _leave(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _checkpoints(trainer).save(trainer, module)
        if trainer.is_global_zero:
            name = self.received.name if self.received else "a signal on another rank"
            print(f"stopped after {name} at step {trainer.global_step}, all is saved; {requeue()}", flush=True)
        trainer.strategy.barrier()  # Lightning's launcher kills a first rank whose second has left
        raise SystemExit(STOPPED)


def _checkpoints(trainer: L.Trainer) -> Checkpoints:
    return next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))


def _signal(name: str) -> signal.Signals:
    try:
        found = signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except KeyError:
        raise InputError(f"--requeue_signal: {name} is no signal; give one such as SIGUSR1 or SIGUSR2") from None
    if found in (signal.SIGKILL, signal.SIGSTOP):
        raise InputError(f"--requeue_signal: {name} cannot be caught; give one such as SIGUSR1 or SIGUSR2")
    return found


def requeue() -> str:
    """Asks Slurm to start this job again, and says what came of it.

    A job that was cancelled stays so, and one that was preempted is requeued by Slurm itself: only while it runs, and
    after its time limit, is there anything to ask for.
    """
    job, by_hand = os.environ.get("SLURM_JOB_ID"), "the same command goes on"
    if job is None or shutil.which("scontrol") is None:
        return by_hand
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # its last task has the number of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    found = dict(re.findall(r"(JobState|Reason)=(\S+)", shown))
    if found.get("JobState") != "RUNNING" and found.get("Reason") != "TimeLimit":
        return f"job {job} is not requeued, since it was ended; {by_hand}"
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    return f"job {job} is requeued" if asked.returncode == 0 else f"{asked.stderr.strip()}; {by_hand}"

"""A rank that waits for ever, for a peer, a disk or a loader, says where, and ends."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from common.errors import InputError

HUNG = 134  # as after SIGABRT: batch scripts take it for a killed process, and try again


def pulse_of(trainer: L.Trainer) -> Callable[..., None]:
    """What to call, with anything, while something long goes on within a batch of the Trainer's, or without one."""
    return next((callback.pulse for callback in trainer.callbacks if isinstance(callback, Watchdog)), lambda *_: None)


class Watchdog(L.Callback):
    """Without a batch for a while, writes the stacks of all threads to RUN_FOLDER/stacks/rank-N.txt and ends the rank.

    Every rank watches itself: where one hangs all others wait for it, and each stack shows at what.

    Args:
        seconds: how long a batch may take, a validation's or the first one's with its compilation too; 0 watches not.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds >= 0:  # NaN neither
            raise InputError(f"--hang_timeout: {seconds:g} is no time; give seconds, or 0 to watch nothing")
        self.seconds, self._between = seconds, min(seconds / 4, 5)  # two looks at the clock
        self._last = time.monotonic()
        self._over = threading.Event()
        self._ending = threading.Lock()  # never to be released

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._last = time.monotonic()
        if self.seconds:
            threading.Thread(target=self._watch, args=(trainer,), daemon=True, name="watchdog").start()

    def pulse(self, *_: Any, **__: Any) -> None:
        self._last = time.monotonic()

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = pulse
    on_train_start = on_train_epoch_end = on_validation_end = on_save_checkpoint = pulse

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._over.set()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        with self._ending:  # as a rank whose peer has ended before it: it must leave with the same code
            self._over.set()

    def _watch(self, trainer: L.Trainer) -> None:
        while not self._over.wait(self._between):
            if time.monotonic() - self._last > self.seconds and self._ending.acquire(blocking=False):
                self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        path = Path(trainer.default_root_dir) / "stacks" / f"rank-{trainer.global_rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            faulthandler.dump_traceback(file)
        print(f"failed: rank {trainer.global_rank} has had no batch for {self.seconds:g} s at step "
              f"{trainer.global_step}, stacks -> {path}; the last checkpoint is kept, and the same command goes on "
              "(--hang_timeout gives it longer)", file=sys.stderr, flush=True)
        if trainer.world_size > 1:
            # The others must have looked too, before they miss this one; and a launcher that misses another is killed.
            time.sleep((4 if trainer.local_rank else 2) * self._between)
        for loader in multiprocessing.active_children():
            loader.kill()  # it may hang itself, and would outlive this process, with its output
        os._exit(HUNG)  # nothing less ends a thread that waits in a collective

"""Commands in processes of their own that start at once: forked from one that has imported what takes 5 to 12 s."""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import connection, util
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["common.training.cli", "supervised", "mae", "diffusion", "locality_ablation"])


class Command:
    """`python -m MODULE ARGUMENTS`, in a session of its own; with the face of a `subprocess.Popen`.

    `ranks` processes are started as torchrun starts them, and write into the same two texts. No file that they write
    may have more than `largest_file` bytes.
    """

    def __init__(
        self, module: str, *arguments: object, cwd: Path = ROOT, variables: dict[str, str] | None = None,
        ranks: int = 1, largest_file: int | None = None,
    ) -> None:  # fmt: skip
        self.args = [module, *map(str, arguments)]
        self._texts = [tempfile.NamedTemporaryFile("r", prefix="said-") for _ in ("stdout", "stderr")]
        self._peak = tempfile.NamedTemporaryFile("r", prefix="peak-")
        self._ranks = []
        files = [file.name for file in (*self._texts, self._peak)]
        for place in _meeting(ranks) if ranks > 1 else [{}]:
            environment = {**os.environ, **(variables or {}), **place}
            arguments = (self.args, str(cwd), environment, largest_file, *files)
            self._ranks.append(CONTEXT.Process(target=_run, args=arguments))
            self._ranks[-1].start()
        self.pids = [rank.pid for rank in self._ranks]
        self.pid = self.pids[0]
        self._end = util.Finalize(self, _end, (self._ranks,), exitpriority=0)

    @property
    def codes(self) -> list[int | None]:
        """Each rank's exit code, None where it is not over."""
        return [rank.exitcode for rank in self._ranks]

    @property
    def returncode(self) -> int | None:
        """None until all ranks are over; then that of the first which failed."""
        return None if None in self.codes else next(filter(None, self.codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while going := [rank.sentinel for rank in self._ranks if rank.is_alive()]:
            if not connection.wait(going, deadline - time.monotonic()):
                self.kill()
                raise TimeoutError(f"{self.args} is not over after {timeout} s:\n{self.stdout}{self.stderr}")
        return self.returncode

    @property
    def stdout(self) -> str:
        """What all ranks have said so far."""
        self._texts[0].seek(0)
        return self._texts[0].read()

    @property
    def stderr(self) -> str:
        self._texts[1].seek(0)
        return self._texts[1].read()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    @property
    def peak(self) -> int:
        """The most memory that its one process held, in bytes; with the 0.6 GB that it was forked with."""
        self._peak.seek(0)
        return int(self._peak.read())

    def send_signal(self, number: int) -> None:
        """To the first rank."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """All ranks, and what they have started; done as well when nobody holds the command any more."""
        self._end()


def run(module: str, *arguments: object, timeout: float = 300, **options: Any) -> Command:
    """A command that is over."""
    command = Command(module, *arguments, **options)
    command.wait(timeout)
    return command


def _end(ranks: list[CONTEXT.Process]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.kill()  # where it has had no time to make its session
        rank.join()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def _meeting(ranks: int) -> list[dict[str, str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
              "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    return [{key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            for rank in range(ranks)]  # fmt: skip


def _run(
    words: list[str], folder: str, environment: dict[str, str], largest_file: int | None, out: str, err: str, peak: str
) -> None:
    os.setsid()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    multiprocessing.set_start_method(None, force=True)  # loaders start as they do by default, not by a further server
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    sys.argv = words
    # Read when Lightning was imported, for good.
    rank_zero_only.rank = int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        Path(peak).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

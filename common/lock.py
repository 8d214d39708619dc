"""One process per run folder: the second that starts is refused, and one that Slurm has given up leaves.

Of other folders that several processes write to, the second waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import InputError

NAME = "lock"
WAIT = 1.0  # seconds between two looks whether another process has ended
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LostRunFolder(SystemExit):
    """Another start of the same job has taken the folder over; nothing more may be written here."""


class RunLock:
    """Holds RUN_FOLDER/lock from `acquire` to `release`: a POSIX lock, with a line that tells who holds it.

    The system drops the lock with the process, however that ends, and shares it with other machines where the file
    system can. A job's number is Slurm's word that its earlier start is over: a start after a requeue takes the folder
    even from a holder that still lives, on a node that Slurm has lost, and that one leaves at its next `check`.

    Args:
        folder: runs/STUDY/RUN_NAME; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._made: list[Path] = []
        self._file: int | None = None

    def acquire(self) -> None:
        """Takes the folder.

        Raises:
            InputError: another process trains in it.
        """
        self._made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        while self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)  # its last holder may have removed it in between
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if _locked(file):
                if _is(file, self.path):
                    self._file = file
                    _write(file)
                else:  # its last holder has removed it in between
                    os.close(file)
                continue
            holder = _read(file)
            os.close(file)
            if holder.get("job") is None or holder["job"] != os.environ.get("SLURM_JOB_ID"):
                raise InputError(f"{self.folder}: {_named(holder)} is training in this folder; wait for it or stop it, "
                                 "or choose another --run_name")
            self._replace()

    def _replace(self) -> None:
        temporary = self.path.with_name(f"{NAME}.{os.getpid()}.tmp")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
        _locked(file)
        _write(file)
        os.replace(temporary, self.path)
        self._file = file

    def check(self) -> None:
        """To be called before anything is written that cannot be taken back.

        Raises:
            LostRunFolder: the folder was taken over, by one that is at work there, or has ended.
        """
        if self._file is not None and not _is(self._file, self.path):
            how = "" if self.path.exists() else f", or {NAME} was removed"
            raise LostRunFolder(f"{self.folder}: a later start of this job has taken the folder over{how}; leaving it "
                                "alone")

    def release(self) -> None:
        """Gives the folder back, and removes what was made for it where there is nothing in it."""
        if self._file is None:
            return
        if _is(self._file, self.path):
            self.path.unlink()
            with contextlib.suppress(OSError):  # the first that is not empty
                for place in self._made:
                    place.rmdir()
        os.close(self._file)
        self._file = None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block of the folder, which is made where it is missing, and removes
    what one that was killed has left half-written.

    Raises:
        OSError: the lock cannot be asked for; to wait for it would never end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _locked(file):
            print(f"{folder}: waiting for {_named(_read(file))}, which writes there", flush=True)
            while not _locked(file):
                time.sleep(WAIT)
        _write(file)
        for leftover in folder.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(file)  # and with it the lock


def _locked(file: int) -> bool:
    """Tries to lock an open file; true also where the file system knows no locks, which is said."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # another process has it
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        from lightning.pytorch.utilities import rank_zero_warn  # costs seconds

        rank_zero_warn("this file system has no locks; see that no other process writes to the same folder")
    return True


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}" if holder else "another process"


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _write(file: int) -> None:
    holder = {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(holder).encode(), 0)


def _read(file: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(file, 4096, 0))
    except ValueError:  # its holder is about to write it
        return {}

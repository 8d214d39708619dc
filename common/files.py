"""Files that are whole, or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(path: Path, ready: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """What the block writes takes its name at the block's end, and is on the disk by then.

    Args:
        ready: called when it is, before it takes its name; raises where that must not be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        ready()
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    temporary.replace(path)


def write_atomically(path: Path, text: str) -> None:
    try:
        with whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror})") from error

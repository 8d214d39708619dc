"""Files that are whole, or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import InputError


@contextmanager
def whole(path: Path, ready: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """What the block writes takes its name at the block's end, and is on the disk by then.

    Args:
        ready: called when it is, before it takes its name; raises where that must not be.

    Raises:
        OSError: it could not be written; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may be writing the same
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        ready()
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        if isinstance(error, OSError):
            raise OSError(error.errno, f"could not be written ({error.strerror or error})", str(path)) from error
        raise


def write_atomically(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write(text.encode())


def read_json(path: Path, again: str, *keys: str) -> dict[str, Any]:
    """What a JSON file holds under these keys, and others.

    Args:
        again: what writes the file anew, to be told.

    Raises:
        InputError: it is not as it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); {again}") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise InputError(f"{path}: damaged (no mapping of {', '.join(keys) or 'names to values'}); {again}")
    return content

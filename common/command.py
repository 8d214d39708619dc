"""How every command ends: an exit code, one line where something is wrong, a traceback only when asked for."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from common.errors import InputError

# A path that is not there or cannot be written; a disk that is full or broken is another thing.
_PLACES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class Parser(argparse.ArgumentParser):
    """The options of a command, which are spelled out; a mistake in them is told in one line, as any other.

    Args:
        prog: as one types it, such as python -m common.compare.
        description: printed as it stands.
    """

    def __init__(self, prog: str, description: str | None = None, **options: Any) -> None:
        defaults = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog, description=description, **(defaults | options))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help shows what there is")


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Calls `main` with the command line and leaves with its exit code: 2 for a user's mistake, 1 for any other fault.

    `--debug`, anywhere on the command line, shows the traceback. Of several ranks the first alone speaks.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if getattr(sys.stdout, "errors", "") == "strict":  # a terminal of Latin-1 shows † as \u2020, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    formatted = warnings.formatwarning
    if not debug:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of our source
    try:
        code = main([argument for argument in arguments if argument != "--debug"])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # Lightning's answer to Ctrl-C is exit(1)
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        code = 130
    except BrokenPipeError:  # the reader (head, less) has left; silence the interpreter's own last flush as well
        sys.stderr.close()
        code = 1
    except Exception as error:
        if debug:
            raise
        mistake = _mistake(error)
        message = f"error: {one_line(mistake)}" if mistake else f"failed: {one_line(error)} (--debug shows where)"
        if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0":
            print(message, file=sys.stderr)
        code = 2 if mistake else 1
    finally:
        warnings.formatwarning = formatted  # a test goes on in this process
    sys.exit(code)


def _mistake(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: parsers and loader processes wrap it, a file's name tells it."""
    if isinstance(error, _PLACES) and error.filename:
        return InputError(f"{error.filename}: {error.strerror}")
    seen: list[BaseException] = []  # a chain may bite its tail: a writer's thread raises one error again and again
    while error is not None and error not in seen:
        if isinstance(error, InputError):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    text = str(error)
    if "Original Traceback" in text:  # from a loader process: its own last line is the error
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    elif not isinstance(error, InputError):
        text = "".join(traceback.format_exception_only(error))
    return " ".join(text.split())

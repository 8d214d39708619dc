"""The one error that a user can mend."""


class InputError(ValueError):
    """A user's mistake. The message is one line: the key or the file, its value, and what would be right.

    Commands print it alone and leave with exit code 2; anything else is a defect or a fault and leaves with 1.
    """

    def __init__(self, message: str) -> None:
        # A loader's process wraps what it raises in its traceback, which ends with our line.
        super().__init__(message.rsplit("InputError: ", 1)[-1].rstrip())

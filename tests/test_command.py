"""How a command ends."""

import pytest

from common.command import run_command


def test_errors_that_name_each_other_end_it_all_the_same(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """As TensorBoard's writer makes them, whose thread raises its one error again and again."""

    def main(_: list[str]) -> int:
        first, second = ValueError("first"), OSError("second")
        first.__cause__, second.__context__ = second, first
        raise first

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == 1 and capsys.readouterr().err == "failed: ValueError: first (--debug shows where)\n"

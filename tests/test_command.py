"""How a command ends."""

from io import BytesIO, TextIOWrapper

import pytest

from common.command import Parser, run_command


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


@pytest.mark.parametrize("words, said", [
    ([], "error: the following arguments are required: word; python -m x --help shows what there is\n"),
    (["say"], "error: the following arguments are required: --often; python -m x say --help shows what there is\n"),
    (["say", "--oft", "3"], "error: the following arguments are required: --often; python -m x say --help shows"),
    (["say", "--often", "abc"], "error: argument --often: invalid int value: 'abc'; python -m x say --help shows"),
])
def test_a_mistake_in_an_option_is_one_line_too(monkeypatch, capsys, words, said):
    def main(arguments: list[str]) -> int:
        parser = Parser("python -m x", "What it does.")
        say = parser.add_subparsers(dest="word", required=True).add_parser("say")
        say.add_argument("--often", type=int, required=True)
        return parser.parse_args(arguments).often

    monkeypatch.setattr("sys.argv", ["x", *words])
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_a_terminal_that_lacks_a_sign_ends_no_command(monkeypatch):
    terminal = TextIOWrapper(BytesIO(), "latin-1")
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as leaving:
        run_command(lambda _: print("† ± ·") or 0)
    assert leaving.value.code == 0
    assert terminal.buffer.getvalue().decode("latin-1") == "\\u2020 ± ·\n"

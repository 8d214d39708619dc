"""What is said while batches of a prediction go by, where the output is no terminal."""

from types import SimpleNamespace

import pytest

from common.training import progress
from common.training.progress import Progress


@pytest.mark.parametrize("stage", ["predict", "test"])
def test_a_line_says_how_many_batches_and_seconds_are_left(stage: str, monkeypatch, capsys) -> None:
    """Batches of 4 s, of which every third has a line: three of 20 took 12 s, so the other 17 will take 68."""
    clock = iter([0.0, 0.0, *(4.0 * batch for batch in range(1, 21))])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    trainer = SimpleNamespace(is_global_zero=True, state=SimpleNamespace(fn=SimpleNamespace(value=stage)),
                              num_predict_batches=[20], num_test_batches=[20])  # fmt: skip
    bar = Progress(None)
    getattr(bar, f"on_{stage}_start")(trainer, None)
    for batch in range(20):
        getattr(bar, f"on_{stage}_batch_end")(trainer, None, None, None, batch)
    getattr(bar, f"on_{stage}_epoch_end")(trainer, None)
    assert capsys.readouterr().err.splitlines() == [
        f"{stage}: batch {done}/20 · {4 * (20 - done)} s left" for done in (3, 6, 9, 12, 15, 18)
    ]

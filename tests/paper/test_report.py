"""The report: what runs left, of which arms, and what none left."""

import json
from pathlib import Path

import pytest

from common.errors import InputError
from common.paper.report import report
from common.paper.running import run


def change(folder: str, **results) -> None:
    path = Path("runs/supervised", folder, "results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | results))


def test_a_report_shows_what_runs_left_and_averages_finished_ones_alone(study, capfd):
    exhibit = study(scales={"demo": {"config": "tiny_set", "seeds": 2}, "paper": {"config": "tiny_set"}})["X1"]
    assert run(exhibit, exhibit.scale("demo"), 3) == 0
    Path("runs/supervised/tiny_set-p2-s1/config.yaml").write_text("{model: {patch_size: 4}}")
    change("tiny_set-p1-s2", status="running", epoch=0)
    Path("runs/supervised/tiny_set-p2-s2/results.json").write_text("{")
    for seed in (0, 1):
        change(f"tiny_set-p1-s{seed}", hardware="an <abacus>", commit="abc1234", train_seconds=60)
    report([exhibit], "demo")
    text = Path("runs/paper/X1.md").read_text()
    states = "1 another config, 3 finished, 1 unfinished, 1 unreadable"
    assert f"| [X1](#x1-one-against-two-demo) | demo | one against two | {states} |" in text
    assert "| S/2 | unknown | 92.00 (1) |" in text and "| S/1 | unknown | 94.50 ± 0.71 (2) |" in text
    assert "| S/1 - S/2 | +1.5 † | +2.00 (n = 1) |" in text  # seed 0 alone is in both
    assert "- † the paper's number is of its own data and budget, not of this scale's\n" in text
    for line in ("S/2, seed 1: another config, not averaged in", "S/1, seed 2: unfinished, not averaged in",
                 "S/2, seed 2: unreadable, not averaged in", "hardware: unknown; an &lt;abacus>",
                 "commit: unknown; abc1234", "paper: unknown: both values"):
        assert f"- {line}\n" in text, line
    page = Path("runs/paper/X1.html").read_text()
    assert 'src="data:image/png;base64,' in page and 'src="X1' not in page and "<td" in page
    assert "94.50 ± 0.71 (2)" in page and "unknown; an &lt;abacus&gt;" in page
    assert '<a href="#x1-one-against-two-demo">' in page and '<h2 id="x1-one-against-two-demo">' in page


def test_arms_of_another_budget_are_marked(study):
    exhibit = study()["X1"]
    assert run(exhibit, exhibit.scale("demo"), 1) == 0
    change("tiny_set-p1-s0", epochs=7)
    report([exhibit], None)
    assert "| S/1 - S/2 | +1.5 † | +2.00 (n = 1) † |" in Path("runs/paper/X1.md").read_text()


ARMS = {"S/2": {"model.patch_size": 2}, "S/1": {"model.patch_size": 1}}
NANO = {"nano/2": {"model.patch_size": 2}, "nano/1": {"model.patch_size": 1}}


def test_a_difference_stands_for_one_of_the_paper_s(study):
    demo = {"config": "tiny_set", "arms": NANO, "seeds": 2}
    paper = {"config": "tiny_set"}
    exhibit = study(arms=ARMS, scales={"demo": {**demo, "differences": {"nano/1 - nano/2": "S/1 - S/2"}},
                                       "paper": paper})["X1"]
    assert run(exhibit, exhibit.scale("demo"), None) == 0
    report([exhibit], "demo")
    row = "| nano/1 - nano/2 | +1.5 (S/1 - S/2) † | +2.00 ± 0.00 (p < 0.001, n = 2) |"
    assert row in Path("runs/paper/X1.md").read_text()
    assert not study(arms=ARMS, scales={"demo": demo, "paper": paper})["X1"].scale("demo").differences
    for wrong in ({"nano/1 - nano/3": "S/1 - S/2"}, {"nano/1 - nano/2": "S/2 - S/1"}):
        with pytest.raises(InputError, match=f"X1.scales.demo.differences.{next(iter(wrong))}: "):
            study(arms=ARMS, scales={"demo": {**demo, "differences": wrong}, "paper": paper})


MEASURED = {"metric": ["shape_bias", "val/acc1"], "draws": "drawing", "arms": ARMS,
            "paper": {"values": {"S/1": 57.2}, "differences": {"S/1 - S/2": 0.5}},
            "scales": {"demo": {"config": "tiny_set", "seeds": 2}}}


def test_what_the_drawing_command_measures_is_compared(study):
    exhibit = study(**MEASURED)["X1"]
    assert run(exhibit, exhibit.scale("demo"), None) == 0
    text = Path("runs/paper/X1-demo/report.md").read_text()
    assert "| S/1 | 57.2 † | 54.50 ± 0.71 (2) |" in text and "| S/2 | no such run | 50.50 ± 0.71 (2) |" in text
    assert "| S/1 - S/2 | +0.5 † | +4.00 ± 0.00 (p < 0.001, n = 2) |" in text
    assert "shape_bias" in text.split("epochs x batch")[1] and "X1, figure" in text


def test_a_figure_and_measures_of_other_runs_are_left_out(study):
    """Of runs that were trained anew since; the curves of such as are not finished any more go, too."""
    exhibit = study(**MEASURED)["X1"]
    assert run(exhibit, exhibit.scale("demo"), None) == 0
    change("tiny_set-p1-s0", config_hash="of another training")
    report([exhibit], "demo")
    text = Path("runs/paper/X1.md").read_text()
    assert "| S/1 | 57.2 † | not measured |" in text and "X1, figure" not in text and "X1, comparison" in text
    assert "- a figure of other runs, or of these before they were trained on, is left out; `run` draws it anew" in text
    assert run(exhibit, exhibit.scale("demo"), None) == 0
    assert "54.50 ± 0.71 (2)" in Path("runs/paper/X1-demo/report.md").read_text()
    for patch in (1, 2):
        for seed in (0, 1):
            change(f"tiny_set-p{patch}-s{seed}", status="running")
    report([exhibit], "demo")
    assert ".png" not in Path("runs/paper/X1.md").read_text()


def test_runs_over_another_axis_are_not_compared(study):
    exhibit = study()["X1"]
    assert run(exhibit, exhibit.scale("demo"), 1) == 0
    change("tiny_set-p1-s0", x_axis="images")
    report([exhibit], None)
    assert "- S/1, seed 0: over another x axis, not averaged in\n" in Path("runs/paper/X1.md").read_text()


def test_a_report_of_no_runs_says_so(study):
    report(list(study().values()), None)
    assert "| X1 | demo, paper | one against two | none yet |" in Path("runs/paper/X1.md").read_text()
    assert "<table>" in Path("runs/paper/X1.html").read_text()

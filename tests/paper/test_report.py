"""The report: what runs left, of which arms, and what none left."""

import json
from pathlib import Path

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
        change(f"tiny_set-p1-s{seed}", hardware="an abacus", commit="abc1234", train_seconds=60)
    report([exhibit], "demo")
    text = Path("runs/paper/X1.md").read_text()
    states = "1 another config, 3 finished, 1 unfinished, 1 unreadable"
    assert f"| [X1](#X1-demo) | demo | one against two | {states} |" in text
    assert "| S/2 | unknown | 92.00 (1) |" in text and "| S/1 | unknown | 94.50 ± 0.71 (2) |" in text
    assert "| S/1 - S/2 | +1.5 | +2.00 (n = 1) |" in text  # seed 0 alone is in both
    for line in ("S/2, seed 1: another config, not averaged in", "S/1, seed 2: unfinished, not averaged in",
                 "S/2, seed 2: unreadable, not averaged in", "hardware: unknown; an abacus", "commit: unknown; abc1234",
                 "paper: unknown: both values"):
        assert f"- {line}\n" in text, line
    page = Path("runs/paper/X1.html").read_text()
    assert 'src="data:image/png;base64,' in page and 'src="X1' not in page and "<td" in page
    assert "94.50 ± 0.71 (2)" in page and '<a href="#X1-demo">' in page and 'id="X1-demo"' in page


def test_arms_of_another_budget_are_marked(study):
    exhibit = study()["X1"]
    assert run(exhibit, exhibit.scale("demo"), 1) == 0
    change("tiny_set-p1-s0", epochs=7)
    report([exhibit], None)
    assert "| S/1 - S/2 | +1.5 | +2.00 (n = 1) † |" in Path("runs/paper/X1.md").read_text()


def test_a_report_of_no_runs_says_so(study):
    report(list(study().values()), None)
    assert "| X1 | demo, paper | one against two | none yet |" in Path("runs/paper/X1.md").read_text()
    assert "<table>" in Path("runs/paper/X1.html").read_text()

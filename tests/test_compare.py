"""python -m common.compare, on run folders written here from the contract of the run folder."""

import csv
import html
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml
from markdown import markdown as render
from scipy.stats import ttest_rel
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from common.compare import as_csv, as_json, draw_figure, main, markdown
from common.comparison import Comparison
from common.errors import InputError
from common.figure import draw, over_seeds, read_curves, smoothed
from common.runs import find_runs, read_run
from common.significance import paired

ROOT = Path(__file__).parent.parent


@pytest.fixture
def make_run(tmp_path):
    """Writes runs/supervised/NAME with Acc@1 as given; further keywords go into results.json."""

    def make(name: str, acc1: float, seed: int = 0, patch: int = 2, status: str = "finished",
             init_from: str | None = None, **more) -> Path:
        folder = tmp_path / "runs" / "supervised" / name
        folder.mkdir(parents=True)
        results = {
            "study": "supervised", "run_name": name, "status": status, "config_hash": f"{patch}{seed}", "seed": seed,
            "metrics": {"val/acc1": acc1, "val/acc5": acc1 + 2, "val/loss": 1.0, "best/val/acc1": acc1 + 1},
            "epoch": 10, "step": 90, "images_seen": 11520, "train_seconds": 61.0, "parameters": 117130,
            "dataset": "digits", "size": "nano", "patch_size": patch, "position": "learned", "pool": "cls", "lr": 2e-3,
            "batch_size": 128, "epochs": 10, "weights": "raw", "headline": "val/acc1", "higher_is_better": True, **more,
        }
        (folder / "results.json").write_text(json.dumps(results))
        model = {"class_path": "supervised.Classification", "init_args": {"size": "nano", "patch_size": patch}}
        arguments = {"source": results["dataset"], "batch_size": results["batch_size"], "workers": seed}
        data = {"class_path": "common.data.ImageData", "init_args": arguments}
        trainer = {"max_epochs": results["epochs"], "devices": 1 + seed}
        config = {"run_name": name, "seed_everything": seed, "model": model, "data": data, "trainer": trainer,
                  "init_from": init_from}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make


def change(folder: Path, **results) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | results))


@pytest.fixture
def two_arms(make_run):
    """/2 with 90, 92, 94 and /1 with 95, 96, 97: by hand, 92 ± 2, 96 ± 1, difference 4."""
    accuracies = {1: (95.0, 96.0, 97.0), 2: (90.0, 92.0, 94.0)}
    return [make_run(f"digits-nano-p{patch}-s{seed}", value, seed, patch)
            for patch, values in accuracies.items() for seed, value in enumerate(values)]


def log(folder: Path, second: int, tag: str, points: dict[int, float]) -> None:
    """An event file as one start of a run writes it."""
    writer = EventFileWriter(str(folder))
    for step, value in points.items():
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(step=step, wall_time=second, summary=summary))
    writer.close()
    written = max(folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
    written.rename(folder / f"events.out.tfevents.{second}.host.1.0")


def test_mean_standard_deviation_and_difference(two_arms):
    comparison = Comparison(find_runs(two_arms))
    one, two = comparison.groups
    assert (one.label, two.label) == ("digits-nano-p1", "digits-nano-p2")
    assert two.statistic("val/acc1") == (92.0, 2.0, 3)
    assert one.statistic("val/acc1") == (96.0, 1.0, 3)
    assert comparison.baseline is two  # the largest patch
    assert comparison.difference(one, "val/acc1") == 4.0
    assert comparison.difference(two, "val/acc1") is None
    assert comparison.best("val/acc1") == [one]
    assert comparison.metrics == ["val/acc1", "val/acc5"]


def test_lower_is_better_for_errors(make_run):
    better = make_run("a", 0, patch=1, metrics={"val/rmse": 0.5}, headline="val/rmse", higher_is_better=False)
    worse = make_run("b", 0, patch=2, metrics={"val/rmse": 0.7}, headline="val/rmse", higher_is_better=False)
    comparison = Comparison(find_runs([worse, better]))
    assert comparison.metrics == ["val/rmse"]
    assert [group.label for group in comparison.best("val/rmse")] == ["a"]


@pytest.mark.parametrize("status", ["running", "failed"])
def test_only_finished_runs_are_averaged(two_arms, make_run, status):
    extra = make_run("digits-nano-p1-s3", 0.0, seed=3, patch=1, status=status, epoch=4, error="OSError: disk full")
    comparison = Comparison(find_runs([*two_arms, extra]))
    assert comparison.groups[0].statistic("val/acc1") == (96.0, 1.0, 3)
    row = [cell.text for cell in comparison.rows()[-1]]
    word = "failed" if status == "failed" else "unfinished"
    assert row[:3] == ["digits-nano-p1-s3", "digits", word] and set(row[3:]) == {"-"}
    assert f"digits-nano-p1-s3, {word} at epoch 4 of 10" in comparison.notes()[-1]
    assert ("disk full" in comparison.notes()[-1]) == (status == "failed")


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "results.json").write_text('{"status": "fini'),
    lambda folder: (folder / "results.json").write_bytes(b"\xff\xfe\x00"),
    lambda folder: (folder / "results.json").write_text("[]"),
    lambda folder: (folder / "results.json").write_text('{"status": "finished", "metrics": {}}'),
    lambda folder: (folder / "results.json").unlink(),
    lambda folder: (folder / "config.yaml").unlink(),
    lambda folder: (folder / "config.yaml").write_text("{a: ["),
    lambda folder: (folder / "config.yaml").write_text("1: 2"),
    lambda folder: (folder / "config.yaml").write_text("model: {x: 2024-01-01}"),
    lambda folder: (folder / "config.yaml").write_text("model: &a {x: *a}"),
    lambda folder: (folder / "results.json").write_text("[" * 100_000),
    *(partial(change, **{key: value}) for key, value in [
        ("patch_size", "1"), ("train_seconds", "abc"), ("parameters", "many"), ("init_from", []), ("evaluation", 3)]),
])
def test_unreadable_runs_are_shown_and_not_averaged(two_arms, damage):
    damage(two_arms[0])
    comparison = Comparison(find_runs(two_arms))
    assert comparison.groups[0].statistic("val/acc1").mean == 96.5
    assert [(run.name, run.status) for run in comparison.left_out] == [("digits-nano-p1-s0", "unreadable")]
    assert comparison.left_out[0].problem


def test_what_is_no_number_was_not_measured(two_arms):
    change(two_arms[0], metrics={"val/acc1": True})
    assert Comparison(find_runs(two_arms)).groups[0].statistic("val/acc1").n == 2


def test_a_repeat_of_a_seed_is_no_further_sample(two_arms, make_run):
    again = make_run("again", 50.0, seed=0, patch=1)
    comparison = Comparison(find_runs([*two_arms, again]))
    assert comparison.groups[0].statistic("val/acc1") == (96.0, 1.0, 3)
    assert [(run.name, run.status) for run in comparison.left_out] == [("again", "repeat")]


def test_one_seed_from_the_weights_of_two_is_two_samples(make_run):
    runs = [make_run(f"tuned-{seed}-{source}", 90.0 + seed + source, seed, init_from=f"runs/mae/digits-s{source}")
            for seed, source in [(0, 0), (0, 1), (1, 1)]]
    [group] = Comparison(find_runs(runs)).groups
    assert group.statistic("val/acc1") == (91.0, 1.0, 3)


def test_seeds_are_grouped_by_config_and_not_by_name(make_run):
    runs = [make_run("first", 90.0, seed=0), make_run("second", 92.0, seed=1), make_run("other", 92.0, epochs=20)]
    groups = Comparison(find_runs(runs)).groups
    assert [(group.label, len(group.runs)) for group in groups] == [("first", 2), ("other", 1)]


def test_arms_with_one_name_are_told_apart(make_run):
    runs = [make_run("a-s0", 90.0, seed=0), make_run("a-s1", 92.0, seed=1, epochs=20)]
    assert [group.label for group in Comparison(find_runs(runs)).groups] == ["a-s0", "a-s1"]


def test_other_pictures_of_one_name_are_marked(two_arms, make_run):
    """Fewer of them seen within the same epochs, rendered otherwise, and weights that were trained before."""
    before = {"source": "runs/mae/a-s0", "trained": {"config_hash": "a", "status": "finished", "step": 900}}
    others = [make_run("fewer", 99.0, patch=4, images_seen=5760), make_run("rendered", 99.0, patch=8),
              make_run("tuned", 99.0, patch=1, init_from="runs/mae/a-s0")]
    change(others[2], init_from=before)
    config = yaml.safe_load((others[1] / "config.yaml").read_text())
    config["data"]["init_args"]["source"] = {"class_path": "common.data.Shapes", "init_args": {"size": 12}}
    (others[1] / "config.yaml").write_text(yaml.safe_dump(config))
    comparison = Comparison(find_runs([*two_arms, *others]), baseline="digits-nano-p2")
    assert {group.label: comparison.mark(group) for group in comparison.groups} == {
        "digits-nano-p1": "", "digits-nano-p2": "", "fewer": "images seen 5760 instead of 11520",
        "rendered": "data.source.class_path common.data.Shapes instead of None, data.source.size 12 instead of None",
        "tuned": "initial weights of 900 steps instead of random"}


@pytest.mark.parametrize("key, value", [("dataset", "shapes"), ("epochs", 20), ("batch_size", 64)])
def test_other_data_or_budget_is_marked_and_wins_nothing(two_arms, make_run, key, value):
    other = make_run("other", 99.0, patch=1, **{key: value})
    comparison = Comparison(find_runs([*two_arms, other]))
    marked = comparison.groups[-1]
    assert f"{key} {value} instead of" in comparison.mark(marked)
    assert [comparison.mark(group) for group in comparison.groups[:-1]] == ["", ""]
    assert "†" in comparison.rows()[2][0].text and comparison.rows()[2][6].text == "+7.00 †"
    assert comparison.best("val/acc1") == [comparison.groups[0]]
    assert any(key in note and "†" in note for note in comparison.notes())


def test_baseline_and_metrics_by_name(two_arms):
    comparison = Comparison(find_runs(two_arms), ["best/val/acc1"], "digits-nano-p1-s2")
    assert comparison.baseline.label == "digits-nano-p1"
    assert comparison.difference(comparison.groups[1], "best/val/acc1") == -4.0
    with pytest.raises(InputError, match="--baseline nobody.*digits-nano-p1"):
        Comparison(find_runs(two_arms), baseline="nobody")
    with pytest.raises(InputError, match="--metric val/acc9.*val/acc1"):
        Comparison(find_runs(two_arms), ["val/acc9"])


def test_metric_that_some_runs_lack(two_arms):
    path = two_arms[0] / "results.json"
    results = json.loads(path.read_text())
    del results["metrics"]["val/acc5"]
    results["metrics"]["val/acc1"] = float("nan")
    path.write_text(json.dumps(results))
    comparison = Comparison(find_runs(two_arms))
    assert comparison.groups[0].statistic("val/acc1").n == 2  # NaN was not measured
    assert comparison.groups[0].statistic("val/acc5").n == 2


def test_files(two_arms, make_run):
    comparison = Comparison(find_runs([*two_arms, make_run("dead", 1.0, status="failed")]))
    text = markdown(comparison)
    assert "| **96.00 ± 1.00 (3)** | +4.00 (p = 0.02, n = 3) |" in text and "| 92.00 ± 2.00 (3) | - |" in text
    assert "| digits-nano-p2 (baseline) | digits | 10 x 128 | 117,130 | 1m 01s |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {10}

    rows = list(csv.DictReader(as_csv(comparison).splitlines()))
    assert [(row["run"], row["status"], row["val/acc1"]) for row in rows] == [
        ("digits-nano-p1", "finished", "96.0"), ("digits-nano-p2", "finished", "92.0"), ("dead", "failed", "")]
    assert (rows[0]["val/acc1 std"], rows[0]["val/acc1 difference"], rows[0]["seeds"]) == ("1.0", "4.0", "0 1 2")

    content = json.loads(as_json(comparison))
    assert content["baseline"] == "digits-nano-p2" and content["metrics"] == ["val/acc1", "val/acc5"]
    assert content["runs"][0]["val/acc1 best"] is True and content["runs"][1]["val/acc1 difference"] is None


def test_later_start_wins_where_steps_overlap(make_run):
    folder = make_run("resumed", 90.0)
    log(folder, 2000, "val/acc1", {20: 2.5, 30: 3.0})  # written first, started later
    log(folder, 1000, "val/acc1", {10: 1.0, 20: 2.0})
    curves = read_curves(folder, ["val/acc1", "train/loss"])
    assert curves == {"val/acc1": {10: 1.0, 20: 2.5, 30: 3.0}, "train/loss": {}}
    assert read_curves(folder, ["val/acc1"], lambda step: step * 128)["val/acc1"] == {1280: 1.0, 2560: 2.5, 3840: 3.0}


def test_the_placeholders_of_hparams_are_no_points(make_run, tmp_path):
    for seed, value in enumerate((90.0, 92.0)):
        log(make_run(f"run-s{seed}", value, seed), 1000, "val/acc1", {0: math.nan, 10: value})
    assert read_curves(tmp_path / "runs" / "supervised" / "run-s0", ["val/acc1"]) == {"val/acc1": {10: 90.0}}
    comparison = Comparison(find_runs([tmp_path / "runs" / "supervised"]))
    draw_figure(comparison, tmp_path / "curves.png", "two seeds")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_what_was_set_otherwise_is_said(two_arms):
    comparison = Comparison(find_runs(two_arms))
    assert "digits-nano-p1: model.patch_size 1 (2)" in comparison.notes()
    assert [record["settings"] for record in comparison.records()] == ["model.patch_size 1 (2)", ""]


def test_curves_over_seeds():
    assert over_seeds([{1: 1.0, 2: 4.0, 3: 9.0}, {1: 3.0, 2: 4.0}]) == ([1, 2], [2.0, 4.0], [2**0.5, 0.0])
    assert over_seeds([{1: 5.0}]) == ([1], [5.0], [0.0])
    curve = {step: float(step) for step in range(1, 301)}
    means = smoothed(curve, 60)
    assert len(means) == 60 and means[5] == 3.0 and means[300] == 298.0


def test_command_writes_table_figure_and_files(two_arms, tmp_path, capsys):
    for folder in two_arms:
        log(folder, 1000, "val/acc1", {9: 50.0, 90: 90.0})
    study = two_arms[0].parent
    options = [f"--{name}={tmp_path / name}" for name in ("csv", "markdown", "json")]
    assert main([str(study), *options]) == 0
    out = capsys.readouterr().out
    assert "96.00 ± 1.00 (3) *" in out and "92.00 ± 2.00 (3) *" not in out
    assert (study / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert all((tmp_path / name).stat().st_size for name in ("csv", "markdown", "json"))
    assert main([*map(str, study.iterdir()), "--no-figure"]) == 0  # as a shell's * gives it, the figure included


def test_every_name_has_its_place_in_the_legend(make_run, tmp_path):
    """matplotlib leaves out what begins with _, and reads a formula between two dollars."""
    folders = [make_run(name, 90.0, patch=patch) for patch, name in enumerate(("_mine", "a$1$", "plain"), 1)]
    for folder in folders:
        log(folder, 1000, "val/acc1", {9: 50.0, 90: 90.0})
    groups = Comparison(find_runs(folders)).groups
    with pytest.MonkeyPatch.context() as patch:
        legends = []
        patch.setattr("matplotlib.figure.Figure.legend", lambda _, handles, labels, **__: legends.append(list(labels)))
        draw(groups, tmp_path / "figure.png", "_title")
    assert [label.split(" (")[0].strip() for label in legends[0]] == ["_mine", r"a\$1\$", "plain"]
    assert not any(label.startswith("_") for label in legends[0])


def test_what_a_damaged_event_file_held_is_missed(make_run, capsys):
    """TensorBoard reads up to the damage, without a word; here of the first of two starts."""
    folder = make_run("run", 90.0)
    log(folder, 1000, "val/acc1", {10: 1.0, 20: 2.0, 30: 3.0})
    log(folder, 2000, "val/acc1", {40: 4.0})
    first = folder / "events.out.tfevents.1000.host.1.0"
    whole = first.read_bytes()
    assert list(read_curves(folder, ["val/acc1"])["val/acc1"]) == [10, 20, 30, 40]
    assert capsys.readouterr().err == ""
    last = whole.rindex(b"val/acc1")
    for damaged in (whole[:last], whole[:last] + b"V" + whole[last + 1 :]):
        first.write_bytes(damaged)
        assert list(read_curves(folder, ["val/acc1"])["val/acc1"]) == [10, 20, 40]
        assert capsys.readouterr().err == f"{first}: damaged or cut off; what it holds behind that is in no curve\n"


def test_names_are_no_markup(make_run):
    """Neither of Markdown, nor of the HTML that its viewers take."""
    markup = r"<i>\*a* _b_ c_d `|[x](y) &lt;"
    metrics = ["val/acc1", f"test/{markup}"]
    folders = [make_run("plain", 90.0), make_run("other", 91.0, patch=1, metrics=dict.fromkeys(metrics, 2.0)),
               make_run("gone", 1.0, status="failed", error=markup)]
    comparison = Comparison(find_runs(folders), metrics, labels={folders[0]: markup})
    page = render(markdown(comparison), extensions=["tables"])
    cells = [html.unescape(re.sub("<[^>]*>", "", part)) for part in re.split("</t[hd]>|<br */?>|\n", page)]
    assert {f"{markup} (baseline)", f"test/{markup}"} <= set(cells)
    assert [cell for cell in cells if cell.strip().endswith(f"at epoch 10 of 10: {markup}")]


def test_metrics_of_two_studies_share_a_table(two_arms, make_run):
    depth = make_run("depth", 0, patch=1, dataset="rooms", metrics={"val/rmse": 0.5}, headline="val/rmse",
                     higher_is_better=False)
    comparison = Comparison(find_runs([*two_arms, depth]))
    assert comparison.metrics == ["val/acc1", "val/rmse"]
    assert comparison.rows()[2][5].text == "-"


@pytest.mark.parametrize("arguments, message", [
    (["missing"], "missing: no such folder"),
    (["empty"], "empty: not a run folder"),
    (["file"], "nothing to compare"),
    (["good", "--figure", "curves.jpeg2000"], "--figure curves.jpeg2000"),
    (["good", "--baseline", "x"], "--baseline x"),
    (["good", "--json", "file/a.json"], "file"),
    (["good", "--where", "patch_size"], "--where patch_size: give KEY=VALUE"),
    (["good", "--where", "patch_size=3"], "--where patch_size=3: no run has it; patch_size is 2"),
    (["good", "--by", "model.depht"], "--by model.depht: no run has this setting"),
])
def test_errors_are_one_line(make_run, tmp_path, arguments, message):
    make_run("r", 90.0).rename(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, "-m", "common.compare", *arguments], cwd=tmp_path, capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_differences_are_tested_over_the_seeds_that_both_have(two_arms, make_run):
    """Against scipy.stats; a seed that one arm alone has enters its mean, and no pair."""
    comparison = Comparison(find_runs([*two_arms, make_run("digits-nano-p1-s3", 60.0, 3, 1)]))
    one = comparison.groups[0]
    assert comparison.difference(one, "val/acc1") == pytest.approx(87.0 - 92.0)
    test = comparison.paired(one, "val/acc1")
    assert (test.mean, test.std, test.n) == (4.0, 1.0, 3)
    assert comparison.rows()[0][6].text == "-5.00"  # and not with the p of another difference
    assert test.p == pytest.approx(ttest_rel([95, 96, 97], [90, 92, 94]).pvalue)
    record = next(record for record in comparison.records() if record["run"] == one.label)
    assert (record["val/acc1 difference"], record["val/acc1 paired difference"]) == (pytest.approx(-5), 4)
    assert (record["val/acc1 p"], record["val/acc1 pairs"]) == (test.p, 3)


def test_seeds_that_stand_twice_in_a_group_are_not_paired(make_run):
    """Seed 0 from the weights of two runs is two samples, and no pair of another arm's seed 0."""
    twice = [make_run(f"a{source}", 90.0 + source, init_from=f"runs/mae/before-s{source}") for source in (0, 1)]
    comparison = Comparison(find_runs([*twice, make_run("b", 80.0, patch=4)]))
    assert comparison.groups[0].statistic("val/acc1").n == 2
    assert comparison.paired(comparison.groups[0], "val/acc1") is None


@pytest.mark.parametrize("ours, theirs, p", [([1.0], [2.0], None), ([1.0, 2.0], [1.0, 2.0], 1.0),
                                             ([2.0, 3.0], [1.0, 2.0], 0.0)])
def test_pairs_that_leave_nothing_to_chance(ours, theirs, p):
    assert paired(ours, theirs).p == p


def test_only_chosen_runs_are_compared(two_arms, make_run, capsys):
    unreadable = make_run("broken", 1.0)
    (unreadable / "results.json").write_text("{")
    folders = [str(folder) for folder in [*two_arms, unreadable]]
    assert main([*folders, "--no-figure", "--where", "model.patch_size=1", "--where", "seed=0,2.0"]) == 0
    out = capsys.readouterr().out
    assert "96.00 ± 1.41 (2)" in out and "digits-nano-p2" not in out and "broken, unreadable" in out


def test_rows_by_any_setting(make_run):
    """Two patch sizes at two batches: a row a patch size, whose differences are between runs of one batch."""
    values = {(1, 128): 95.0, (1, 256): 90.0, (2, 128): 93.0, (2, 256): 89.0}
    runs = [make_run(f"r{patch}-{batch}", value, 0, patch, batch_size=batch)
            for (patch, batch), value in values.items()]
    comparison = Comparison(find_runs(runs), by="patch_size")
    one, two = comparison.groups
    assert (one.label, one.statistic("val/acc1").n) == ("patch_size 1", 2)
    test = comparison.paired(one, "val/acc1")
    assert (test.mean, test.n) == (1.5, 2)
    assert test.p == pytest.approx(ttest_rel([95, 90], [93, 89]).pvalue)
    assert comparison.settings(one) == "its runs differ in data.batch_size"
    assert comparison.rows()[0][2].text == "10 x 128, 256" and not comparison.mark(one)
    assert comparison.rows()[0][6].text.startswith("+1.50 (p = ")
    alone = Comparison(find_runs([*runs, make_run("r1-512", 50.0, 0, 1, batch_size=512)]), by="patch_size")
    assert alone.difference(alone.groups[0], "val/acc1") == 1.5  # a run without its match is in the mean alone
    by_batch = Comparison(find_runs(runs), by="data.batch_size")
    assert by_batch.mark(by_batch.groups[1])  # another budget is marked, whatever the rows are


def test_two_hundred_runs_are_read_quickly_and_once_each(make_run, monkeypatch):
    runs = [make_run(f"r{i}", 90.0, seed=i % 5, patch=i // 5 + 1) for i in range(200)]
    read, read_text = Counter(), Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *more, **options: read.update([path]) or read_text(
        path, *more, **options))  # fmt: skip
    start = time.perf_counter()
    comparison = Comparison(find_runs(runs))
    assert len(comparison.groups) == 40 and time.perf_counter() - start < 5
    assert len(comparison.rows()) == 40
    assert len(read) >= 200 and set(read.values()) == {1}


@pytest.mark.parametrize("command", ["common.compare.main(['--help'])", "common.paper.__main__.main(['show', 'T3a'])",
                                     "common.paper.__main__.main(['list'])"])
def test_what_only_reads_runs_starts_without_torch(command):
    heavy = "{'torch', 'lightning', 'matplotlib', 'tensorboard'}"
    code = (f"import sys, {command.split('.main')[0]}\ntry: {command}\nexcept SystemExit: pass\n"
            f"assert not {heavy} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_read_run_keeps_what_the_folder_says(make_run):
    run = read_run(make_run("r", 90.0, status="running", epoch=3))
    assert (run.status, run.problem, run.seed) == ("unfinished", "at epoch 3 of 10", 0)


# Samples of generative models


def test_samples_that_were_judged_otherwise_are_marked(make_run, tmp_path):
    """Fewer of them, more guidance: no difference of the models. A smaller distance is the better one."""
    judged = {"samples": 1000, "solver": "ddim", "guidance": 1.5, "extractor_sha256": "e", "autoencoder_sha256": "a"}
    for name, patch, fd, other in [("p2", 2, 3.0, {}), ("p1", 1, 2.0, {"autoencoder_sha256": "b"}),
                                   ("g", 4, 1.0, {"guidance": 4.0, "samples": 500})]:  # fmt: skip
        metrics = {"val/loss": 0.1, "test/fd_judge": fd, "test/agreement_judge": 90.0}
        make_run(name, 0, patch=patch, metrics=metrics, evaluation=judged | other)
    runs = find_runs([tmp_path / "runs" / "supervised"])
    comparison = Comparison(runs, ["test/fd_judge", "test/agreement_judge"], baseline="p2")
    marks = {group.label: comparison.mark(group) for group in comparison.groups}
    assert marks == {"p2": "", "p1": "",
                     "g": "evaluation's samples 500 instead of 1000, evaluation's guidance 4.0 instead of 1.5"}
    assert [group.label for group in comparison.best("test/fd_judge")] == ["p1"]
    assert {group.label for group in comparison.best("test/agreement_judge")} == {"p1", "p2"}


def test_losses_in_other_latents_or_of_other_models_are_marked(make_run, tmp_path):
    """And nothing else of them: distances are of images. Seeds of one autoencoder are no difference."""
    for name, patch, config in [("p2", 2, ("A", "a-s0")), ("p1", 1, ("A", "a-s1")), ("other", 4, ("A", "b-s0")),
                                ("autoencoder", 8, ("B", "a-s0"))]:  # fmt: skip
        run = make_run(name, 0, patch=patch, metrics={"val/loss": 1 / patch, "test/fid": 1 / patch})
        saved = yaml.safe_load((run / "config.yaml").read_text())
        saved["model"]["class_path"] = config[0]
        saved["data"]["init_args"]["autoencoder"] = f"runs/diffusion/{config[1]}"
        (run / "config.yaml").write_text(yaml.safe_dump(saved))
    comparison = Comparison(find_runs([tmp_path / "runs" / "supervised"]), ["val/loss", "test/fid"], baseline="p2")
    marks = {group.label: comparison.mark(group, "val/loss") for group in comparison.groups}
    assert marks == {"p2": "", "p1": "", "other": "data.autoencoder runs/diffusion/b-s* instead of runs/diffusion/a-s*",
                     "autoencoder": "model.class_path B instead of A"}
    assert not any(comparison.mark(group, "test/fid") for group in comparison.groups)
    assert [group.label for group in comparison.best("val/loss")] == ["p2"]
    assert [group.label for group in comparison.best("test/fid")] == ["autoencoder"]
    [row] = [row for row in comparison.rows() if row[0].text.startswith("other")]
    assert "†" in row[0].text and "†" in row[6].text and "†" not in row[8].text
    assert any(note.startswith("† other: data.autoencoder") for note in comparison.notes())


def test_they_are_marked_over_several_seeds_too(make_run, tmp_path):
    """Whose records differ in their weights at least; and seeds of one arm that were judged otherwise are told."""
    for name, patch, seed, guidance in [("a0", 1, 0, 1.0), ("a1", 1, 1, 1.0), ("b0", 2, 0, 4.0), ("b1", 2, 1, 4.0),
                                        ("c0", 4, 0, 1.0), ("c1", 4, 1, 4.0)]:  # fmt: skip
        make_run(f"{name[0]}-s{seed}", 0, seed, patch, metrics={"test/fid": patch + seed},
                 evaluation={"guidance": guidance, "weights_sha256": name})
    comparison = Comparison(find_runs([tmp_path / "runs" / "supervised"]), ["test/fid"], baseline="a")
    assert {group.label: comparison.mark(group) for group in comparison.groups} == {
        "a": "", "b": "evaluation's guidance 4.0 instead of 1.0", "c": "evaluation's guidance 1.0, 4.0 instead of 1.0"}
    assert "† c: its runs were judged by different guidance, 1.0, 4.0" in comparison.notes()
    assert comparison.best("test/fid") == []  # two never met

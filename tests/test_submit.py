"""python -m common.submit: the jobs of a command or of a table, and mistakes that are told before one is queued."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import submit
from common.errors import InputError
from common.paper.__main__ import main as paper_main
from common.paper.exhibits import read_exhibits, runs_of

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "common" / "slurm"
DIGITS = ["fit", "--config", "supervised/configs/digits.yaml", "--model.patch_size", "1"]
CHAINED = ["T4a", "--scale", "demo"]  # an MAE and its fine-tunings: two arrays


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of this checkout is taken for a run of the test."""
    for name in ("supervised", "mae", "diffusion", "locality_ablation", "common"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def jobs(capsys: pytest.CaptureFixture) -> Callable[..., list[tuple[str, list[str]]]]:
    """(what it is for, words of sbatch) for each job that is printed."""

    def run(*arguments: str) -> list[tuple[str, list[str]]]:
        capsys.readouterr()
        assert submit.main(list(arguments)) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("job ")]
        return [(line, shlex.split(after)) for line, after in zip(lines[::2], lines[1::2], strict=True)]

    return run


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """Puts a stand-in first in PATH that numbers jobs from 101 on; returns what it was called with."""
    (tmp_path / "bin").mkdir()
    program, calls = tmp_path / "bin" / "sbatch", tmp_path / "calls"
    program.write_text(f'#!/bin/bash\n[ -z "$REFUSAL" ] || {{ echo "$REFUSAL" >&2; exit 1; }}\n'
                       f'printf "%s\\x1f" "$@" >> {calls}; echo >> {calls}\n'
                       f'echo "$((100 + $(wc -l < {calls})))$CLUSTER"\n')  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def called() -> list[list[str]]:
        return [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()] if calls.exists() else []

    return called


# A study's command


def test_a_command_is_one_job(jobs: Callable) -> None:
    assert jobs("supervised", *DIGITS, "--seed_everything", "3") == [(
        "# run folder: runs/supervised/digits-nano-p1-s3",
        ["sbatch", "--nodes", "1", "--ntasks-per-node", "1", "--gpus-per-node", "1", "--cpus-per-task", "8",
         "common/slurm/train.sbatch", "supervised", *DIGITS, "--seed_everything", "3"])]  # fmt: skip


@pytest.mark.parametrize("options, expected", [
    (["--nodes", "2", "--gpus", "4", "--cpus", "12"],
     ["--nodes", "2", "--ntasks-per-node", "4", "--gpus-per-node", "4", "--cpus-per-task", "12"]),
    (["--gpus", "0", "--cpus", "1"], ["--nodes", "1", "--ntasks-per-node", "1", "--cpus-per-task", "1"]),
    (["--time", "1-12:00"], ["--nodes", "1", "--ntasks-per-node", "1", "--gpus-per-node", "1", "--cpus-per-task", "8",
                             "--time", "1-12:00"]),
    (["--sbatch", "--exclusive"],
     ["--nodes", "1", "--ntasks-per-node", "1", "--gpus-per-node", "1", "--cpus-per-task", "8", "--exclusive"]),
    (["--sbatch", "--partition gpu --comment 'a b'"],
     ["--nodes", "1", "--ntasks-per-node", "1", "--gpus-per-node", "1", "--cpus-per-task", "8", "--partition", "gpu",
      "--comment", "a b"]),
])  # fmt: skip
@pytest.mark.parametrize("behind", [False, True])
def test_resources(jobs: Callable, options, expected, behind) -> None:
    """Wherever they stand, they are not the study's."""
    arguments = ["supervised", *DIGITS, *options] if behind else [*options, "supervised", *DIGITS]
    [(_, words)] = jobs(*arguments)
    assert words == ["sbatch", *expected, "common/slurm/train.sbatch", "supervised", *DIGITS]


def test_what_has_spaces_is_quoted(jobs: Callable, capsys: pytest.CaptureFixture) -> None:
    [(_, words)] = jobs("supervised", *DIGITS, "--run_name", "a b", "--data.image_size", "[8, 8]")
    assert words[-4:] == ["--run_name", "a b", "--data.image_size", "[8, 8]"]


# A table's runs


def array(words: list[str]) -> list[int]:
    return [int(number) for number in words[words.index("--array") + 1].split(",")]


def test_a_table_is_an_array_of_its_runs(jobs: Callable) -> None:
    [(purpose, words)] = jobs("T3a", "--scale", "demo", "--gpus", "0", "--cpus", "2")
    starts = read_exhibits()["T3a"].scale("demo").starts()
    assert array(words) == list(range(len(starts))) and len(starts) > 1
    assert words[:2] == ["sbatch", "--array"] and "--dependency" not in words
    assert words[3:] == ["--nodes", "1", "--ntasks-per-node", "1", "--cpus-per-task", "2", "common/slurm/arms.sbatch",
                         "T3a", "--scale", "demo"]  # fmt: skip
    assert purpose == "# " + "; ".join(f"{i}: {start.arm.name}, seed {start.seed}" for i, start in enumerate(starts))


def test_runs_that_start_from_others_wait_for_them(jobs: Callable) -> None:
    """Every run is in one array, behind that of what it starts from; and only the first waits for nothing."""
    printed = jobs(*CHAINED)
    starts = read_exhibits()["T4a"].scale("demo").starts()
    assert len(printed) > 1
    position = {number: place for place, (_, words) in enumerate(printed) for number in array(words)}
    assert sorted(position) == list(range(len(starts)))
    numbers = {id(start): number for number, start in enumerate(starts)}
    for number, start in enumerate(starts):
        sources = [position[numbers[id(source)]] for source in start.sources.values()]
        assert position[number] == 1 + max(sources, default=-1)
    for place, (_, words) in enumerate(printed):
        after = words[words.index("--dependency") + 1] if "--dependency" in words else None
        assert after == ("afterok:JOB" if place else None)


def test_a_run_waits_for_the_longest_chain_before_it() -> None:
    first, other = (SimpleNamespace(sources={}) for _ in range(2))
    second = SimpleNamespace(sources={"init_from": first})
    third = SimpleNamespace(sources={"data.autoencoder": other, "init_from": second})
    assert [submit._level(start) for start in (first, other, second, third)] == [0, 0, 1, 2]


def test_seeds_are_handed_on(jobs: Callable) -> None:
    [(_, one)], [(_, three)] = (jobs("T3a", "--scale", "demo", "--seeds", seeds) for seeds in ("1", "3"))
    assert len(array(three)) == 3 * len(array(one)) and three[-5:] == ["T3a", "--scale", "demo", "--seeds", "3"]


def finish(start) -> None:
    """As the run folder of a finished start, in so far as it is looked at."""
    folder, config = start.located
    folder.mkdir(parents=True)
    results = {"status": "finished", "metrics": {}, "run_name": folder.name, "study": "x", "dataset": "x",
               "seed": start.seed, "epochs": 1}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(json.dumps(config))


def test_what_is_finished_is_left_out(jobs: Callable, capsys: pytest.CaptureFixture) -> None:
    starts = read_exhibits()["T3a"].scale("demo").starts()
    finish(starts[1])
    [(purpose, words)] = jobs("T3a", "--scale", "demo")
    assert array(words) == [number for number in range(len(starts)) if number != 1] and " 1: " not in purpose
    for number, start in enumerate(starts):
        if number != 1:
            finish(start)
    assert submit.main(["T3a", "--scale", "demo"]) == 0
    assert capsys.readouterr().out == f"T3a, demo: all {len(starts)} runs are finished\n"


def test_where_the_sources_are_finished_nothing_waits(jobs: Callable) -> None:
    _, *later = jobs(*CHAINED)
    for start in read_exhibits()["T4a"].scale("demo").starts():
        if not start.sources:
            finish(start)
    printed = jobs(*CHAINED)
    assert [array(words) for _, words in printed] == [array(words) for _, words in later]
    assert "--dependency" not in printed[0][1]


# Submitting


def test_jobs_are_submitted_as_printed_each_after_the_one_before(
    jobs: Callable, sbatch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER", ";main")  # behind the number, where there are several
    printed = jobs(*CHAINED, "--go")
    called = sbatch()
    assert called == [["--parsable", *words[1:]] for _, words in printed]
    after = [words[words.index("--dependency") + 1] if "--dependency" in words else None for words in called]
    assert after == [None, *(f"afterok:{101 + place}" for place in range(len(called) - 1))] and len(after) > 1


def test_without_go_nothing_is_submitted(jobs: Callable, sbatch: Callable) -> None:
    jobs(*CHAINED)
    jobs("supervised", *DIGITS)
    assert sbatch() == []


def test_a_refusal_of_slurm_is_told_and_stops(jobs: Callable, sbatch: Callable, monkeypatch) -> None:
    monkeypatch.setenv("REFUSAL", "sbatch: error: invalid partition specified: gpu")
    with pytest.raises(InputError, match="sbatch: .*invalid partition specified: gpu"):
        jobs(*CHAINED, "--go")


def test_go_needs_sbatch(jobs: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="--go: sbatch is not found; without --go the commands are printed"):
        jobs("supervised", *DIGITS, "--go")


@pytest.mark.parametrize("arguments, part", [
    (["supervised", *DIGITS, "--nodes", "0"], "--nodes 0: give 1 or more"),
    (["supervised", *DIGITS, "--cpus", "0"], "--cpus 0: give 1 or more"),
    (["supervised", *DIGITS, "--gpus", "-1"], "--gpus -1: give 0 or more"),
    (["supervised"], "supervised: name what to do, as in"),
    (["supervised", *DIGITS, "--model.patchsize", "1"], "model.patchsize: unknown key in the command line; did you"),
    (["supervised", "fit", "--config", "supervised/configs/digit.yaml"], "there is no file"),
    (["supervised", "fit"], "--config: name a config file"),
    (["supervised", "fit", "--config", "mae/configs/digits.yaml"], "is a config of another study"),
    (["supervise", *DIGITS], "supervise: neither a study (supervised, "),
    (["T99", "--scale", "demo"], "T99: neither a study (supervised, "),
    (["T3a", "--scale", "huge"], "--scale huge"),
    (["T3a", "--scale", "demo", "--seeds", "0"], "--seeds 0: give a number of seeds, 1 or more"),
    (["T3a", "--scale", "demo", "--seeds", "-2"], "--seeds -2: give a number of seeds, 1 or more"),
    (["supervised", *DIGITS, "--sbatch", "--comment 'a"], "--sbatch --comment 'a: "),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_queued(jobs: Callable, sbatch: Callable, arguments, part) -> None:
    with pytest.raises(InputError) as refusal:
        jobs(*arguments, "--go")
    assert part in str(refusal.value)
    assert sbatch() == []


@pytest.mark.parametrize("arguments", [["T3a"], ["T3a", "--scale", "demo", "--number", "1"], ["T3a", "--scal", "demo"]])
def test_options_that_are_none(sbatch: Callable, arguments) -> None:
    with pytest.raises(InputError, match="(--scale|--number 1); python -m common.submit --help shows what there is"):
        submit.main([*arguments, "--go"])
    assert sbatch() == []


def test_run_with_slurm_submits_arrays(sbatch: Callable, capsys: pytest.CaptureFixture) -> None:
    options = "--slurm=--gpus 2 --sbatch '--partition gpu'"
    assert paper_main(["run", "T4a", "--scale", "demo", "--seeds", "1", options]) == 0
    first, second = sbatch()
    script = ["common/slurm/arms.sbatch", "T4a", "--scale", "demo", "--seeds", "1"]
    assert first[:3] == ["--parsable", "--array", "0,1,2,3"] and first[-8:] == ["--partition", "gpu", *script]
    assert second[3:5] == ["--dependency", "afterok:101"] and ["--gpus-per-node", "2"] == second[9:11]


def test_all_is_one_set_of_arrays_that_trains_shared_runs_once(jobs: Callable) -> None:
    """By words or by folder: what one id spells out is another's default."""
    printed = jobs("all", "--scale", "gpu")
    exhibits = [exhibit for exhibit in read_exhibits().values() if "gpu" in exhibit.scales]
    starts = runs_of(exhibits, "gpu", None)
    submitted = [starts[number].located[0] for _, words in printed for number in array(words)]
    every = {start.located[0] for exhibit in exhibits for start in exhibit.scales["gpu"].starts()}
    assert len(submitted) == len(set(submitted)) and set(submitted) == every
    assert len(submitted) < len(starts) < sum(len(exhibit.scales["gpu"].starts()) for exhibit in exhibits)


# The numbers of an array's tasks


@pytest.mark.parametrize("id", [id if id in ("T3a", "T4a", "F3") else pytest.param(id, marks=pytest.mark.soak)
                                for id in read_exhibits()])  # fmt: skip
def test_a_number_is_that_of_the_run_that_show_lists_there(capsys: pytest.CaptureFixture, id) -> None:
    """With the same command; and alone it is the same as among all."""
    for scale, runs in read_exhibits()[id].scales.items():
        assert paper_main(["show", id, "--scale", scale]) == 0
        shown = capsys.readouterr().out.splitlines()
        heads = [line for line in shown if re.fullmatch(r"  # .*, seed \d+: .* FLOP, .*", line)]
        if not runs.starts():
            assert not heads
            continue
        assert paper_main(["commands", id, "--scale", scale]) == 0
        numbered = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        listed = [line.removeprefix("  python -m ") for line in shown[shown.index(heads[0]):] if " -m " in line]
        assert [line for _, line in numbered] == [line for line in listed if "--figure" not in line]
        numbers = [int(number) for number, _ in numbered]
        assert sorted(set(numbers)) == list(range(len(heads)))
        place = len(heads) - 1
        assert paper_main(["commands", id, "--scale", scale, "--number", str(place)]) == 0
        assert capsys.readouterr().out.splitlines() == [line for number, line in numbered if number == str(place)]


@pytest.mark.parametrize("number", ["-1", "1000"])
def test_a_number_that_no_run_has(number) -> None:
    with pytest.raises(InputError, match=f"--number {number}: T3a has the runs 0 to "):
        paper_main(["commands", "T3a", "--scale", "demo", "--number", number])


# The batch scripts

SRUN = """#!/bin/bash
printf "%s\\x1f" "$@" >> "$CALLS"; printf "\\x1e" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
PYTHON = """#!/bin/bash
if [ "$2" = common.paper ]; then
    [ "$*" = "-m common.paper commands X --scale demo --number 3" ] || exit 2
    echo "diffusion.latents 'a folder' --config a.yaml"
    echo "diffusion fit --config a.yaml --data.image_size '[8, 8]'"
    echo "diffusion test --config a.yaml"
    exit
fi
printf "%s\\x1f" "$@" >> "$CALLS"; printf "\\x1e" >> "$CALLS"
cat > /dev/null
[[ $2 == ${FAILS:-*} ]] || exit 0
exit ${CODE:-0}
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$ASKED"
"""


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs a batch script in a job of one task, with stand-ins for what it calls.

    Gives its exit code, the words of each srun and of the training that it started, and what scontrol was asked.
    """
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def run(script: str, *arguments: str, **variables: str) -> tuple[int, list[list[str]], list[str]]:
        for name in ("calls", "asked"):
            (tmp_path / name).write_text("")
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4",
               "PYTHON": str(tmp_path / "bin" / "python"), "CALLS": str(tmp_path / "calls"),
               "ASKED": str(tmp_path / "asked")}  # fmt: skip
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **job, **variables}
        process = subprocess.run(["bash", SCRIPTS / script, *arguments], env=environment, timeout=60,
                                 stdin=subprocess.DEVNULL)  # fmt: skip
        calls = [call.split("\x1f") for call in (tmp_path / "calls").read_text().split("\x1f\x1e")[:-1]]
        return process.returncode, calls, (tmp_path / "asked").read_text().splitlines()

    return run


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda script: script.name)
def test_scripts_are_bash(script) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    for option in ("--requeue", "--open-mode append", "--signal SIGUSR1@120"):
        assert f"#SBATCH {option}\n" in text


def test_nodes_devices_and_workers_are_the_jobs(batch: Callable) -> None:
    """And what the user names for himself comes later, and wins."""
    code, [srun, words], asked = batch("train.sbatch", "supervised", *DIGITS, "--data.workers", "3", "--run_name",
                                       "a b", SLURM_CPUS_PER_TASK="12")  # fmt: skip
    assert code == 0 and not asked
    assert srun[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert words == ["-m", "supervised", "fit", "--trainer.num_nodes", "2", "--trainer.devices", "4",
                     "--data.workers", "11", *DIGITS[1:], "--data.workers", "3", "--run_name", "a b"]  # fmt: skip
    _, [_, words], _ = batch("train.sbatch", "supervised", *DIGITS)
    assert words[words.index("--data.workers") + 1] == "0"


@pytest.mark.parametrize("code, variables, asked", [
    ("0", {}, []),
    ("1", {}, []),
    ("2", {}, []),
    ("75", {}, ["requeue 7"]),
    ("75", {"SLURM_RESTART_COUNT": "50"}, ["requeue 7"]),  # a long training has many starts
    ("75", {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, ["requeue 5_3"]),
    ("134", {}, ["requeue 7"]),  # the watchdog
    ("137", {"SLURM_RESTART_COUNT": "2"}, ["requeue 7"]),
    ("137", {"SLURM_RESTART_COUNT": "3"}, []),
    ("137", {"SLURM_RESTART_COUNT": "3", "RESTARTS": "5"}, ["requeue 7"]),
    ("137", {"RESTARTS": "0"}, []),
    ("127", {}, []),
])  # fmt: skip
def test_what_is_started_again(batch: Callable, code, variables, asked) -> None:
    left, _, said = batch("train.sbatch", "supervised", *DIGITS, CODE=code, **variables)
    assert (left, said) == (int(code), asked)
    assert not list(Path.cwd().glob(".first*"))


def test_a_task_runs_the_stages_of_its_number(batch: Callable) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    code, calls, asked = batch("arms.sbatch", "X", "--scale", "demo", **array)
    assert code == 0 and not asked
    assert calls[0] == ["-m", "diffusion.latents", "a folder", "--config", "a.yaml"]  # by one process
    trainings = calls[2::2]  # one after each srun
    assert [words[:3] for words in trainings] == [["-m", "diffusion", "fit"], ["-m", "diffusion", "test"]]
    assert trainings[0][-4:] == ["--config", "a.yaml", "--data.image_size", "[8, 8]"]
    code, calls, asked = batch("arms.sbatch", "X", "--scale", "demo", CODE="75", FAILS="diffusion", **array)
    assert (code, len(calls), asked) == (75, 3, ["requeue 5_3"])  # no test of what is not trained
    code, calls, asked = batch("arms.sbatch", "X", "--scale", "demo", CODE="2", FAILS="diffusion.latents", **array)
    assert (code, len(calls), asked) == (2, 1, [])  # nothing is trained on what is not there
    code, calls, asked = batch("arms.sbatch", "Y", "--scale", "demo", **array)
    assert (code, calls, asked) == (2, [], [])

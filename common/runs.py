"""Run folders as they lie on disk, read without importing what wrote them (Lightning takes seconds)."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.errors import InputError
from common.identity import arm_hash, covered

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML was built with libyaml
_NEEDED = {"status": str, "metrics": dict, "seed": int}
# Of these null is as good as none.
_TYPED = {"train_seconds": int | float, "parameters": int, "step": int, "batch_size": int, "patch_size": int,
          "headline": str, "versions": dict, "evaluation": dict, "init_from": dict, "copy_of": dict}


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        results: what results.json says; empty where it cannot be read.
        arm: equal for runs that differ in seed alone.
        status: finished, unfinished, failed or unreadable; only finished runs enter a mean.
        problem: what to say of a run that is not finished.
        config: what its results depend on, flattened; empty where it cannot be read.
    """

    folder: Path
    results: dict[str, Any]
    arm: str
    status: str
    problem: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.results["seed"]

    def setting(self, name: str) -> Any:
        """What a hyper-parameter was: a key of results.json, or one of the config, whole or its last words
        (model.optim.lr, optim.lr); None where the run has none.

        Raises:
            InputError: several keys of the config end so.
        """
        if name in self.results:
            return self.results[name]
        keys = [key for key in self.config if key == name or key.endswith(f".{name}")]
        if len(keys) > 1 and name not in keys:
            raise InputError(f"{name}: stands for several settings of {self.folder}: {', '.join(keys)}")
        return self.config[name if name in keys else keys[0]] if keys else None


class Statistic(NamedTuple):
    """Mean and sample standard deviation (n - 1 in the denominator; None for one run) over n seeds."""

    mean: float
    std: float | None
    n: int

    def text(self, digits: int) -> str:
        spread = f" ± {self.std:.{digits}f}" if self.std is not None else ""
        return f"{self.mean:.{digits}f}{spread} ({self.n})"


def digits(tag: str, *values: float | None) -> int:
    """Decimals to show a metric with: two of a percentage, four of a small number."""
    return 2 if "acc" in tag or "shape_" in tag or max(abs(value or 0) for value in values) >= 10 else 4


@dataclass(frozen=True)
class Group:
    """Finished runs under one name: those that differ in seed alone, or those that share a setting.

    Attributes:
        pairing: by it a run is paired with one of another group: the seed, or all but the shared setting.
    """

    label: str
    runs: tuple[Run, ...]
    pairing: tuple[Hashable, ...]

    def __getitem__(self, key: str) -> Any:
        """What results.json says of all its runs: dataset, epochs, patch_size ...; None where they differ."""
        values = [run.results.get(key) for run in self.runs]
        return values[0] if all(value == values[0] for value in values) else None

    def said(self, key: str) -> str:
        """The same in words, with all values where they differ."""
        return ", ".join(dict.fromkeys(str(run.results.get(key)) for run in self.runs))

    def measured(self, tag: str) -> dict[Hashable, float]:
        """A metric of the runs that have it, by what they are paired by."""
        return {key: run.results["metrics"][tag] for key, run in zip(self.pairing, self.runs, strict=True)
                if tag in run.results["metrics"]}

    def statistic(self, tag: str) -> Statistic | None:
        """Of a metric over the runs that measured it; None where none did."""
        values = [run.results["metrics"][tag] for run in self.runs if tag in run.results["metrics"]]
        if not values:
            return None
        return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def is_run_folder(folder: Path) -> bool:
    names = ("results.json", "config.yaml")
    try:
        return any((folder / name).is_file() for name in names) or any(folder.glob("events.out.tfevents.*"))
    except PermissionError:  # it may be one; to be named among those that cannot be read
        return True


def chosen(runs: Iterable[Run], conditions: Iterable[str]) -> list[Run]:
    """The runs that meet all conditions, each of the form KEY=VALUE[,VALUE]; a run that cannot be read stays, to be
    named.

    Raises:
        InputError: a condition of another form, or one that no run meets.
    """
    runs = list(runs)
    for condition in conditions:
        name, equals, values = condition.partition("=")
        if not (name and equals and values):
            raise InputError(f"--where {condition}: give KEY=VALUE, such as patch_size=1 or optim.lr=4e-3,1e-3")
        known = {str(run.setting(name)) for run in runs if run.results}
        wanted = {text for value in [values, *values.split(",")] for text in known if _same(text, value)}
        if not wanted:
            raise InputError(f"--where {condition}: no run has it; {name} is {', '.join(sorted(known)) or 'unknown'}")
        runs = [run for run in runs if not run.results or str(run.setting(name)) in wanted]
    return runs


def _same(one: str, other: str) -> bool:
    """Whether two texts are one value; 4e-3 is 0.004."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs in these folders; a folder of run folders stands for all of them.

    Plain files are passed over, since a shell's `runs/supervised/*` also gives the figure of the last comparison.

    Raises:
        InputError: a folder that does not exist or holds no run, or no run at all.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: no such folder; a run folder is runs/STUDY/RUN_NAME")
        if path.is_file():
            continue
        found = [path] if is_run_folder(path) else sorted(filter(is_run_folder, path.iterdir()))
        if not found:
            raise InputError(f"{path}: not a run folder (it has no results.json) and no folder of run folders")
        folders |= {folder.resolve(): folder for folder in found if folder.resolve() not in folders}
    if not folders:
        raise InputError("nothing to compare: no run folder was given, such as runs/supervised/*")
    return [read_run(folder) for folder in folders.values()]


def read_run(folder: Path) -> Run:
    """Reads results.json and config.yaml; what is damaged or missing makes the run unreadable, never an error."""
    try:
        results = json.loads((folder / "results.json").read_text())
        if not isinstance(results, dict):
            raise InputError("results.json is not a JSON object")
        lacking = [key for key, kind in _NEEDED.items() if not isinstance(results.get(key), kind)]
        if lacking:
            raise InputError(f"results.json lacks {', '.join(lacking)}")
        wrong = [key for key, kind in _TYPED.items() if not isinstance(results.get(key), kind | None)]
        if wrong:
            raise InputError(f"results.json has {', '.join(f'{key} {results[key]!r}' for key in wrong)}")
        config = yaml.load((folder / "config.yaml").read_text(), _Loader)
        if not isinstance(config, dict):
            raise InputError("config.yaml is not a mapping of keys to values")
        depends, arm = covered(config), arm_hash(config)
    except FileNotFoundError as error:
        return Run(folder, {}, "", "unreadable", f"({Path(error.filename).name} is missing)")
    # ValueError: JSON, UTF-8 and InputError. The others: keys and values that no config of ours has, or without an end.
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error) if isinstance(error, InputError) else f"damaged file: {' '.join(str(error).split())}"
        return Run(folder, {}, "", "unreadable", f"({problem})")
    # A value that is not a number (NaN included) was not measured.
    results["metrics"] = {tag: value for tag, value in results["metrics"].items()
                          if isinstance(value, float) and math.isfinite(value) or type(value) is int}
    if results["status"] == "finished":
        return Run(folder, results, arm, "finished", config=depends)
    failed = results["status"] == "failed"
    place = f"at epoch {results.get('epoch', 0)} of {results.get('epochs', '?')}"
    reason = f": {results['error']}" if failed and results.get("error") else ""
    return Run(folder, results, arm, "failed" if failed else "unfinished", place + reason, depends)


def trained(source: str | Path) -> dict[str, Any] | None:
    """What tells the weights of a run folder from those of another training in its place; None of anything else."""
    try:
        return weights_of(json.loads((Path(source) / "results.json").read_text()))
    except (OSError, ValueError):
        return None


def weights_of(results: dict[str, Any]) -> dict[str, Any]:
    return {name: results.get(name) for name in ("config_hash", "status", "step")}


def changed_source(results: dict[str, Any]) -> str | None:
    """The run whose weights a run started from or has, if that has been trained otherwise or further since."""
    for record in (results.get("init_from") or {}, results.get("copy_of") or {}):
        then, now = record.get("trained"), trained(record.get("source", ""))
        if then and now and then != now:
            return record["source"]
    return None


def group_runs(
    runs: Iterable[Run], labels: Mapping[Path, str] | None = None, by: str | None = None
) -> tuple[list[Group], list[Run]]:
    """Finished runs by arm, in the order given, and the runs that enter no mean.

    A second run of the same arm and seed is no further sample, since a run is a function of its config; it is among
    the runs left out.

    Args:
        labels: names of the arms by run folder; otherwise a run's name without its seed, where that is unambiguous.
        by: a setting whose equal values make a group, in place of the arm.
    """
    samples: dict[tuple[str, int, str], Run] = {}
    left_out: list[Run] = []
    for run in runs:
        if run.status != "finished":
            left_out.append(run)
        elif (first := samples.setdefault((run.arm, *_sample(run)), run)) is not run:
            left_out.append(Run(run.folder, run.results, run.arm, "repeat", f"of {first.folder}"))
    return (_by_setting(samples.values(), by) if by else _by_arm(samples.values(), labels or {})), left_out


def _by_arm(runs: Iterable[Run], labels: Mapping[Path, str]) -> list[Group]:
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    members = [tuple(sorted(arm, key=_sample)) for arm in arms.values()]
    names = [labels.get(group[0].folder) for group in members]
    candidates = [[_without_seed(group[0]), group[0].name, str(group[0].folder)] for group in members]
    for level in range(3):
        taken = [name or options[level] for name, options in zip(names, candidates, strict=True)]
        names = [name if name or taken.count(option) > 1 else option
                 for name, option in zip(names, taken, strict=True)]
    return [Group(name, group, tuple(run.seed for run in group)) for name, group in zip(names, members, strict=True)]


def _by_setting(runs: Iterable[Run], name: str) -> list[Group]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.setting(name) is not None:
            groups.setdefault(str(run.setting(name)), []).append(run)
    if not groups:
        raise InputError(f"--by {name}: no run has this setting; it is a key of results.json or of a run's config.yaml")
    return [Group(f"{name} {value}", tuple(members), tuple(_all_but(run, name) for run in members))
            for value, members in groups.items()]


def _all_but(run: Run, name: str) -> frozenset[tuple[str, str]]:
    """The settings of a run apart from one. What results.json calls by a short name stands in these places."""
    of_results = {f"{place}{name}" for place in ("model.", "model.optim.", "data.", "trainer.max_")}
    if name not in run.results:
        of_results = {key for key in run.config if key == name or key.endswith(f".{name}")}
    return frozenset((key, str(value)) for key, value in run.config.items() if key not in of_results)


def _sample(run: Run) -> tuple[int, str]:
    """What tells two runs of an arm apart: the seed, and the weights they start from."""
    return run.seed, str(run.config.get("init_from", ""))


def _without_seed(run: Run) -> str:
    return re.sub(rf"-s{run.seed}(?=-|$)", "", run.name)

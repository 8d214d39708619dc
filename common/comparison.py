"""Arms side by side: means over seeds, the difference to a baseline, and what may not be compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.identity import differing, of_any_seed
from common.runs import Group, Run, digits, group_runs
from common.significance import Paired, paired

BUDGET = ("dataset", "epochs", "batch_size")  # two arms that differ here answer another question
# And so do samples that were made or judged otherwise.
JUDGED = ("samples", "solver", "steps", "guidance", "guidance_channels", "weights", "extractor_sha256",
          "reference_sha256", "reference_statistics")
# And a loss is of what the model predicts, and of the space in which it does.
LOSSES = ("loss", "mse", "l1", "perceptual")
PREDICTED = ("model.class_path", "data.autoencoder")
MARK = "†"
_DESCRIBED = ("study", "dataset", "size", "patch_size", "position", "pool", "lr", "epochs", "batch_size", "parameters")
_LOWER_IS_BETTER = ("loss", "rmse", "rae", "log10", "fid", "sfid", "fd", "rfid", "rfd", "mse", "l1", "perceptual")
_HIGHER_IS_BETTER = ("acc1", "acc5", "delta1", "delta2", "delta3", "inception", "precision", "recall", "classifier",
                     "agreement", "psnr", "ssim")
_SHOWN = ("acc1", "acc5", "rmse", "rae", "fid", "sfid", "inception_score", "precision", "recall")


class Cell(NamedTuple):
    text: str
    best: bool = False


class Comparison:
    """Groups of runs under the same metrics.

    Args:
        metrics: tags; by default the headline metrics that every group has, or each group's own where none is shared.
        baseline: a group's label, or the name of one of its runs; by default the first group of the largest patch.
        labels: names of the arms by run folder.
        by: a setting whose equal values make a group, in place of all that is not the seed.
    """

    def __init__(self, runs: Iterable[Run], metrics: Sequence[str] = (), baseline: str | None = None,
                 labels: Mapping[Path, str] | None = None, by: str | None = None) -> None:
        self.groups, self.left_out = group_runs(runs, labels, by)
        self.by = by
        self.baseline = self._baseline(baseline)
        self.metrics = list(metrics) or self._shared_metrics()
        measured = {tag for group in self.groups for run in group.runs for tag in run.results["metrics"]}
        for tag in metrics:
            if self.groups and tag not in measured:
                raise InputError(f"--metric {tag}: no finished run has it; there is {', '.join(sorted(measured))}")

    def _baseline(self, name: str | None) -> Group | None:
        if name is not None:
            for group in self.groups:
                if name == group.label or name in [run.name for run in group.runs]:
                    return group
            known = ", ".join(group.label for group in self.groups) or "no finished run"
            raise InputError(f"--baseline {name}: not among the finished runs; there is {known}")
        return max(self.groups, key=lambda group: group["patch_size"] or 0, default=None)

    def _shared_metrics(self) -> list[str]:
        found = dict.fromkeys(tag for group in self.groups for tag in group.runs[0].results["metrics"])
        candidates = [f"{split}/{name}" for split in ("val", "test") for name in _SHOWN]
        candidates += filter(re.compile("test/(fd|precision|recall|agreement)_").match, found)  # by another extractor
        shared = [tag for tag in candidates if self.groups and all(group.statistic(tag) for group in self.groups)]
        return shared or list(dict.fromkeys(group["headline"] for group in self.groups if group["headline"]))

    def higher_is_better(self, tag: str) -> bool | None:
        """None where nothing says which way is better."""
        for group in self.groups:
            if group["headline"] == tag and group["higher_is_better"] is not None:
                return group["higher_is_better"]
        return True if _kind(tag) in _HIGHER_IS_BETTER else False if _kind(tag) in _LOWER_IS_BETTER else None

    def mark(self, group: Group, tag: str | None = None) -> str:
        """How the data, the budget or the judging of a group differ from the baseline's, as far as a metric (by default
        any that is shown) depends on it; empty where they are the same.
        """
        pairs = [(key, group.said(key), self.baseline.said(key)) for key in BUDGET]
        if all(our == their for _, our, their in pairs):  # and yet not the same images, or not as many
            pairs += [("images seen", group.said("images_seen"), self.baseline.said("images_seen"))]
        pairs += [(key, our, their) for key, (our, their) in differing(_source(group), _source(self.baseline)).items()]
        pairs += [("initial weights", _initial_weights(group), _initial_weights(self.baseline))]
        if _is_judged(group) and _is_judged(self.baseline):
            pairs += [(f"evaluation's {key}", _judged(group, key), _judged(self.baseline, key)) for key in JUDGED]
        if any(_kind(shown) in LOSSES for shown in ([tag] if tag else self.metrics)):
            pairs += [(key, *(of_any_seed(of.runs[0].config.get(key)) for of in (group, self.baseline)))
                      for key in PREDICTED]
        return ", ".join(f"{key} {our} instead of {their}" for key, our, their in pairs if our != their)

    def difference(self, group: Group, tag: str) -> float | None:
        """Mean of the group minus the baseline's; of groups by a setting, over the pairs of runs."""
        ours, theirs = group.statistic(tag), self.baseline.statistic(tag)
        if not (ours and theirs) or group is self.baseline:
            return None
        if self.by:  # between runs that are alike in all else
            test = self.paired(group, tag)
            return test and test.mean
        return ours.mean - theirs.mean

    def paired(self, group: Group, tag: str) -> Paired | None:
        """The differences to the baseline, pair by pair; None where no run of one has its match in the other."""
        return pair(group, self.baseline, tag) if group is not self.baseline else None

    def best(self, tag: str) -> list[Group]:
        """The groups of the best mean, among those with the baseline's data and budget; none where two never met."""
        means = {group.label: group.statistic(tag).mean for group in self.groups
                 if group.statistic(tag) and not self.mark(group, tag)}
        direction = self.higher_is_better(tag)
        if len(means) < 2 or direction is None:
            return []
        value = max(means.values()) if direction else min(means.values())
        return [group for group in self.groups if means.get(group.label) == value]

    # As a table

    def header(self) -> list[str]:
        return ["run", "data", "epochs x batch", "parameters", "time",
                *(title for tag in self.metrics for title in (tag, "difference"))]

    def rows(self) -> list[list[Cell]]:
        """One row per group, then one per run that enters no mean."""
        best = {tag: self.best(tag) for tag in self.metrics}
        rows = [self._row(group, best) for group in self.groups]
        for run in self.left_out:
            row = [run.name, run.results.get("dataset") or "-", run.status]
            rows.append([Cell(text) for text in row + ["-"] * (len(self.header()) - len(row))])
        return rows

    def _row(self, group: Group, best: dict[str, list[Group]]) -> list[Cell]:
        named = f" {MARK}" if self.mark(group) else ""
        seconds = [run.results.get("train_seconds") for run in group.runs]
        cells = [Cell(group.label + (" (baseline)" if group is self.baseline else named)),
                 Cell(group.said("dataset")), Cell(f"{group.said('epochs')} x {group.said('batch_size')}"),
                 Cell(f"{group['parameters']:,}" if group["parameters"] else "-"),
                 Cell(_duration(sum(seconds) / len(seconds)) if all(seconds) else "-")]
        for tag in self.metrics:
            value, difference = group.statistic(tag), self.difference(group, tag)
            decimals = digits(tag, value and value.mean, difference)
            cells.append(Cell(value.text(decimals) if value else "-", group in best[tag]))
            test = self.paired(group, tag)
            # Of the difference that is shown: not where one side has seeds that the other lacks.
            whole = test and test.p is not None and abs(test.mean - difference) < 1e-9
            significance = f" ({test.text()})" if whole else ""
            mark = f" {MARK}" if self.mark(group, tag) else ""
            cells.append(Cell(f"{difference:+.{decimals}f}{significance}{mark}" if difference is not None else "-"))
        return cells

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        lines = [f"mean ± standard deviation (number of {'runs' if self.by else 'seeds'}); "
                 f"differences to {self.baseline.label}" if self.baseline else "no finished run"]
        if any(test and test.p is not None for group in self.groups for tag in self.metrics
               for test in [self.baseline and self.paired(group, tag)]):
            pairs = f"that differ in {self.by} alone" if self.by else "of one seed"
            lines.append(f"p: of a difference as large by chance, by the paired t-test over n pairs of runs {pairs}")
        lines += [f"{MARK} {group.label}: {self.mark(group)}" for group in self.groups if self.mark(group)]
        lines += [f"{MARK} {group.label}: its runs were judged by different {key}, {_judged(group, key)}"
                  for group in self.groups if _is_judged(group)
                  for key in JUDGED if len({str(run.results["evaluation"].get(key)) for run in group.runs}) > 1]
        lines += [f"{group.label}: {said}" for group in self.groups if (said := self.settings(group))]
        return lines + [f"not averaged in: {run.name}, {run.status} {run.problem}" for run in self.left_out]

    def settings(self, group: Group) -> str:
        """What was set otherwise than for the baseline, whose value stands in brackets; of runs under one setting, in
        what else they differ.
        """
        if self.by:
            found = {key for run in group.runs for key in differing(run.config, group.runs[0].config)}
            names = ", ".join(sorted(found - {"seed_everything"}))
            return f"its runs differ in {names}" if names else ""
        found = differing(group.runs[0].config, self.baseline.runs[0].config)
        return ", ".join(f"{key} {our} ({their})" for key, (our, their) in found.items() if key != "seed_everything")

    def records(self) -> list[dict[str, Any]]:
        """The same for programs: a flat record per group, then one per run that enters no mean."""
        best = {tag: self.best(tag) for tag in self.metrics}
        records: list[dict[str, Any]] = []
        for group in self.groups:
            record = {"run": group.label, "status": "finished", "seeds": " ".join(str(run.seed) for run in group.runs),
                      "baseline": group is self.baseline, "not_comparable": self.mark(group),
                      "settings": self.settings(group),
                      **{key: group[key] for key in _DESCRIBED}}
            for tag in self.metrics:
                value = group.statistic(tag)
                record |= {tag: value and value.mean, f"{tag} std": value and value.std, f"{tag} n": value and value.n,
                           f"{tag} difference": self.difference(group, tag), f"{tag} best": group in best[tag]}
                test = self.paired(group, tag)
                record |= {f"{tag} paired difference": test and test.mean, f"{tag} p": test and test.p,
                           f"{tag} pairs": test and test.n}
            records.append(record)
        for run in self.left_out:
            records.append({"run": run.name, "status": run.status, "problem": run.problem,
                            "seeds": str(run.results.get("seed", "")),
                            **{key: run.results.get(key) for key in _DESCRIBED}})
        return records


def _kind(tag: str) -> str:
    """val/rmse_pooled is an rmse."""
    return tag.rsplit("/", 1)[-1].split("_")[0]


def _is_judged(group: Group) -> bool:
    """Whether there is a record of it for each of its runs."""
    return all(run.results.get("evaluation") for run in group.runs)


def _judged(group: Group, key: str) -> str:
    """How the samples of its runs were made or judged, with all values where they differ."""
    return ", ".join(dict.fromkeys(str(run.results["evaluation"].get(key)) for run in group.runs))


def _source(group: Group) -> dict[str, Any]:
    """Settings of the data themselves: how many images, of which size they are rendered, what tells their class."""
    return {key: value for key, value in group.runs[0].config.items() if key.startswith("data.source.")}


def _initial_weights(group: Group) -> str:
    """Equal where runs start from nothing, from trainings of one length, or from one file."""
    record = group.runs[0].results.get("init_from") or {}
    before = record.get("trained")
    return f"of {before['step']:,} steps" if before and before.get("step") else record.get("source", "random")


def pair(one: Group, other: Group, tag: str) -> Paired | None:
    """The differences of a metric between runs of two groups that are matched; None where no two are."""
    if any(len(set(group.pairing)) < len(group.pairing) for group in (one, other)):
        return None  # runs of one seed that started from several weights: which one pairs with which is not told
    ours, theirs = one.measured(tag), other.measured(tag)
    shared = [key for key in ours if key in theirs]
    return paired([ours[key] for key in shared], [theirs[key] for key in shared]) if shared else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s"

"""What the runs of one table or figure came to, beside what the paper states."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.compare import draw_figure, literal, markdown, print_table, write
from common.comparison import MARK, Comparison, pair
from common.paper.cost import duration, price
from common.paper.exhibits import MEASURES, Exhibit, Scale, Start
from common.paper.state import own_seconds, state
from common.runs import Group, digits, find_runs, trained

CURVES = "comparison.png"
DRAWN = "drawn.json"  # of which runs, and in what state, `run` has drawn the figure
TABLE = "table.md"  # what `run` had printed


class Section:
    """An exhibit at one scale: its finished runs compared, and those that are not, by their state.

    Args:
        starts: its runs; by default those of the scale's own number of seeds, and of the next ones as long as they
            have any.
    """

    def __init__(self, exhibit: Exhibit, scale: Scale, starts: Iterable[Start] | None = None) -> None:
        self.exhibit, self.scale = exhibit, scale
        self.starts = _started(scale) if starts is None else list(starts)
        self.folder = scale.folder(exhibit.id)
        self.states = [state(start) for start in self.starts]
        self.compared = {start.located[0]: start.arm.name for start, there in zip(self.starts, self.states, strict=True)
                         if there == "finished" and start.arm.name not in scale.sources}
        self.comparison = self._comparison() if self.compared else None

    def _comparison(self) -> Comparison:
        runs = find_runs(self.compared)
        measures = _read(self.folder / MEASURES) if self.drawn else {}
        for run in runs:
            run.results["metrics"] |= measures.get(str(run.folder), {})
        measured = {tag for run in runs for tag in run.results["metrics"]}
        return Comparison(runs, [tag for tag in self.scale.columns if tag in measured], labels=self.compared)

    @property
    def drawn(self) -> bool:
        """Whether there is a figure, and of none but these runs as they are now."""
        if not self.scale.draws or not self.scale.figure(self.exhibit.id).is_file():
            return False
        of = _read(self.folder / DRAWN)
        return not self.starts or bool(of) and all(
            Path(run) in self.compared and trained(run) == then for run, then in of.items())

    @property
    def title(self) -> str:
        return f"{self.exhibit.id}: {self.scale.shows or self.exhibit.shows}"

    def progress(self) -> str:
        """How many runs are in which state."""
        counts = Counter(self.states)
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no training"

    def shows_anything(self) -> bool:
        return any(there != "missing" for there in self.states) or self.drawn or (self.folder / TABLE).is_file()

    def print(self) -> None:
        print(f"\n{self.title}")
        if self.comparison:
            print_table(self.comparison)
        print("\n".join([*(f"paper: {line}" for line in self.exhibit.statements), *self._differences()]))

    def write(self) -> None:
        """The curves, and this section alone as Markdown, beside the figure that `run` drew."""
        self.draw()
        write(self.folder / "report.md", f"# {self.title}\n\n" + self.markdown(self.folder))

    def draw(self) -> None:
        if self.comparison:
            metric = self.scale.metric
            over_training = "/" in metric and not metric.startswith("test/")
            draw_figure(self.comparison, self.folder / CURVES, self.title, metric if over_training else None)

    def markdown(self, beside: Path) -> str:
        """All of the section but its heading; pictures are linked from the folder `beside`."""
        exhibit, name = self.exhibit, self.scale.name
        parts = [f"Of the paper: {exhibit.shows}."]
        if self.starts:
            head = [f"| {self.scale.metric} | paper | here |", "| --- | ---: | ---: |"]
            parts.append("\n".join([*head, *self._beside()]))
        parts += ["\n".join(f"- paper: {line}" for line in exhibit.statements)] * bool(exhibit.statements)
        if self.comparison:
            parts += [markdown(self.comparison)]
        if (self.folder / TABLE).is_file():
            parts.append((self.folder / TABLE).read_text(encoding="utf-8"))
        pictures = [self.scale.figure(exhibit.id)] * self.drawn + [self.folder / CURVES] * bool(self.comparison)
        parts += [f"![{exhibit.id}, {path.stem}]({_link(path, beside)})" for path in pictures]
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self._circumstances(name))]) + "\n"

    def _beside(self) -> Iterator[str]:
        """A row for every arm, and one for every difference that the paper states."""
        exhibit, metric = self.exhibit, self.scale.metric
        groups = {group.label: group for group in self.comparison.groups} if self.comparison else {}
        same, elsewhere = metric == exhibit.metric, f" {MARK}" * (self.scale.name != "paper")
        published = {arm.name for arm in exhibit.scales["paper"].arms} if "paper" in exhibit.scales else ()
        for name in dict.fromkeys(arm.name for arm in self.scale.arms if arm.name not in self.scale.sources):
            stated = exhibit.values.get(name) if same else None
            value = groups[name].statistic(metric) if name in groups else None
            here = value.text(digits(metric, value.mean)) if value else (
                "not measured" if name in groups else "no finished run")
            theirs = f"{stated:g}{elsewhere}" if stated is not None else (
                "unknown" if name in published else "no such run")
            yield f"| {name} | {theirs} | {here} |"
        for name, of in self.scale.differences.items():
            stands_for = f" ({of})" * (of != name)
            here = self._difference(name) or "no finished runs of both"
            yield f"| {name} | {exhibit.differences[of]:+g}{stands_for}{elsewhere} | {here} |"

    def _difference(self, name: str) -> str | None:
        """Of two arms, marked where data or budget differ; None where one has no finished run."""
        groups = {group.label: group for group in self.comparison.groups} if self.comparison else {}
        ones = [groups.get(arm) for arm in name.split(" - ")]
        if not all(ones):
            return None
        mark = "" if len({self.comparison.mark(group, self.scale.metric) for group in ones}) == 1 else f" {MARK}"
        return difference_text(*ones, self.scale.metric) + mark

    def _differences(self) -> Iterator[str]:
        for name in self.scale.differences:
            if here := self._difference(name):
                yield f"here: {self.scale.metric}: {name} = {here}"

    def _circumstances(self, scale: str) -> Iterator[str]:
        yield f"`python -m common.paper run {self.exhibit.id} --scale {scale}`: {self.progress()}"
        if self.scale.name != "paper" and any(MARK in row for row in self._beside()):
            yield f"{MARK} the paper's number is of its own data and budget, not of this scale's"
        if self.scale.draws and not self.drawn and self.scale.figure(self.exhibit.id).is_file():
            yield "a figure of other runs, or of these before they were trained on, is left out; `run` draws it anew"
        for start, there in zip(self.starts, self.states, strict=True):
            if there not in ("finished", "missing"):
                yield f"{start.arm.name}, seed {start.seed}: {there}, not averaged in"
        if not self.comparison:
            return
        runs = [run for group in self.comparison.groups for run in group.runs]
        for title, values in [("hardware", [run.results.get("hardware") for run in runs]),
                              ("commit", [run.results.get("commit") for run in runs]),
                              ("versions", [_versions(run.results.get("versions") or {}) for run in runs])]:
            yield f"{title}: " + literal("; ".join(dict.fromkeys(str(value or "unknown") for value in values)))
        starts = {start.located[0]: start for start in self.starts}
        compared = [starts[run.folder] for run in runs]
        seconds = sum(map(own_seconds, compared))
        flops = sum(price(start).images * price(start).training_flops for start in compared)
        formula = duration(sum(price(start).flops for start in self.starts), scale)
        measured = f"{seconds / 60:,.1f} min, {flops / seconds / 1e9:,.0f} GFLOP/s" if seconds else "an unknown time"
        yield f"cost: {formula} for all runs by formula; training of the compared ones took {measured}"


def difference_text(one: Group, other: Group, metric: str) -> str:
    """Mean, deviation and test of the difference over the seeds that both have."""
    test = pair(one, other, metric)
    if test is None:
        return "no seed in common" if one.statistic(metric) and other.statistic(metric) else "not measured"
    decimals = digits(metric, test.mean)
    spread = f" ± {test.std:.{decimals}f}" if test.std is not None else ""
    return f"{test.mean:+.{decimals}f}{spread} ({test.text()})"


def _read(file: Path) -> dict:
    """What stands in a file beside the figure; nothing where it is missing or damaged, for `run` writes it anew."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _started(scale: Scale) -> list[Start]:
    """The runs of the scale's own number of seeds, and of the next seeds up to the first that has none."""
    seeds, starts = scale.seeds, scale.starts()
    while True:
        seeds += 1
        more = scale.starts(seeds)
        if all(state(start) == "missing" for start in more[len(starts) :]):
            return starts
        starts = more


def _link(path: Path, beside: Path) -> str:
    return path.relative_to(beside).as_posix()


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())

"""What the runs of one table or figure came to, beside what the paper states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.compare import draw_figure, markdown, print_table, write
from common.comparison import MARK, Comparison, pair
from common.paper.cost import duration, price
from common.paper.exhibits import Exhibit, Scale, Start
from common.paper.state import state
from common.runs import Group, digits, find_runs

PICTURES = ("figure.png", "comparison.png")  # what `run` had drawn, and the curves
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
        compared = [start for start, there in zip(self.starts, self.states, strict=True)
                    if there == "finished" and start.arm.name not in scale.sources]
        folders = {start.located[0]: start.arm.name for start in compared}
        self.comparison = Comparison(find_runs(folders), scale.columns, labels=folders) if folders else None

    @property
    def title(self) -> str:
        return f"{self.exhibit.id}: {self.scale.shows or self.exhibit.shows}"

    def progress(self) -> str:
        """How many runs are in which state."""
        counts = Counter(self.states)
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no training"

    def shows_anything(self) -> bool:
        return self.comparison is not None or any((self.folder / file).is_file() for file in (*PICTURES, TABLE))

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
            curve = None if self.scale.metric.startswith("test/") else self.scale.metric  # a test has no curve
            draw_figure(self.comparison, self.folder / "comparison.png", self.title, curve)

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
        pictures = [self.folder / file for file in PICTURES]
        parts += [f"![{exhibit.id}, {path.stem}]({_link(path, beside)})" for path in pictures if path.is_file()]
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self._circumstances(name))]) + "\n"

    def _beside(self) -> Iterator[str]:
        """A row for every arm, and one for every difference that the paper states."""
        exhibit, metric = self.exhibit, self.scale.metric
        groups = {group.label: group for group in self.comparison.groups} if self.comparison else {}
        same = metric == exhibit.metric
        published = {arm.name for arm in exhibit.scales["paper"].arms} if "paper" in exhibit.scales else ()
        for name in dict.fromkeys(arm.name for arm in self.scale.arms if arm.name not in self.scale.sources):
            stated = exhibit.values.get(name) if same else None
            here = groups[name].statistic(metric) if name in groups else None
            theirs = f"{stated:g}" if stated is not None else "unknown" if name in published else "no such run"
            yield f"| {name} | {theirs} | {here.text(digits(metric, here.mean)) if here else 'no finished run'} |"
        for name, difference in exhibit.differences.items():
            here = self._difference(name) or "these arms have no finished runs at this scale"
            yield f"| {name} | {difference:+g} | {here} |"

    def _difference(self, name: str) -> str | None:
        """Of two arms, marked where data or budget differ; None where one has no finished run."""
        groups = {group.label: group for group in self.comparison.groups} if self.comparison else {}
        ones = [groups.get(arm) for arm in name.split(" - ")]
        if not all(ones):
            return None
        mark = "" if len({self.comparison.mark(group) for group in ones}) == 1 else f" {MARK}"
        return difference_text(*ones, self.scale.metric) + mark

    def _differences(self) -> Iterator[str]:
        for name in self.exhibit.differences:
            if here := self._difference(name):
                yield f"here: {self.scale.metric}: {name} = {here}"

    def _circumstances(self, scale: str) -> Iterator[str]:
        yield f"`python -m common.paper run {self.exhibit.id} --scale {scale}`: {self.progress()}"
        for start, there in zip(self.starts, self.states, strict=True):
            if there not in ("finished", "missing"):
                yield f"{start.arm.name}, seed {start.seed}: {there}, not averaged in"
        if not self.comparison:
            return
        runs = [run for group in self.comparison.groups for run in group.runs]
        for title, values in [("hardware", [run.results.get("hardware") for run in runs]),
                              ("commit", [run.results.get("commit") for run in runs]),
                              ("versions", [_versions(run.results.get("versions", {})) for run in runs])]:
            yield f"{title}: " + "; ".join(dict.fromkeys(str(value or "unknown") for value in values))
        seconds = sum(run.results.get("train_seconds", 0) for run in runs)
        prices = {start.located[0]: price(start) for start in self.starts}
        flops = sum(prices[run.folder].images * prices[run.folder].training_flops for run in runs)
        formula = duration(sum(each.flops for each in prices.values()), scale)
        measured = f"{seconds / 60:,.1f} min, {flops / seconds / 1e9:,.0f} GFLOP/s" if seconds else "an unknown time"
        yield f"cost: {formula} for all runs by formula; training of the compared ones took {measured}"


def difference_text(one: Group, other: Group, metric: str) -> str:
    """Mean, deviation and test of the difference over the seeds that both have."""
    test = pair(one, other, metric)
    if test is None:
        return "no seed in common"
    decimals = digits(metric, test.mean)
    spread = f" ± {test.std:.{decimals}f}" if test.std is not None else ""
    return f"{test.mean:+.{decimals}f}{spread} ({test.text()})"


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

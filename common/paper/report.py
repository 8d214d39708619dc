"""What an exhibit's runs came to, beside what the paper states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from common.compare import draw_figure, markdown, print_table, write
from common.comparison import Comparison
from common.paper.exhibits import Exhibit, Scale
from common.runs import find_runs


def report(exhibit: Exhibit, scale: Scale, folders: Mapping[Path, str], drawn: bool) -> None:
    """Prints the comparison, and writes its figure and Markdown below runs/paper/."""
    comparison = Comparison(find_runs(folders), scale.columns, labels=folders)
    title = f"{exhibit.id}: {scale.shows or exhibit.shows}"
    measured = measured_differences(exhibit, scale.metric, comparison)
    lines = [*(f"paper: {statement}" for statement in exhibit.statements), *measured]
    print(f"\n{title}")
    print_table(comparison)
    print("\n".join(lines))
    folder = scale.folder(exhibit.id)
    text = f"# {title}\n\n{markdown(comparison)}\n" + "".join(f"- {line}\n" for line in lines)
    figures = ["![curves](comparison.png)", *["![figure](figure.png)"] * drawn]
    write(folder / "comparison.md", "\n".join([text, *figures]) + "\n")
    curve = None if scale.metric.startswith("test/") else scale.metric  # a test has one value and no curve
    draw_figure(comparison, folder / "comparison.png", title, curve)


def measured_differences(exhibit: Exhibit, metric: str, comparison: Comparison) -> Iterator[str]:
    """The differences that the paper states, as measured here, for the arms that ran."""
    values = {group.label: group.statistic(metric) for group in comparison.groups}
    for pair in exhibit.differences:
        one, other = (values.get(arm) for arm in pair.split(" - "))
        if one and other:
            yield f"here: {metric}: {pair} = {one.mean - other.mean:+.2f} (n = {min(one.n, other.n)})"

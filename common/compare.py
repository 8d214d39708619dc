"""python -m common.compare FOLDER...: runs side by side, as a table, a figure of the curves, and files.

Runs that differ in seed alone are one row, mean ± standard deviation. Runs that are unfinished, failed or unreadable
are named and enter no mean. Differences are to the baseline, with a paired t-test over the seeds that both have; a run
with other data or another budget is marked.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.command import Parser, run_command
from common.comparison import Comparison
from common.figure import check_file, draw
from common.runs import chosen, find_runs


def print_table(comparison: Comparison) -> None:
    """The table on the terminal; the best value of each metric is bold and ends in *."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for position, title in enumerate(comparison.header()):
        table.add_column(title, justify="left" if position < 3 else "right", overflow="fold")
    for row in comparison.rows():
        table.add_row(*(Text(cell.text + " *", "bold green") if cell.best else Text(cell.text) for cell in row))
    # A pipe has no width: there a row stays one line, for grep and less.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)
    for note in ["* best", *comparison.notes()]:
        console.print(Text(note, "dim"), soft_wrap=True)


def markdown(comparison: Comparison) -> str:
    """The table in Markdown; the best value of each metric is bold."""
    header = comparison.header()
    lines = [_line(map(literal, header)), _line(["---"] * 3 + ["---:"] * (len(header) - 3))]
    lines += [_line(f"**{cell.text}**" if cell.best else literal(cell.text) for cell in row)
              for row in comparison.rows()]
    return "\n".join([*lines, "", *(f"{literal(note)}  " for note in comparison.notes())]) + "\n"


def literal(text: str) -> str:
    """What a run has left in its folder, as Markdown and HTML show it: no markup, whatever it looks like."""
    escaped = re.sub(r"[\\*`|]|\b_|_\b|(?<=\])\(", r"\\\g<0>", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def as_csv(comparison: Comparison) -> str:
    records = comparison.records()
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(records)
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    baseline = comparison.baseline and comparison.baseline.label
    content = {"baseline": baseline, "metrics": comparison.metrics, "runs": comparison.records()}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}")


def draw_figure(comparison: Comparison, path: Path, title: str, metric: str | None = None) -> None:
    """Draws the curves of the finished runs, and says which have none."""
    if not comparison.groups:
        print("no figure: there is no finished run")
        return
    without = draw(comparison.groups, path, title, metric)
    print(f"written: {path}" + (f" (no curve of {', '.join(without)})" if without else ""))


def _parser() -> Parser:
    parser = Parser("python -m common.compare", __doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, or folders of run folders")
    parser.add_argument("--metric", action="append", default=[], metavar="TAG",
                        help="a column, such as val/acc1 or best/val/acc1; repeatable; "
                             "default: the headline metrics that all runs have")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE",
                        help="only runs with this setting: a key of results.json, or of what results depend on in "
                             "config.yaml, such as patch_size=1, optim.lr=4e-3 or dataset=digits,shapes; repeatable")
    parser.add_argument("--by", metavar="KEY",
                        help="a row for each value of this setting, such as patch_size or model.depth, over all runs "
                             "that have it; differences then are between runs that are alike in all else")
    parser.add_argument("--baseline", metavar="NAME",
                        help="the run that differences are to; default: the first one of the largest patch size")
    parser.add_argument("--figure", type=Path, metavar="FILE",
                        help="curves as PNG, PDF or SVG; default: comparison.png beside the run folders")
    parser.add_argument("--no-figure", action="store_true", help="no curves, which are the slow part for many runs")
    for name in ("csv", "markdown", "json"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"the table as {name.upper()}")
    return parser


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.figure:
        check_file(options.figure)
    runs = chosen(find_runs(options.folders), options.where)
    comparison = Comparison(runs, options.metric, options.baseline, by=options.by)
    print_table(comparison)
    for path, form in [(options.csv, as_csv), (options.markdown, markdown), (options.json, as_json)]:
        if path:
            write(path, form(comparison))
    if not options.no_figure:
        parent = Path(os.path.commonpath([run.folder.absolute().parent for run in runs]))
        default = Path(os.path.relpath(parent / "comparison.png"))
        title = ", ".join(dict.fromkeys(group.said("dataset") for group in comparison.groups))
        draw_figure(comparison, options.figure or default, title, options.metric[0] if options.metric else None)
    return 0


if __name__ == "__main__":
    run_command(main)

"""The metrics of an evaluation, as a table to read."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from common.runs import digits


def print_scores(metrics: dict[str, float]) -> None:
    """One row per metric of tags such as `val/acc1`; `val_raw/*` stands beside `val/*` where an average is kept."""
    stages = list(dict.fromkeys(tag.partition("/")[0] for tag in metrics))
    names = list(dict.fromkeys(tag.partition("/")[2] for tag in metrics))
    columns = (Column(stage, justify="right") for stage in stages)
    table = Table("", *columns, box=None, padding=(0, 2, 0, 0))
    for name in names:
        values = [metrics[f"{stage}/{name}"] for stage in stages]
        table.add_row(name, *(f"{value:.{digits(name, *values)}f}" for value in values))
    Console().print(table)

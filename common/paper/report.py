"""What all runs came to, beside what the paper states: as Markdown, and as one HTML page.

Every number is one that a run left in its folder, or the paper's, and called so; what is not known is called unknown.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from common.compare import write
from common.paper.exhibits import RUNS, Exhibit
from common.paper.section import Section

FOLDER = RUNS / "paper"
TITLE = "# Pixels as tokens: what was run"
NOTE = """
Numbers are mean ± standard deviation over seeds (how many). p is the probability of a difference as large by chance,
by the paired t-test over the seeds that both have. Scales other than `paper` are other data or another budget, and no
claim about the paper's.
""".strip()
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums }
th { border-bottom: 2px solid #888 }
img { max-width: 100%; height: auto }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem }
code { background: #f3f3f3; padding: .1rem .25rem; border-radius: 3px }
"""


def report(exhibits: Sequence[Exhibit], scale: str | None) -> None:
    """Writes the page of these exhibits, at the scales that have runs, and its Markdown, below runs/paper/:
    report.html, or ID.html of one alone. An exhibit without a run has but a line in the list of contents.
    """
    lines, sections = [TITLE, "", "| id | scale | what it shows | runs |", "| --- | --- | --- | --- |"], []
    for exhibit in exhibits:
        there = [Section(exhibit, each) for name, each in exhibit.scales.items() if scale in (None, name)]
        there = [section for section in there if section.shows_anything()]
        lines += [f"| [{exhibit.id}](#{_anchor(_heading(section))}) | {section.scale.name} | "
                  f"{section.scale.shows or exhibit.shows} | {section.progress()} |" for section in there]
        if not there:
            lines.append(f"| {exhibit.id} | {', '.join(exhibit.scales)} | {exhibit.shows} | none yet |")
        sections += there
    lines += ["", NOTE]
    for section in sections:
        section.draw()
        lines += ["", f"## {_heading(section)}", "", section.markdown(FOLDER)]
    text = "\n".join(lines) + "\n"
    name = exhibits[0].id if len(exhibits) == 1 else "report"
    write(FOLDER / f"{name}.md", text)
    write(FOLDER / f"{name}.html", page(text, FOLDER))


def page(text: str, folder: Path) -> str:
    """Markdown as one HTML page that needs no other file: pictures of `folder` are inside it."""
    from markdown import markdown
    from markdown.extensions.toc import TocExtension

    headings = TocExtension(marker="", slugify=lambda heading, _: _anchor(heading))
    body = markdown(text, extensions=["tables", "sane_lists", headings])

    def inside(link: re.Match) -> str:
        data = base64.b64encode((folder / html.unescape(link[1])).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, body)
    head = f'<meta charset="utf-8"><title>Pixels as tokens</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _heading(section: Section) -> str:
    return f"{section.title} ({section.scale.name})"


def _anchor(heading: str) -> str:
    """The name that viewers of Markdown give to a heading, which the page gives it too."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

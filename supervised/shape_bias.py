"""python -m supervised.shape_bias RUN_FOLDER... | --decisions CSV...: does a classifier go by shape or by texture?

On pictures whose shape is of one category and whose texture is of another (Geirhos et al. 2019; the paper's appendix D;
RECIPES 3.5): the share of shape among all answers that are either. An ImageNet classifier needs their stimuli
(--stimuli DIR, with files such as cat7-elephant1.png); one that was trained on `shapes` labelled by `both` is shown
those that the project renders. Published decision files (--decisions) are read without a model.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from common.advice import quieten
from common.command import Parser, run_command
from common.compare import write
from common.errors import InputError
from common.figure import check_file, literal, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from common.training.trained import Trained

# Classes of ImageNet-1k, from 0 in the order of their WNIDs, that make up a category: 207 in all.
_MEMBERS = {
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145", "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907", "car": "436 511 817", "cat": "281-286", "chair": "423 559 765 857",
    "clock": "409 530 892", "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386", "keyboard": "508 878", "knife": "499", "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}  # fmt: skip
AT_ONCE = 32  # pictures, so that it is said now and then how many are left
_COLUMNS = ("subj", "session", "trial", "rt", "object_response", "category", "condition", "imagename")


def _classes(spans: str) -> list[int]:
    ends = [tuple(map(int, span.split("-"))) for span in spans.split()]
    return [index for span in ends for index in range(span[0], span[-1] + 1)]


CATEGORIES = {name: _classes(spans) for name, spans in _MEMBERS.items()}


class Decision(NamedTuple):
    """An answer to one picture, in categories."""

    picture: str
    shape: str
    texture: str
    answer: str


class Count(NamedTuple):
    """Answers to pictures of two different cues: shape's, texture's, and neither's."""

    shape: int
    texture: int
    other: int

    @property
    def bias(self) -> float | None:
        """Percentage of shape among answers that are one of the two; None where there is none."""
        either = self.shape + self.texture
        return 100 * self.shape / either if either else None

    @property
    def either(self) -> float:
        """Percentage of answers that are the shape's or the texture's."""
        return 100 * (self.shape + self.texture) / max(sum(self), 1)


def by_category(decisions: Iterable[Decision]) -> dict[str, Count]:
    """Counts by the category of the shape; pictures with the same cue twice say nothing and are left out."""
    found: dict[str, list[int]] = {}
    for decision in decisions:
        if decision.shape != decision.texture:
            counts = found.setdefault(decision.shape, [0, 0, 0])
            counts[0 if decision.answer == decision.shape else 1 if decision.answer == decision.texture else 2] += 1
    return {category: Count(*found[category]) for category in sorted(found)}


def total(counts: Mapping[str, Count]) -> Count:
    return Count(*(sum(values) for values in zip(*counts.values(), strict=True)))


def answers(probabilities: Tensor) -> list[str]:
    """Of ImageNet's classes (B, 1000): the category whose members have the largest mean probability."""
    means = torch.stack([probabilities[:, members].mean(dim=1) for members in CATEGORIES.values()], dim=1)
    names = list(CATEGORIES)
    return [names[index] for index in means.argmax(dim=1).tolist()]


def cues(file: str) -> tuple[str, str]:
    """Shape and texture from the name of a stimulus: cat7-elephant1.png."""
    match = re.fullmatch(r"([a-z]+)\d+-([a-z]+)\d+", Path(file).stem)
    if match is None or not set(match.groups()) <= set(CATEGORIES):
        raise InputError(f"--stimuli: {file} is not named SHAPE1-TEXTURE2.png with two of the categories "
                         f"{', '.join(CATEGORIES)}")
    return match.group(1), match.group(2)


# From a model


def decisions_on_stimuli(run: Trained, folder: Path, name: str) -> Iterator[Decision]:
    """What an ImageNet classifier answers, each picture prepared as in its own evaluation."""
    from common.training.progress import told
    from common.training.trained import evaluation_batches, evaluation_set

    with told(name, len(evaluation_set(run.data, folder))) as tell:
        for batch in evaluation_batches(run.data, folder, most=AT_ONCE):
            names = [cues(file) for file in batch["file"]]
            given = answers(run.experiment.predicted(run.net, batch).softmax(-1))
            yield from (Decision(Path(f).name, *cue, a) for f, cue, a in zip(batch["file"], names, given, strict=True))
            tell(len(given))


@torch.no_grad()
def decisions_on_shapes(run: Trained, name: str) -> Iterator[Decision]:
    """What a classifier of shapes and textures, trained where both told the class, answers where they do not agree."""
    from common.data.shapes import OUTLINES
    from common.training.progress import told

    names = list(OUTLINES)
    pictures = run.data.source.cue_conflict()
    given: list[int] = []
    with told(name, len(pictures.images)) as tell:
        for images in pictures.images.split(AT_ONCE):
            batch = run.data.on_after_batch_transfer({"image": images}, 0)
            given += run.experiment.predicted(run.net, batch).argmax(-1).tolist()
            tell(len(images))
    for i, cue in enumerate(zip(pictures.shapes, pictures.textures, given, strict=True)):
        yield Decision(f"{i}", *(names[index] for index in cue))


def decisions_of(folder: Path, stimuli: Path | None) -> list[Decision]:
    from common.data import ImageData
    from common.data.shapes import Shapes
    from common.training.trained import load

    run, name = load(folder, "RUN_FOLDER"), folder.resolve().name
    if not hasattr(run.experiment, "predicted") or run.experiment.data_class is not ImageData:
        raise InputError(f"RUN_FOLDER: {folder} is a run of {type(run.experiment).__name__}, which is no "
                         "classifier of pictures alone")
    source = run.data.source
    if isinstance(source, Shapes):
        if source.label != "both":
            raise InputError(f"RUN_FOLDER: {folder} was trained on shapes by {source.label}, which decides beforehand "
                             "what it goes by; train it with --data.source.label both")
        return list(decisions_on_shapes(run, name))
    if run.net.classes != 1000:
        raise InputError(f"RUN_FOLDER: {folder} has {run.net.classes} classes; the categories are made of ImageNet's "
                         "1000, or of those of shapes labelled by both")
    if stimuli is None:
        raise InputError("--stimuli: name the folder of the cue-conflict pictures (style-transfer-preprocessed-512)")
    return list(decisions_on_stimuli(run, stimuli, name))


# Decision files, in the published format


def read_decisions(file: Path) -> dict[str, list[Decision]]:
    """By subject. The texture is the last part of a picture's name.

    Raises:
        InputError: names the line that is none of such a file, or that repeats a trial.
    """
    subjects: dict[str, list[Decision]] = {}
    trials: set[tuple[str, ...]] = set()
    try:
        with open(file, newline="", encoding="utf-8-sig") as content:  # spreadsheets begin a file with a mark
            table = csv.DictReader(content)
            lacking = set(_COLUMNS) - set(table.fieldnames or ())
            if lacking:
                raise InputError(f"--decisions: {file} lacks the columns {', '.join(sorted(lacking))}")
            for row in table:
                where = f"--decisions: {file}, line {table.line_num}"
                texture = re.search(r"-([a-z]+)\d*\.\w+$", row["imagename"] or "")
                if texture is None:
                    raise InputError(f"{where}: imagename {row['imagename']} does not end in -TEXTURE1.png")
                if empty := [name for name in ("subj", "category", "object_response") if not row[name]]:
                    raise InputError(f"{where}: {' and '.join(empty)} is empty")
                trial = tuple(row[name] for name in ("subj", "session", "trial", "imagename"))
                if trial in trials:
                    raise InputError(f"{where}: trial {row['trial']} of {row['subj']} was there before; count it once")
                trials.add(trial)
                subjects.setdefault(row["subj"], []).append(
                    Decision(row["imagename"], row["category"], texture.group(1), row["object_response"]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--decisions: {file} is not a CSV file ({error})") from error
    if not subjects:
        raise InputError(f"--decisions: {file} holds no decision")
    return subjects


def write_decisions(file: Path, subject: str, decisions: Iterable[Decision]) -> None:
    with open(file, "w", newline="") as content:
        table = csv.writer(content)
        table.writerow(_COLUMNS)
        for trial, decision in enumerate(decisions, 1):
            name = decision.picture if "-" in decision.picture else (
                f"{decision.picture}_{decision.shape}1-{decision.texture}1.png")
            table.writerow([subject, 1, trial, "NaN", decision.answer, decision.shape, 0, name])
    print(f"written: {file}")


# What is shown


def measured(count: Count) -> dict[str, float]:
    """What common.paper compares, in percent; there is no bias where no answer is the shape's or the texture's."""
    bias = {} if count.bias is None else {"shape_bias": count.bias}
    return bias | {"shape_or_texture": count.either}


def print_table(subjects: Mapping[str, Mapping[str, Count]]) -> None:
    table = Table(Column(overflow="fold"), "category", "shape", "texture", "other", "shape bias (%)", "either (%)",
                  box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, counts in subjects.items():
        for category, count in [*counts.items(), ("all", total(counts))]:
            bias = "-" if count.bias is None else f"{count.bias:.1f}"
            title = escape(name) if category == "all" else ""
            table.add_row(title, escape(category), *map(str, count), bias, f"{count.either:.1f}",
                          style="bold" if category == "all" else None)
    Console().print(table)


def figure(subjects: Mapping[str, Mapping[str, Count]]) -> Figure:
    """A point for each category and subject, and a line at a subject's bias over all pictures."""
    from matplotlib.figure import Figure

    categories = sorted({category for counts in subjects.values() for category in counts}, reverse=True)
    drawn = Figure(figsize=(6.4, 1.4 + 0.28 * len(categories) + 0.2 * len(subjects)), dpi=150, layout="constrained")
    axes = drawn.subplots()
    for colour, marker, (name, counts) in zip(_cycle("#0072B2", "#D55E00", "#009E73", "#CC79A7"), _cycle(*"os^D"),
                                              subjects.items(), strict=False):
        points = {category: count.bias for category, count in counts.items() if count.bias is not None}
        bias = total(counts).bias
        label = literal(name)
        axes.plot(points.values(), [categories.index(category) for category in points], marker, color=colour,
                  markersize=5, label=label if bias is None else f"{label}: {bias:.1f} %")
        if bias is not None:
            axes.axvline(bias, color=colour, linewidth=1.2)
    axes.set_yticks(range(len(categories)), categories, fontsize=8)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("shape bias (%): decisions by shape, of those by shape or by texture")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(loc="outside lower center", fontsize=8, frameon=False)
    return drawn


def _cycle(*values: str) -> Iterator[str]:
    while True:
        yield from values


def main(arguments: list[str]) -> int:
    parser = Parser("python -m supervised.shape_bias", __doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_FOLDER", help="of a classifier")
    parser.add_argument("--stimuli", type=Path, metavar="DIR", help="the published cue-conflict pictures")
    parser.add_argument("--decisions", type=Path, action="append", default=[], metavar="CSV",
                        help="decisions of others, people or models, as they are published; repeatable")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="PNG, PDF or SVG of the bias by category")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the decisions of the one run, as they are published")
    parser.add_argument("--measures", type=Path, metavar="FILE", help="the percentages over all pictures, by run "
                        "folder, as JSON for common.paper")
    options = parser.parse_args(arguments)
    if not options.folders and not options.decisions:
        raise InputError("RUN_FOLDER: name a run of a classifier, or --decisions")
    if options.csv and len(options.folders) != 1:
        raise InputError(f"--csv: holds the decisions of one run, not of {len(options.folders)}")
    if options.measures and not options.folders:
        raise InputError(f"--measures {options.measures}: holds what runs are measured by; name a RUN_FOLDER too")
    if options.figure:
        check_file(options.figure)
    quieten()
    names = [folder.resolve().name for folder in options.folders]
    read = [read_decisions(file) for file in options.decisions]
    given = [*names, *(subject for each in read for subject in each)]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise InputError(f"{', '.join(twice)}: of several runs or subjects; look at them one by one, or rename them")
    found: dict[str, list[Decision]] = {}
    for name, folder in zip(names, options.folders, strict=True):
        found[name] = decisions_of(folder, options.stimuli)
        if options.csv:
            write_decisions(options.csv, name, found[name])
    for each in read:
        found |= each
    subjects = {name: by_category(decisions) for name, decisions in found.items()}
    for name, counts in subjects.items():
        if not counts:
            raise InputError(f"{name}: no picture has two different cues")
    print_table(subjects)
    if options.figure:
        save(figure(subjects), options.figure)
    if options.measures:
        numbers = {str(folder): measured(total(subjects[name]))
                   for name, folder in zip(names, options.folders, strict=True)}
        write(options.measures, json.dumps(numbers, indent=1))
    return 0


if __name__ == "__main__":
    run_command(main)

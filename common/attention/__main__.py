"""python -m common.attention RUN_FOLDER...: how far the heads of trained models look, and where to.

Of a classifier or an MAE encoder: attention distance and offset of every layer and head over validation images (or
those of --images), by thirds of the layers; or the attention maps of the token in the middle of the image.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.attention.figures import GROUPS, by_layer_and_head, in_colours, layers_of, over_images
from common.attention.measures import AttentionMeasures, Measures
from common.command import run_command
from common.data.images import ImageData
from common.errors import InputError
from common.figure import check_file, save
from common.model import VisionTransformer
from common.training.cli import quieten
from common.training.module import Experiment
from common.training.trained import Trained, evaluation_batches, load

SHOWN = 4  # images whose maps are drawn
MEASURES = {
    "distance": "attention distance, as a share of the image's side",
    "offset": "attention offset",
    "offset_per_query": "attention offset, query by query",
}


class Seen(NamedTuple):
    """What a run's model attended to: measures over all images, and maps of the middle token of a few.

    Attributes:
        images: (B, C, H, W) in [0, 1].
        maps: for each head and layer that was asked for (B, rows, columns).
    """

    measures: Measures
    images: Tensor
    maps: list[Tensor]


def examine(run: Trained, folder: Path | None, count: int, shown: Sequence[tuple[int, int]]) -> Seen:
    """Runs the model over `count` images.

    Args:
        shown: pairs of head and layer, counted from 0, whose maps are kept.
    """
    net: VisionTransformer = run.experiment.backbone(run.net)
    transform = getattr(run.experiment, "transform", lambda images: images)
    measures = AttentionMeasures(net.grid, net.num_prefix_tokens)
    rows, columns = net.grid
    query = net.num_prefix_tokens + rows // 2 * columns + columns // 2
    kept: list[Tensor] = []
    left, maps_of = count, {pair: [] for pair in shown}
    # One layer's maps of a chunk stay below half a gigabyte.
    chunk = max(int(5e8 / (4 * net.heads * (net.num_prefix_tokens + net.tokens) ** 2)), 1)
    for batch in evaluation_batches(run.data, folder):
        for images in batch["image"][:left].split(chunk):
            for layer, maps in enumerate(net.each_attention_map(transform(images))):
                measures.update(layer, maps)
                for head, at in shown:
                    if at == layer and sum(map(len, kept)) < SHOWN:
                        of_query = maps[:, head, query, net.num_prefix_tokens :]
                        maps_of[head, at].append(of_query.unflatten(1, net.grid).clone())
            kept += [images] if sum(map(len, kept)) < SHOWN else []
        left -= len(batch["image"])
        if left <= 0:
            break
    pictures = in_colours(torch.cat(kept)[:SHOWN], run.data.mean, run.data.std)
    return Seen(measures.compute(), pictures, [torch.cat(maps_of[pair])[:SHOWN] for pair in shown])


def _load(folder: Path) -> Trained:
    def check(experiment: Experiment, suits: bool) -> None:
        if not suits:
            raise InputError(f"RUN_FOLDER: {folder} is a run of {type(experiment).__name__}, which has no attention "
                             "over the pixels or patches of images; name one of a classifier or of MAE")

    run = load(folder, "RUN_FOLDER", lambda experiment, _: check(experiment, experiment.data_class is ImageData))
    check(run.experiment, isinstance(run.experiment.backbone(run.net), VisionTransformer))
    return run


def _pairs(words: Sequence[str], net: VisionTransformer) -> list[tuple[int, int]]:
    pairs = []
    for word in words:
        if not re.fullmatch(r"\d+,\d+", word):
            raise InputError(f"--map {word}: give HEAD,LAYER, counted from 0, as in --map 7,2")
        head, layer = map(int, word.split(","))
        if head >= net.heads or layer >= net.depth:
            raise InputError(f"--map {word}: the model has heads 0 to {net.heads - 1} and layers 0 to {net.depth - 1}")
        pairs.append((head, layer))
    return pairs


def print_measures(name: str, measures: Measures) -> None:
    """Means over the heads and layers of each third."""
    depth = len(measures.distance)
    table = Table(name, *GROUPS, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for label, values in [("distance / image side", measures.distance), ("offset", measures.offset),
                          ("offset, per query", measures.offset_per_query)]:
        groups = [values[list(layers_of(group, depth))] for group in range(3)]
        table.add_row(label, *(f"{group.mean():.3f}" if len(group) else "-" for group in groups))
    Console().print(table)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Their names, with the study's in front where two are the same, and as they were typed where that is no help."""
    paths = [folder.resolve() for folder in folders]
    for names in ([path.name for path in paths], [f"{path.parent.name}/{path.name}" for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m common.attention", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="of a classifier or of MAE")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images to look at; default: the validation split")
    parser.add_argument("--count", type=int, default=256, help="of images (256)")
    parser.add_argument("--shows", choices=[*MEASURES, "maps"], default="distance", help="what the figure shows: a "
                        "measure, or maps of the token in the middle over four images (distance)")
    parser.add_argument("--map", action="append", metavar="HEAD,LAYER", help="whose maps are shown, counted from 0; "
                        "repeatable; default: head 0 of the first three layers")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="PNG, PDF or SVG; default: figures/attention.png "
                        "of the run that is named first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all measures by run, layer and head")
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise InputError(f"--count {options.count}: give 1 or more")
    figure = options.figure or options.folders[0] / "figures" / "attention.png"
    check_file(figure)
    quieten()
    seen, titles, pictured = {}, [], None
    for name, folder in zip(names_of(options.folders), options.folders, strict=True):
        run = _load(folder)
        pictured = pictured or run.data.dataset
        if options.shows == "maps" and not options.images and run.data.dataset != pictured:
            raise InputError(f"RUN_FOLDER: {folder} was trained on {run.data.dataset}, and those before it on "
                             f"{pictured}; name the pictures to look at as --images")
        net = run.experiment.backbone(run.net)
        pairs = _pairs(options.map or [f"0,{layer}" for layer in range(min(3, net.depth))], net)
        seen[name] = examine(run, options.images, options.count, pairs)
        titles += [f"{name}\nhead {head}, layer {layer}" for head, layer in pairs]
        print_measures(name, seen[name].measures)
    if options.shows == "maps":
        save(over_images(next(iter(seen.values())).images, [m for each in seen.values() for m in each.maps], titles),
             figure)
    else:
        tables = {name: getattr(each.measures, options.shows) for name, each in seen.items()}
        save(by_layer_and_head(tables, MEASURES[options.shows]), figure)
    if options.json:
        numbers = {name: {key: value.tolist() for key, value in each.measures._asdict().items()}
                   for name, each in seen.items()}
        options.json.write_text(json.dumps(numbers, indent=1))
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    run_command(main)

"""python -m common.attention RUN_FOLDER...: how far the heads of trained models look, and where to.

Of a classifier, an MAE encoder or a depth model: attention distance and offset of every layer and head over validation
images (or those of --images), by thirds of the layers; or the attention maps of single pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from common.advice import quieten
from common.attention.figures import GROUPS, by_layer_and_head, in_colours, layers_of, over_images
from common.attention.measures import AttentionMeasures, Measures
from common.command import Parser, run_command
from common.compare import write
from common.errors import InputError
from common.figure import check_file, save
from common.model import VisionTransformer
from common.training.module import Experiment
from common.training.progress import told
from common.training.trained import Trained, evaluation_batches, evaluation_set, evenly_spaced, load

SHOWN = 4  # images whose maps are drawn
MEASURES = {  # what a row of the table and an axis of the figure say
    "distance": ("distance / image side", "attention distance, as a share of the image's side"),
    "distance_to_last": ("distance / (side - 1)", "attention distance, in steps, / (side - 1)"),
    "offset": ("offset", "attention offset"),
    "offset_per_query": ("offset, per query", "attention offset, query by query"),
}


class Seen(NamedTuple):
    """What a run's model attended to: measures over all images, and maps of a few.

    Attributes:
        images: those few (B, C, H, W), in [0, 1].
        maps: for each head and layer that was asked for, and each pixel of these, (B, rows, columns).
        queries: for each of the maps where its pixel lies, from the top and from the left, as shares of the sides.
    """

    measures: Measures
    images: Tensor
    maps: list[Tensor]
    queries: list[tuple[float, float]]


def examine(
    run: Trained, folder: Path | None, count: int, shown: Sequence[tuple[int, int]],
    pixels: Sequence[tuple[int, int]] = (), name: str = "attention",
) -> Seen:  # fmt: skip
    """Runs the model over `count` images that are evenly spaced over all, and says how far it is.

    Args:
        shown: pairs of head and layer, counted from 0, whose maps are kept.
        pixels: row and column, counted from 0, of those whose tokens are the queries of these maps; the one in the
            middle where none is named.
        name: what the line of progress begins with.
    """
    net: VisionTransformer = run.experiment.backbone(run.net)
    transform = getattr(run.experiment, "transform", lambda images: images)
    measures = AttentionMeasures(net.grid, net.num_prefix_tokens)
    height, width = net.image_size
    pixels = pixels or [(height // 2, width // 2)]
    tokens = [row // net.patch_size * net.grid[1] + column // net.patch_size for row, column in pixels]
    queries = [net.num_prefix_tokens + token for token in tokens]
    # One layer's maps of a batch stay below half a gigabyte.
    most = max(int(5e8 / (4 * net.heads * (net.num_prefix_tokens + net.tokens) ** 2)), 1)
    images_in_all = min(count, len(evaluation_set(run.data, folder)))
    drawn = evenly_spaced(images_in_all, SHOWN)
    kept: list[Tensor] = []
    done, maps_of = 0, {pair: [] for pair in shown}
    with told(name, images_in_all) as tell:
        for batch in evaluation_batches(run.data, folder, count, most):
            images = batch["image"]
            here = torch.tensor([place - done for place in drawn if done <= place < done + len(images)]).long()
            for layer, maps in enumerate(net.each_attention_map(transform(images))):
                measures.update(layer, maps)
                for head, at in shown:
                    if at == layer:
                        maps_of[head, at].append(maps[:, head, queries][here, :, net.num_prefix_tokens :])
            kept.append(images[here])
            done += len(images)
            tell(len(images))
    pictures = in_colours(torch.cat(kept), run.data.mean, run.data.std)
    maps_by_pixel = [torch.cat(maps_of[pair]).unflatten(2, net.grid).unbind(1) for pair in shown]
    places = [((row + 0.5) / height, (column + 0.5) / width) for row, column in pixels]
    return Seen(measures.compute(), pictures, [maps for each in maps_by_pixel for maps in each], places * len(shown))


def _load(folder: Path) -> Trained:
    """A run of any study whose tokens are the pixels or patches of images that can be shown in their own colours."""

    def check(experiment: Experiment, suits: bool) -> None:
        if not suits:
            raise InputError(f"RUN_FOLDER: {folder} is a run of {type(experiment).__name__}, which has no attention "
                             "over the pixels or patches of images; name one of a classifier, of MAE or of depth")

    run = load(folder, "RUN_FOLDER", lambda experiment, data: check(
        experiment, not experiment.masked and hasattr(data, "mean") and hasattr(data, "std")))
    net = run.experiment.backbone(run.net)
    check(run.experiment, isinstance(net, VisionTransformer))
    if net.tokens == 1:
        raise InputError(f"RUN_FOLDER: the model of {folder} has one token, which has nothing to look at; name one of "
                         "smaller patches")
    return run


def _pairs(option: str, words: Sequence[str], whose: str, counts: Mapping[str, int]) -> list[tuple[int, int]]:
    """Pairs of numbers that were given to an option.

    Args:
        counts: of what the two numbers count, and how many of it `whose` has.
    """
    pairs = []
    for word in words:
        if not re.fullmatch(r"\d+,\d+", word):
            raise InputError(f"{option} {word}: give {','.join(counts).upper()}, counted from 0, as in {option} 7,2")
        first, second = map(int, word.split(","))
        if any(number >= count for number, count in zip((first, second), counts.values(), strict=True)):
            ranges = " and ".join(f"{name}s 0 to {count - 1}" for name, count in counts.items())
            raise InputError(f"{option} {word}: {whose} has {ranges}")
        pairs.append((first, second))
    return pairs


def by_thirds(values: Tensor) -> dict[str, float]:
    """Means over the heads and layers of each third, of (layers, heads); a third without layers has none."""
    thirds = {name: list(layers_of(third, len(values))) for third, name in enumerate(GROUPS)}
    return {name: float(values[layers].mean()) for name, layers in thirds.items() if layers}


def print_measures(name: str, measures: Measures) -> None:
    """Means over the heads and layers of each third."""
    table = Table(escape(name), *GROUPS, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for measure, (label, _) in MEASURES.items():
        thirds = by_thirds(getattr(measures, measure))
        table.add_row(label, *(f"{thirds[third]:.3f}" if third in thirds else "-" for third in GROUPS))
    Console().print(table)


def means(measures: Measures) -> dict[str, float]:
    """By measure and third, as distance_early."""
    return {f"{measure}_{third}": mean for measure, values in measures._asdict().items()
            for third, mean in by_thirds(values).items()}


def names_of(folders: Sequence[Path]) -> list[str]:
    """Their names, with the study's in front where two are the same, and as they were typed where that is no help."""
    paths = [folder.resolve() for folder in folders]
    for names in ([path.name for path in paths], [f"{path.parent.name}/{path.name}" for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def main(arguments: list[str]) -> int:
    parser = Parser("python -m common.attention", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="of a classifier, MAE or depth")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images to look at; default: the validation split")
    parser.add_argument("--count", type=int, default=256, help="of images, evenly spaced over all there are (256)")
    parser.add_argument("--shows", choices=[*MEASURES, "maps"], default="distance", help="what the figure shows: a "
                        "measure, or maps over four of the images, evenly spaced too (distance)")
    parser.add_argument("--map", action="append", metavar="HEAD,LAYER", help="whose maps are shown, counted from 0; "
                        "repeatable; default: head 0 of the first three layers")
    parser.add_argument("--pixel", action="append", metavar="ROW,COLUMN", help="whose token is the query of the maps, "
                        "in the image as the model sees it, counted from 0; repeatable; default: the middle")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="PNG, PDF or SVG; default: figures/attention.png "
                        "of the run that is named first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all measures by run, layer and head")
    parser.add_argument("--measures", type=Path, metavar="FILE", help="means of the measures over each third of the "
                        "layers, by run folder, as JSON for common.paper")
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise InputError(f"--count {options.count}: give 1 or more")
    figure = options.figure or options.folders[0] / "figures" / "attention.png"
    check_file(figure)
    quieten()
    seen, titles, pictured = {}, [], None
    names = dict(zip(options.folders, names_of(options.folders), strict=True))
    for folder, name in names.items():
        run = _load(folder)
        pictured = pictured or run.data.dataset
        if options.shows == "maps" and not options.images and run.data.dataset != pictured:
            raise InputError(f"RUN_FOLDER: {folder} was trained on {run.data.dataset}, and those before it on "
                             f"{pictured}; name the pictures to look at as --images")
        net = run.experiment.backbone(run.net)
        pairs = _pairs("--map", options.map or [f"0,{layer}" for layer in range(min(3, net.depth))], "the model",
                       {"head": net.heads, "layer": net.depth})
        pixels = _pairs("--pixel", options.pixel or [], "an image as the model sees it",
                        dict(zip(("row", "column"), net.image_size, strict=True)))
        seen[name] = examine(run, options.images, options.count, pairs, pixels, name)
        of_pixels = [f"\npixel {row},{column}" for row, column in pixels] or [""]
        titles += [f"{name}\nhead {head}, layer {layer}{of}" for head, layer in pairs for of in of_pixels]
        print_measures(name, seen[name].measures)
    if options.shows == "maps":
        maps, queries = ([each for one in seen.values() for each in getattr(one, key)] for key in ("maps", "queries"))
        save(over_images(next(iter(seen.values())).images, maps, queries, titles), figure)
    else:
        tables = {name: getattr(each.measures, options.shows) for name, each in seen.items()}
        save(by_layer_and_head(tables, MEASURES[options.shows][1]), figure)
    if options.json:
        numbers = {name: {key: value.tolist() for key, value in each.measures._asdict().items()}
                   for name, each in seen.items()}
        write(options.json, json.dumps(numbers, indent=1))
    if options.measures:
        numbers = {str(folder): means(seen[name].measures) for folder, name in names.items()}
        write(options.measures, json.dumps(numbers, indent=1))
    return 0


if __name__ == "__main__":
    run_command(main)

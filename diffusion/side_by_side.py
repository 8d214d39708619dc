"""python -m diffusion.side_by_side RUN_FOLDER RUN_FOLDER --figure FILE: samples of trained models below each other, on
the same noise and of the same classes (the paper's figure 3). Of runs that differ in seed alone the first is drawn.

Options of `predict`, such as --model.predict.guidance 4, go to each of them; the samples stay in the run folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.advice import quieten
from common.command import Parser, run_command
from common.errors import InputError
from common.figure import check_file, save
from common.runs import read_run

if TYPE_CHECKING:
    from diffusion.generation import Generation


def shape_of(folder: Path) -> str:
    """The latents and the images that the model of a run folder generates, height x width x channels each.

    Raises:
        InputError: no run folder of this kind.
    """
    recipe = read_run(folder).results.get("recipe", {})
    if "latent" not in recipe:
        raise InputError(f"{folder}: not the run folder of a trained model that generates images")
    return f"{recipe['latent']} for images of {recipe['image']}"


def sampled(folder: Path, samples: int, overrides: list[str]) -> Generation:
    """The model of a run folder, once its samples are there."""
    from common.training.cli import StudyCLI

    quieten()
    # A path such as runs/diffusion/NAME, which is how the command line finds it again.
    place = folder.resolve()
    return StudyCLI("diffusion", [
        "predict", "--config", str(folder / "config.yaml"), "--runs", str(place.parent.parent), "--run_name",
        place.name, "--trainer.devices", "1", "--model.predict.samples", str(samples), *overrides,
    ]).model  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = Parser("python -m diffusion.side_by_side", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="of trained models")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="of each model; default: 8")
    options, overrides = parser.parse_known_args(arguments)
    check_file(options.figure)
    import torch

    from diffusion.pictures import grid

    shapes = {folder: shape_of(folder) for folder in options.folders}
    for folder, shape in shapes.items():
        if shape != (first := shapes[options.folders[0]]):
            raise InputError(f"{folder}: generates latents of {shape}, and {options.folders[0]} of {first}: their "
                             "noise is not the same")
    arms: dict[str, Path] = {}
    for folder in shapes:  # of an arm with several seeds the first
        arms.setdefault(read_run(folder).arm, folder)
    models = {folder: sampled(folder, options.samples, overrides) for folder in arms.values()}
    first = models[options.folders[0]]
    rows = [model.folder.read(0, options.samples, model.trainer.datamodule.channels) for model in models.values()]
    names = first.names_of(first.labels)
    title = f"guidance {first.sampler.guidance:g}, {first.sampler.solver} in {first.sampler.steps} steps"
    save(grid(torch.cat(rows), names, title, options.samples, [folder.name for folder in models]), options.figure)
    return 0


if __name__ == "__main__":
    run_command(main)

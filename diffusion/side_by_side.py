"""python -m diffusion.side_by_side RUN_FOLDER RUN_FOLDER --figure FILE: samples of trained models below each other, on
the same noise and of the same classes (the paper's figure 3).

Options of `predict`, such as --model.predict.guidance 4, go to each of them; the samples stay in the run folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import run_command
from common.errors import InputError

if TYPE_CHECKING:
    from diffusion.generation import Generation


def sampled(folder: Path, samples: int, overrides: list[str]) -> Generation:
    """The model of a run folder, once its samples are there."""
    from common.training.cli import StudyCLI, quieten  # costs seconds, which `--help` need not wait for
    from diffusion.generation import Generation

    config = folder / "config.yaml"
    if not config.is_file():
        raise InputError(f"{folder}: not a run folder, for it holds no config.yaml")
    quieten()
    # A path such as runs/diffusion/NAME, which is how the command line finds it again.
    place = folder.resolve()
    cli = StudyCLI("diffusion", ["predict", "--config", str(config), "--runs", str(place.parent.parent), "--run_name",
                                 place.name, "--trainer.devices", "1", "--model.predict.samples", str(samples),
                                 *overrides])  # fmt: skip
    if not isinstance(cli.model, Generation):
        raise InputError(f"{folder}: a run of {type(cli.model).__name__}, which generates no images")
    return cli.model


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m diffusion.side_by_side", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="of trained models")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="a .png, .pdf or .svg")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="of each model; default: 8")
    options, overrides = parser.parse_known_args(arguments)
    if options.figure.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--figure {options.figure}: name a file that ends in .png, .pdf or .svg")
    import torch

    from diffusion.pictures import grid

    models = {folder: sampled(folder, options.samples, overrides) for folder in options.folders}
    first = next(iter(models.values()))
    for folder, model in models.items():
        ours, theirs = ((net.channels, *net.input_size) for net in (model.net, first.net))
        if ours != theirs:
            raise InputError(f"{folder}: generates latents of {ours}, and {options.folders[0]} of {theirs} (channels, "
                             "height, width): their noise is not the same")
    rows = [model.folder.read(0, options.samples, model.trainer.datamodule.channels) for model in models.values()]
    names = first.names_of(first.labels)
    title = f"guidance {first.sampler.guidance:g}, {first.sampler.solver} in {first.sampler.steps} steps"
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(rows), names, title, options.samples, [folder.name for folder in models]).savefig(options.figure)
    print(f"written: {options.figure}")
    return 0


if __name__ == "__main__":
    run_command(main)

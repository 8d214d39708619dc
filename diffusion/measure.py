"""python -m diffusion.measure FILE --config diffusion/configs/NAME.yaml --data.autoencoder SOURCE: a published
autoencoder with scale and shift of its latents, which --data.autoencoder FILE then names.

Published VQ models come without, and a diffusion model wants latents of unit variance. They are measured on training
images of the config, and stored beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from common.command import Parser, run_command
from common.training.checkpoints import AtomicCheckpointIO


def main(arguments: list[str]) -> int:
    from diffusion.latents import images_of  # costs seconds, which `--help` need not wait for
    from diffusion.vqgan import training_images

    parser = Parser("python -m diffusion.measure", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="where the measured autoencoder goes")
    parser.add_argument("--config", required=True, metavar="FILE", help="of the training that will use it")
    options, overrides = parser.parse_known_args(arguments)
    data, _ = images_of(["--config", options.config, *overrides])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.trainer = SimpleNamespace(training=True, predicting=False, seed=0)
    autoencoder = data.load_autoencoder().to(device)
    data.sets["train"] = data.load("train")
    autoencoder.measure(autoencoder.moments(images) for images in training_images(data, device))
    content = {"autoencoder": autoencoder.config, "state_dict": autoencoder.state_dict()}
    AtomicCheckpointIO().save_checkpoint(content, options.file)
    shift = ", ".join(f"{value:.4f}" for value in autoencoder.shift.flatten().tolist())
    print(f"scale {autoencoder.scale:.4f}, shift {shift}\nwritten: {options.file}")
    return 0


if __name__ == "__main__":
    run_command(main)

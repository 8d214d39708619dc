"""Two steps of every arm of every table and figure."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked import ROOT
from small import TWO_STEPS

from common.paper.exhibits import Start, read_exhibits
from diffusion.autoencoder import Autoencoder

ARMS = {start.identity: (f"{exhibit.id} {scale.name} {start.arm.name}", start) for exhibit in read_exhibits().values()
        for scale in exhibit.scales.values() for start in scale.starts(1)}


@pytest.mark.soak
@pytest.mark.parametrize("start", [pytest.param(start, id=name) for name, start in ARMS.values()])
def test_every_arm_trains_two_steps(start: Start, root: Path, runs: Path, command: Callable) -> None:
    """With all that it overrides, after the arms that it starts from; but of one narrow block."""

    trained: dict[tuple, Path] = {}
    net, autoencoder = Autoencoder(base=32, codebook_size=64), runs / "vq-f8.ckpt"  # in place of the published one
    torch.save({"autoencoder": net.config, "state_dict": net.state_dict()}, autoencoder)

    def train(start: Start) -> Path:
        if start.identity in trained:
            return trained[start.identity]
        config, overrides = ROOT / start.arm.config, dict(start.arm.overrides)
        overrides |= {option: train(source) for option, source in start.sources.items()}
        folder = runs / "runs" / start.arm.study / f"{config.stem}-{len(list(runs.glob('runs/*/*')))}"
        small = ["--trainer.max_epochs", "2" if "continue_from" in overrides else "1"]
        if not config.stem.startswith("autoencoder"):
            small += ["--model.depth", "1", "--model.width", "48", "--model.heads", "3"]
        if folder.parent.name == "mae" and "_" not in config.stem:
            small += ["--model.decoder_depth", "1", "--model.decoder_width", "48", "--model.decoder_heads", "3"]
        if config.stem in ("shapes", "autoencoder_shapes", "rooms"):
            small += ["--data.source.train", "16"]
        if start.arm.study == "diffusion":
            small += ["--model.picture_epochs", "0"]
        if config.stem == "imagenet256":
            small += ["--data.autoencoder", autoencoder]
        given = [word for key, value in overrides.items()
                 for word in (f"--{key}", value if isinstance(value, str | Path) else json.dumps(value))]
        options = ["--run_name", folder.name, "--data.root", root, *given, *TWO_STEPS, *small]
        if start.arm.prepare:
            module, *words = start.arm.prepare
            assert import_module(module).main([*words, "--config", str(config), *map(str, options)]) == 0
        outcome = command("fit", *options, config=config, small=False, study=start.arm.study)
        assert outcome.code == 0, outcome.err
        return trained.setdefault(start.identity, folder)

    results = json.loads((train(start) / "results.json").read_text())
    steps = 4 if "continue_from" in start.sources else 2
    assert (results["status"], results["step"]) == ("finished", steps)

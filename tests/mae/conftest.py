"""The commands of the study on a model that costs no time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).parents[2] / "mae" / "configs"
DECODER = ["--model.decoder_width", "16", "--model.decoder_depth", "1", "--model.decoder_heads", "2",
           "--model.picture_epochs", "0"]  # fmt: skip


@pytest.fixture
def mae(command: Callable) -> Callable:
    """Runs `python -m mae SUBCOMMAND --config mae/configs/CONFIG.yaml ARGS` on 4x4 patches of 2x2 pixels."""

    def run(subcommand: str, *args: Any, config: str = "digits") -> Any:
        decoder = [] if config.endswith(("_finetune", "_probe")) else DECODER
        small = ["--model.patch_size", "2", "--trainer.check_val_every_n_epoch", "1", *decoder]
        return command(subcommand, *small, *args, config=CONFIGS / f"{config}.yaml", study="mae")

    return run


@pytest.fixture
def done(mae: Callable) -> Callable[..., str]:
    """What such a command that succeeds prints."""

    def run(subcommand: str, *args: Any, config: str = "digits") -> str:
        outcome = mae(subcommand, *args, config=config)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return run

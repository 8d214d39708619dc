"""Commands and trainings in this process: a subprocess costs 5 s of imports, these less than one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: beside a busy process, more threads cost up to tenfold

import pytest
import torch
from small import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from common.data.loader import Draw, GlobalBatchData
from common.training.checkpoints import AtomicCheckpointIO
from common.training.cli import main
from common.training.events import Events
from common.training.optim import Recipe
from common.training.trainer import Trainer
from supervised import Classification

DIGITS = Path(__file__).parent.parent / "supervised" / "configs" / "digits.yaml"

class Outcome(NamedTuple):
    """What a user sees of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Outcome]:
    """Runs `python -m STUDY SUBCOMMAND --config CONFIG ARGS` on a small model, into tmp_path/runs."""
    monkeypatch.chdir(tmp_path)

    def run(
        subcommand: str, *args: Any, config: Path | str = DIGITS, small: bool = True, study: str = "supervised"
    ) -> Outcome:
        argv = [study, subcommand, "--config", config, *SMALL * small, *args]
        monkeypatch.setattr("sys.argv", [str(argument) for argument in argv])
        code = 0
        try:
            main(study)
        except SystemExit as leaving:
            code = leaving.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


class Noise(Dataset):
    """Random pictures of 4x4 pixels in three classes."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(images)
        self.images = torch.randn(images, 1, 4, 4, generator=generator)
        self.labels = torch.randint(3, (images,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[Draw]) -> dict[str, torch.Tensor]:
        epoch, index, place = torch.tensor(draws).T
        image, label = self.images[index], self.labels[index]
        return {"image": image, "label": label, "epoch": epoch, "index": index, "place": place}


class NoiseData(GlobalBatchData):
    dataset, image_size, channels, class_names = "noise", (4, 4), 1, ["a", "b", "c"]

    def __init__(self, images: int, **options: Any) -> None:
        super().__init__(**options)
        self.sets = {"train": Noise(images), "val": Noise(11), "test": Noise(13)}


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trainer]:
    """Trains a tiny classifier on noise and returns the Trainer, which holds the rest."""

    def run(
        *callbacks: Any,
        epochs: int = 2,
        images: int = 44,
        batch_size: int = 8,
        batch_per_device: int = 8,
        optim: dict[str, Any] | None = None,
        ckpt_path: Path | None = None,
        folder: str = "run",
        log_every_n_steps: int = 1,
        check_val_every_n_epoch: int = 1,
        **model: Any,
    ) -> Trainer:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=list(callbacks),
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(tmp_path / folder),
            logger=Events(tmp_path / folder),
            log_every_n_steps=log_every_n_steps,
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            use_distributed_sampler=False,
        )
        vit = {"size": "nano", "patch_size": 2, "width": 8, "depth": 2, "heads": 2, **model}
        module = Classification(Recipe(**{"lr": 0.01, "warmup_epochs": 1, **(optim or {})}), **vit)
        data = NoiseData(images, batch_size=batch_size, batch_per_device=batch_per_device)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return trainer

    return run


@pytest.fixture
def scalars() -> Callable[[Path], dict[str, list[tuple[int, float]]]]:
    """Reads the curves of a run folder back: tag -> [(step, value)] in the order of TensorBoard."""

    def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read

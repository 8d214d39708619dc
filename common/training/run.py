"""The run folder: its name, what lies in it, and whether a command may go on there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from common.command import one_line
from common.errors import InputError
from common.files import read_json, write_atomically
from common.identity import afterwards, config_hash, covered, differing, flatten
from common.runs import changed_source
from common.training.curves import Curves
from common.training.events import Events
from common.training.recipe import effective_recipe, print_recipe
from common.training.scores import print_scores

# The same in every study, since TensorBoard takes the columns of HPARAMS from one run's summary.
HEADLINES = (
    "val/acc1", "val/acc5", "val/rmse", "val/rae", "val/loss", "test/acc1", "test/acc5", "test/rmse", "test/rae",
    "test/fid", "test/sfid", "test/inception_score", "test/precision", "test/recall",
)
HPARAMS = ("study", "dataset", "size", "patch_size", "position", "pool", "lr", "batch_size", "epochs", "seed")


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose covered values differ, with both values."""
    return differing(covered(one), covered(other))


def default_name(config_name: str, config: dict[str, Any], plain: dict[str, Any]) -> str:
    """CONFIG-SIZE-pPATCH-sSEED, and a short hash of the further overrides of `plain`, the config without any."""
    flat = flatten(config)
    named = {"model.size": "{}", "model.patch_size": "p{}", "seed_everything": "s{}"}
    parts = [config_name, *(form.format(flat[key]) for key, form in named.items() if flat.get(key) is not None)]
    found = differences(config, plain)
    if config.get("copy_of"):
        found |= differing(afterwards(config), afterwards(plain))
    further = {key: values[0] for key, values in found.items() if key not in named}
    if further:
        parts.append(hashlib.sha256(json.dumps(further, sort_keys=True).encode()).hexdigest()[:6])
    return "-".join(parts)


def refuse_another_config(folder: Path, config: dict[str, Any]) -> None:
    saved = folder / "config.yaml"
    if not saved.is_file():
        return
    found = differences(read_config(saved), config)
    if found:
        keys = "; ".join(f"{key}: {old} there, {new} here" for key, (old, new) in found.items())
        source = read_config(saved).get("copy_of")
        again = f"repeat --copy_of {source}, " if source and "copy_of" in found else ""
        raise InputError(f"{folder} holds a run of another config ({keys}); {again}choose another --run_name, "
                         "or discard that run with --overwrite")


def refuse_another_axis(folder: Path, x_axis: str) -> None:
    """One curve over steps and images would be none."""
    saved = folder / "config.yaml"
    if saved.is_file() and (there := read_config(saved).get("x_axis", "step")) != x_axis:
        raise InputError(f"--x_axis: {x_axis}, but the curves in {folder} are over {there}; give --x_axis {there}, or "
                         "train it anew with --overwrite")


def refuse_changed_source(folder: Path, results: dict[str, Any]) -> None:
    """A run is of no use any more where the run whose weights it started from has been trained otherwise since."""
    if source := changed_source(results):
        raise InputError(f"{folder} started from weights that are no longer in {source}, which was trained anew; train "
                         "it anew too, with --overwrite, or choose another --run_name")


def own_results(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a run of this config has left in its folder so far; {} where there is nothing yet.

    Raises:
        InputError: the folder is another run's, or of no use any more.
    """
    refuse_another_config(folder, config)
    refuse_another_axis(folder, config["x_axis"])
    results = read_results(folder)
    refuse_changed_source(folder, results)
    return results


def restarted(folder: Path) -> bool:
    """Whether Slurm has started this job again, and the run in this folder is that of its earlier starts."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return False
    return read_results(folder).get("job") == os.environ["SLURM_JOB_ID"]


def refuse_unwritable(folder: Path) -> None:
    """Before the data are read, and without leaving an empty folder behind."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--runs: {folder} cannot be written, for {place} is "
                         f"{'read-only' if place.is_dir() else 'a file'}; name another folder")


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a mapping of keys to values")
    return config


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run folder; {} where there is none yet."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    return read_json(path, "remove it, it is written again when the run goes on")


def discard(folder: Path) -> None:
    """Removes what a run left: the files of the contract, and nothing that the user put there."""
    for name in ("config.yaml", "hparams.yaml", "results.json", "predictions.csv"):
        (folder / name).unlink(missing_ok=True)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    for name in ("checkpoints", "figures", "predictions", "samples", "stacks"):
        place = folder / name
        if place.is_symlink():
            place.unlink()  # and not what it points to
        elif place.exists():
            shutil.rmtree(place)


def log_hyperparameters(events: Events, results: dict[str, Any]) -> None:
    """A run's row of HPARAMS."""
    hparams = {name: results.get(name) for name in HPARAMS}
    headlines = dict.fromkeys(HEADLINES, math.nan)
    events.log_hyperparams({k: "none" if v is None else v for k, v in hparams.items()}, headlines)


class RunFolder(L.Callback):
    """Keeps config.yaml, results.json and HPARAMS of a run.

    Args:
        study: whose run it is.
        folder: runs/STUDY/RUN_NAME.
        config: the resolved config, as it will be replayed.
        curves: whose last values go into the results.
        overwrite: discard what an earlier run left, as soon as training starts.
        check: called before results are written in training; raises where the folder is another's by now.
    """

    def __init__(
        self, study: str, folder: Path, config: dict[str, Any], curves: Curves, overwrite: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.overwrite, self.check = overwrite, check
        self.study, self.folder, self.config, self.curves = study, folder, config, curves
        self.results: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.initialised: dict[str, Any] = {}  # the report of init_from, whenever that was
        self.seconds = 0.0
        self._config_written = (folder / "config.yaml").exists()
        self._clock = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + time.perf_counter() - self._clock
        return {"metrics": self.metrics | self.curves.values, "seconds": seconds, "init_from": self.initialised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics, self.seconds = dict(state["metrics"]), state["seconds"]
        self.initialised = state.get("init_from", {})

    # Training

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._clock = time.perf_counter()
        self.initialised = module.initialised or self.initialised
        if not trainer.is_global_zero:
            return
        if self.overwrite:
            if trainer.logger:
                trainer.logger.experiment.close()  # its file goes too; the next point opens another
            discard(self.folder)
            self._config_written = False
        recipe = effective_recipe(trainer, module, trainer.datamodule)
        print(f"run folder: {self.folder}")
        print_recipe(recipe)
        self.results = {"recipe": recipe, **self._identity(trainer, module)}
        if trainer.global_step == 0 or not self._config_written:  # the second: continued from another run
            log_hyperparameters(trainer.logger, self.results)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        # Not before the first batch went through: a start that failed must not block the corrected command.
        if trainer.is_global_zero and not self._config_written:
            self._config_written = True
            write_atomically(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            self._write(trainer, "running")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._collect(trainer, module)
        else:
            self._amend(trainer, module, "val", whole=trainer.num_val_batches == [len(trainer.val_dataloaders)])

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready < trainer.num_training_batches:
            # Before it is saved: Lightning counts the epoch as whole.
            raise InputError("trainer.callbacks: one of them has stopped the training within an epoch, at step "
                             f"{trainer.global_step}; the last checkpoint is kept. Let it stop at an epoch's end, or "
                             "send the signal of --requeue_signal, after which all is saved")
        self._write(trainer, "running", epoch=trainer.current_epoch + 1)  # Lightning counts it after this hook

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not self.results:  # killed between its last checkpoint and here
            self.results = {"recipe": effective_recipe(trainer, module, trainer.datamodule),
                            **self._identity(trainer, module)}
        self._write(trainer, "finished" if trainer.finished else "running")
        score = self.metrics.get(f"val/{module.headline}")
        if trainer.is_global_zero and trainer.finished:
            print(f"finished: {self.folder}" + ("" if score is None else f", val/{module.headline} {score:.4g}"))

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception) and trainer.global_rank and trainer.fit_loop.epoch_progress.total.started:
            # Before this every rank makes the same mistake, and the first tells it; from here on a rank may be alone.
            print(f"rank {trainer.global_rank}: {one_line(exception)}", file=sys.stderr, flush=True)
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero and trainer.state.fn == "fit":
            saved = "goes on from the last checkpoint" if trainer.ckpt_path or any(self.folder.glob("checkpoints/*")) \
                else "begins anew, for no checkpoint was saved"
            print(f"\ninterrupted at step {trainer.global_step}; the same command {saved}", file=sys.stderr, flush=True)
        if trainer.state.fn == "fit" and not self._config_written:
            self._leave_nothing(trainer)
        elif self.results and isinstance(exception, Exception):
            self._write(trainer, "failed", error=f"{type(exception).__name__}: {exception}".splitlines()[0])

    def _leave_nothing(self, trainer: L.Trainer) -> None:
        """A start that failed before its first batch is no run: without this it would stand in every comparison."""
        if trainer.is_global_zero and trainer.logger and self.folder.is_dir():
            trainer.logger.finalize("failed")  # `experiment` would open one, perhaps before there are data
            for events in self.folder.glob("events.out.tfevents.*"):
                events.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    # Evaluation of a trained run: its metrics join those of the training

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._amend(trainer, module, "test", whole=trainer.num_test_batches == [len(trainer.test_dataloaders)])

    def _amend(self, trainer: L.Trainer, module: L.LightningModule, split: str, whole: bool) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        judged = module.judged
        images = f"{len(data.sets[split]):,} {judged}" if whole else f"not all {judged}, so results.json stays as it is"
        weights = module.init_from or f"{self.folder} after {module.trained_steps:,} steps"
        print(f"{weights} on {data.dataset}, {split}: {images}")
        print_scores({tag: float(value) for tag, value in trainer.callback_metrics.items() if tag != "step"})
        if whole and not module.init_from:  # weights that were trained elsewhere are no run
            results = read_results(self.folder)
            metrics = results.get("metrics", {})
            if module.record:  # of these scores alone
                metrics = {tag: value for tag, value in metrics.items() if not tag.startswith(f"{split}/")}
                results["evaluation"] = module.record
            results["metrics"] = metrics | _finite(trainer.callback_metrics)
            write_atomically(self.folder / "results.json", json.dumps(results, indent=2))

    def _collect(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.metrics |= _finite(trainer.callback_metrics)
        headline = f"val/{module.headline}"
        best, value = self.metrics.get(f"best/{headline}"), self.metrics.get(headline)
        if value is not None and (best is None or (value > best if module.higher_is_better else value < best)):
            self.metrics |= {f"best/{tag}": v for tag, v in self.metrics.items() if tag.startswith("val")}
            self.metrics["best/epoch"] = trainer.current_epoch + 1

    def _identity(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        flat, data = flatten(self.config), trainer.datamodule
        return {
            "study": self.study,
            "run_name": self.folder.name,
            "config_hash": config_hash(self.config),
            "dataset": data.dataset,
            **{name: flat.get(f"model.{name}") for name in ("size", "patch_size", "position", "pool")},
            "lr": module.optim.peak_lr(data.global_batch),
            "batch_size": data.global_batch,
            "epochs": trainer.max_epochs,
            "seed": trainer.seed,
            "headline": f"val/{module.headline}",
            "higher_is_better": module.higher_is_better,
            "parameters": sum(p.numel() for p in module.net.parameters()),
            "x_axis": flat.get("x_axis", "step"),
            "weights": "raw" if module.optim.ema is None else "ema",
            "versions": {name: version(name) for name in ("torch", "lightning", "timm", "torchmetrics")}
            | {"python": platform.python_version()},
            "hardware": hardware(trainer),
            "commit": commit(),
            **({"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}),
            **({"init_from": self.initialised} if self.initialised else {}),
        }

    def _write(self, trainer: L.Trainer, status: str, **more: Any) -> None:
        if not trainer.is_global_zero or not self._config_written:
            return
        self.check()
        step = trainer.global_step
        results = {
            **self.results,
            "status": status,
            "metrics": {tag: v for tag, v in (self.metrics | self.curves.values).items() if math.isfinite(v)},
            "epoch": trainer.current_epoch,
            "step": step,
            "images_seen": step * self.results.get("batch_size", 0),
            "train_seconds": round(self.seconds + time.perf_counter() - self._clock, 1),
            **more,
        }
        write_atomically(self.folder / "results.json", json.dumps(results, indent=2))


def _finite(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {tag: float(value) for tag, value in metrics.items() if math.isfinite(value) and tag != "step"}


def hardware(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {os.cpu_count()} cores"
    return f"{trainer.world_size} x {name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of the code, with `+` where it was changed; `unknown` outside a git checkout."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return name.stdout.strip() + "+" * bool(changed.stdout) if name.returncode == 0 else "unknown"

"""The command line of all studies: python -m STUDY fit|validate|test|predict|check --config FILE [--key value ...]"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from common.advice import quieten
from common.command import run_command
from common.data.loader import GlobalBatchData, end_loaders
from common.device import accelerator
from common.errors import InputError
from common.identity import flatten
from common.lock import RunLock
from common.parallel import strategies
from common.training import run
from common.training.checkpoints import AtomicCheckpointIO, Checkpoints, newest_readable, read
from common.training.copies import copy
from common.training.curves import Curves
from common.training.events import Events
from common.training.initialisation import REQUIRED, check_source
from common.training.messages import class_help, explain, given_configs, with_extended
from common.training.module import Experiment
from common.training.nonfinite import SkipNonFinite
from common.training.options import OPTIONS
from common.training.preflight import check_devices, check_tasks
from common.training.progress import Progress
from common.training.requeue import STOPPED, Requeue
from common.training.trainer import Trainer, refuse_options
from common.training.watchdog import Watchdog

EVALUATIONS = ("validate", "test", "predict")
SUBCOMMANDS = ("fit", *EVALUATIONS, "check")


class Parser(LightningArgumentParser):
    """A parser whose errors are one line that names the key, the file and the nearest right key."""

    def __init__(self, *args: Any, given: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # --run_nam must not pass for --run_name
        self.given, self.folder = given or [], Path.cwd()

    def parse_args(self, args: list[str] | None = None, *more: Any, **options: Any) -> Namespace:
        if not self.exit_on_error and args:  # a parser inside the parser is handed a typed null as Python prints it
            args = [re.sub("=None$", "=null", argument) for argument in args]
        return super().parse_args(args, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> None:
        if not self.exit_on_error:  # a parser inside the parser, for the arguments of a class
            super().error(message, ex)
        with contextlib.chdir(self.folder):  # jsonargparse reads a config in the config's own folder
            raise InputError(explain(message, ex, self.given)) from ex


class StudyCLI(LightningCLI):
    """LightningCLI with the contract of the run folder.

    Args:
        study: the package whose experiment runs.
        args: command line; `sys.argv` where left out.
        run: False parses and stops, for `run_folder`.
    """

    def __init__(self, study: str, args: list[str] | None = None, run: bool = True) -> None:
        self.study, self.execute = study, run
        self.given = sys.argv[1:] if args is None else args
        self.closing = contextlib.ExitStack()  # what the command holds while it runs
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs; no effect on CPU
        with self.closing:
            self.closing.push(self._leave_alone)
            if run:
                self.closing.callback(end_loaders)
            self._run()

    def _run(self) -> None:
        super().__init__(
            Experiment,
            GlobalBatchData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "enable_autolog_hparams": False,
                "use_distributed_sampler": False,  # the orders of common.data.loader know the ranks
            },
            save_config_callback=None,  # it refuses to write twice, and so blocks a requeued job
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=Parser,
            args=with_extended(self.given),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        description = f"{importlib.import_module(self.study).__doc__} --debug shows the traceback of an error."
        own = {"prog": f"python -m {self.study}", "description": description, "given": self.given}
        return super().init_parser(**(own | kwargs))

    def subcommands(self) -> dict[str, set[str]]:
        fixed = {"model", "datamodule", "train_dataloaders", "val_dataloaders", "dataloaders", "ckpt_path",
                 "weights_only", "verbose", "return_predictions"}
        asked = [word for word in self.given[:1] if word in SUBCOMMANDS]  # each takes a tenth of a second to prepare
        return {name: fixed for name in asked or SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        for name, (type_, default, text) in OPTIONS.items():
            kind = {"action": "store_true"} if type_ is bool else {"type": type_, "default": default}
            parser.add_argument(f"--{name}", help=text, **kind)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:  # Lightning would draw one of its own for true
            raise InputError(f"seed_everything: {seed} is not between 0 and 4294967295")

    def _parse_ckpt_path(self) -> None:
        """Nothing: what the user types beats what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        self._refuse_another_study()
        self.options = self.config[self.subcommand]
        if self.options.init_from == REQUIRED and self.options.run_name and self.subcommand in EVALUATIONS:
            saved = Path(self.options.runs) / self.study / self.options.run_name / "config.yaml"
            if saved.is_file():  # the run knows what it started from
                self.options.init_from = run.read_config(saved).get("init_from")
        for name in ("init_from", "continue_from", "copy_of"):
            if self.options[name] not in (None, "", REQUIRED):
                self.options[name] = _one_spelling(self.options[name])
        self.resolved = self._resolved(self.config)
        name = self.options.run_name or self._default_name()
        if name != Path(name).name or name == "..":
            raise InputError(f"--run_name: {name} is not the name of a folder; --runs says where it lies")
        self.folder = Path(self.options.runs) / self.study / name
        self.resolved["run_name"] = name
        self.lock = RunLock(self.folder)
        self.checkpoint: Path | None = None
        if self.execute:
            run.refuse_unwritable(self.folder)
            getattr(self, f"_before_{self.subcommand}", self._before_evaluation)()

    def instantiate_classes(self) -> None:
        if self.execute:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if self.execute:
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Lightning calls this after `fit`."""
        trainer = self.trainer
        if not trainer.finished:
            rank_zero_only(print)(f"not finished: {self.folder}, after {trainer.current_epoch} of {trainer.max_epochs} "
                                  "epochs: a callback has ended the training", file=sys.stderr)
            raise SystemExit(1)

    def _resolved(self, config: Namespace) -> dict[str, Any]:
        """The whole config as plain values; `run_name` and what is no part of a replay are left to the caller."""
        subcommand = config["subcommand"]
        plain = yaml.safe_load(self.parser.dump(config, skip_unset=False))[subcommand]
        no_part = ("config", "extends", "overwrite", "runs")
        return {key: value for key, value in plain.items() if key not in no_part}

    def _default_name(self) -> str:
        files = given_configs(self.given)
        if not files:
            raise InputError("--config: name a config file, as in --config "
                             f"{self.study}/configs/digits.yaml; `ls {self.study}/configs` lists them")
        alone = [word for file in files for word in ("--config", str(file))]
        plain = self._resolved(self.parser.parse_args(with_extended([self.subcommand, *alone])))
        return run.default_name("+".join(file.stem for file in files), self.resolved, plain)

    def _refuse_another_study(self) -> None:
        """A config of another study would take that study's folder names below this one's."""
        packages = Path(__file__).parents[2]
        for file in given_configs(self.given):
            study = file.resolve().parent.parent
            if study.parent == packages and file.resolve().parent.name == "configs" and study.name != self.study:
                raise InputError(f"--config: {file} is a config of another study; run it with python -m {study.name}")

    # What may go on in this folder

    def _before_check(self) -> None:
        refuse_options(self.options.trainer)

    def _before_fit(self) -> None:
        refuse_options(self.options.trainer)
        first = rank_zero_only.rank == 0 and not self._of_another_node()
        if first:
            self.lock.acquire()
            self.closing.callback(self.lock.release)
        self.options.overwrite &= not run.restarted(self.folder)
        if self.options.copy_of is not None:
            if first:
                copy(Path(self.options.copy_of), self.folder, self.resolved, self.options.overwrite)
            raise SystemExit(0)
        if self.options.overwrite:  # what is there goes when training starts, and not for a command that fails before
            self.checkpoint = self._continued()
            self._check_source()
            return
        results = run.own_results(self.folder, self.resolved)
        if results.get("status") == "finished":
            rank_zero_only(print)(f"finished: {self.folder}, epoch {results.get('epoch')}; "
                                  "train it anew with --overwrite, or on with --continue_from")
            raise SystemExit(0)
        for leftover in (self.folder / "checkpoints").glob("*.tmp"):
            leftover.unlink(missing_ok=True)  # another rank may be quicker
        self.checkpoint = newest_readable(self.folder / "checkpoints") or self._continued()
        self._check_source()

    def _of_another_node(self) -> bool:
        """Whether this is another node's first process under Lightning's own launcher, which takes itself for rank 0
        until there is a Trainer.
        """
        several = self.options.trainer.num_nodes > 1 and _get_rank() is None
        return several and int(os.environ.get("NODE_RANK", 0)) > 0

    def _check_source(self) -> None:
        if self.checkpoint is None and self.options.init_from is not None:
            check_source(self.options.init_from)

    def _continued(self) -> Path | None:
        if not self.options.continue_from:
            return None
        source = Path(self.options.continue_from)
        if source.resolve() == self.folder.resolve():
            raise InputError(f"--continue_from: {source} is the run itself; choose another --run_name")
        checkpoint = newest_readable(source / "checkpoints")
        if checkpoint is None:
            raise InputError(f"--continue_from: {source} is not a run folder with a checkpoint")
        config = run.read_config(source / "config.yaml")
        there, here = flatten(config).get("trainer.max_epochs"), self.options.trainer.max_epochs
        if not isinstance(there, int):
            raise InputError(f"{source / 'config.yaml'}: trainer.max_epochs is {there}, no number of epochs")
        if here <= there:
            raise InputError(f"trainer.max_epochs: {here} is no more than the {there} of {source} to continue from")
        differing = run.differences(config, self.resolved)
        differing = {k: v for k, v in differing.items() if k not in ("trainer.max_epochs", "continue_from", "copy_of")}
        if differing:
            raise InputError(f"--continue_from: {source} was trained otherwise: " + "; ".join(
                f"{key}: {old} there, {new} here" for key, (old, new) in differing.items()))
        if flatten(self.resolved).get("model.optim.schedule") != "constant":
            raise InputError("--continue_from: needs model.optim.schedule=constant; a cosine has ended where the run "
                             "ended")
        return checkpoint

    def _before_evaluation(self) -> None:
        run.refuse_another_config(self.folder, self.resolved)
        self.checkpoint = newest_readable(self.folder / "checkpoints")
        if self.checkpoint and self.options.copy_of and not run.read_results(self.folder):
            raise InputError(f"{self.folder}: the copy of {self.options.copy_of} was cut off; run fit with the same "
                             "options, which makes it anew")
        if self.checkpoint is None and self.options.init_from is not None:
            self._check_source()  # published weights, as they are
        elif self.checkpoint is None:
            raise InputError(f"{self.folder}: there is no checkpoint to {self.subcommand}; run fit with the same "
                             "options, name the run with --run_name, or give weights with --init_from")

    def parts(self, asked: str = "cpu") -> tuple[Experiment, GlobalBatchData]:
        """The experiment and its data, with a Trainer that trains nothing and only tells them of itself:
        for what is computed or measured on models alone.

        Args:
            asked: the Trainer's accelerator.
        """
        made = self.parser.instantiate(self.config)[self.subcommand]
        module, data = made.model, made.data
        module.trainer = Trainer(accelerator=accelerator(asked), devices=1, barebones=True,
                                 max_epochs=self.options.trainer.max_epochs, precision=self.options.trainer.precision)
        module.trainer.datamodule = data
        data.trainer = module.trainer
        return module, data

    # Running

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if not isinstance(self.datamodule, self.model.data_class):
            raise InputError(f"data.class_path: {type(self.datamodule).__name__} does not go with "
                             f"{type(self.model).__name__}, which takes {self.model.data_class.__name__}")
        skip = self.options.nonfinite == "skip"
        curves = Curves(refuse_nonfinite=not skip)
        folder = run.RunFolder(self.study, self.folder, self.resolved, curves, self.options.overwrite, self.lock.check)
        callbacks = [curves, Progress(curves), folder, Watchdog(self.options.hang_timeout)]
        if self.subcommand == "fit":
            callbacks += [SkipNonFinite()] * skip + [self._requeue()]
        given = self._get(self.config_init, "trainer")
        own = given.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        slurm = []
        if SLURMEnvironment.detect():
            check_tasks()
            slurm = [SLURMEnvironment(auto_requeue=False)]
        ours = {"callbacks": [*callbacks, *own], "plugins": [AtomicCheckpointIO(self.lock.check), *slurm],
                "logger": self._logger(), "default_root_dir": str(self.folder), "enable_progress_bar": False,
                "accelerator": accelerator(given["accelerator"])}
        strategies.register()
        try:
            trainer = super().instantiate_trainer(**ours, **kwargs)
        except (MisconfigurationException, ValueError) as error:  # such as devices that are not there
            raise InputError(f"trainer: {error}") from error
        if slurm and self.subcommand != "check":
            check_devices(trainer.num_nodes, trainer.num_devices)
        trainer.take_over(self.options.seed_everything, self.options.hang_timeout)
        self.model.init_from = None if self.checkpoint else self.options.init_from
        on_gpu = trainer.strategy.root_device.type == "cuda"
        self.model.compiled = on_gpu if self.options.compile is None else self.options.compile
        return trainer

    def _leave_alone(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Has a rank that fails end at once, and the others with it.

        At exit Lightning takes NCCL's communicators down, for which all ranks have to come: one that fails by itself
        would hang there, unseen by srun and torchrun. And ranks that Lightning has started itself would wait for the
        first until their watchdogs bark.
        """
        if kind is None or kind is SystemExit and error.code == STOPPED:  # which all ranks do together
            return
        atexit.unregister(_destroy_dist_connection)
        trainer = getattr(self, "trainer", None)  # of a command that came so far
        if trainer is not None and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def _requeue(self) -> Requeue:
        requeue = Requeue(self.options.requeue_signal)
        requeue.listen()
        self.closing.callback(requeue.restore)
        return requeue

    def _logger(self) -> Events | bool:
        if self.subcommand in ("check", "predict") or (self.subcommand != "fit" and not self.checkpoint):
            return False
        steps = None
        if self.subcommand == "fit":
            steps = read(self.checkpoint)["global_step"] if self.checkpoint else 0
            if self.checkpoint:
                rank_zero_only(print)(f"goes on: {self.checkpoint}, after step {steps}")
        return Events(self.folder, self._batch(), steps)

    def _batch(self) -> Callable[[], int] | None:
        """The images of a step, where they are what the x axis counts."""
        if self.subcommand == "fit":
            return (lambda: self.datamodule.global_batch) if self.options.x_axis == "images" else None
        results = run.read_results(self.folder)  # an evaluation joins the curves that are there, whatever their axis
        return (lambda: results["batch_size"]) if results.get("x_axis") == "images" else None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = {"model": self.model, "datamodule": self.datamodule}
        if subcommand == "check":
            return kwargs
        kwargs |= {"ckpt_path": self.checkpoint, "weights_only": True}
        own = {"validate": {"verbose": False}, "test": {"verbose": False}, "predict": {"return_predictions": False}}
        return kwargs | own.get(subcommand, {})


def _one_spelling(path: str) -> str:
    """A path as it is hashed: relative to the working directory where it lies below, without a slash at its end."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def run_folder(study: str, args: list[str]) -> Path:
    """The run folder that `python -m STUDY fit ARGS` uses."""
    return StudyCLI(study, ["fit", *args], run=False).folder


def main(study: str) -> None:
    """Runs a study's command, and leaves with its exit code."""

    def command(arguments: list[str]) -> int:
        if {"--help", "-h"} & set(arguments[1:]):
            print(class_help(arguments))
        StudyCLI(study, arguments)
        return 0

    quieten()
    run_command(command)

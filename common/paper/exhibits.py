"""The paper's tables and figures as data: what a study's paper.yaml holds, and the commands that it stands for.

    T3a:                                  # the id: table 3a
      shows: what the table or figure shows
      metric: val/acc1                    # what it is judged by; of a list the first, and all are shown
      paper:                              # what the paper states, all of it optional
        values: {T/2: 80.0}               # of an arm
        differences: {T/1 - T/2: 1.5}     # between two arms
        says: in words
        unknown: what the paper gives and we do not have
      arms:                               # name: overrides of the config, as on the command line
        T/2: {model.size: tiny, model.patch_size: 2}
        T/1: {model.size: tiny, model.patch_size: 1}
      scales:
        paper: {config: cifar100}         # configs/cifar100.yaml of the study
        demo:
          config: digits
          shows: how this scale differs from the paper's
          set: {trainer.max_epochs: 20}   # overrides of all arms; an arm's own go first
          arms: {...}                     # in place of the arms above
          seeds: 3                        # seeds 0, 1, 2; one where it is left out
          differences: {a - b: T/1 - T/2} # of this scale's own arms, and the paper's that they stand for
          metric: ...                     # in place of the one above, as are draws and prints

Four keys of an arm are no overrides:

      arms:
        scratch: {config: supervised/*}   # STUDY/NAME, * being the scale's config; this study's own where left out
        pre-training: {}
        autoencoder: {config: diffusion/autoencoder_*, seed_everything: 0}   # one run for all seeds
        fine-tuned:
          config: mae/*_finetune          # mae/configs/cifar100_finetune.yaml at scale paper
          runs: {init_from: pre-training} # options that name run folders of arms above this one, of the same seed
        guided:
          prepare: diffusion.latents FOLDER   # a short command that goes before, and is given what the training is
          data.latents: FOLDER
        unguided: {again: guided, model.predict.guidance: 1}   # a copy of an arm above, tested otherwise

An arm that others use in `runs` is a step on the way: it is trained like any other, and is not compared. Where the
metric is one of `test/`, the compared arms are tested after their training. A figure that is no curve is drawn by a
command of its own, which is given the compared arms' run folders. It measures what no run has in its folder: a metric
without a /, such as shape_bias.

      draws: diffusion.side_by_side --model.predict.guidance 4.0

A table that is generated is what such a command prints, in Markdown (`prints: common.paper.tables sizes`). What needs
no training has neither arms nor a config and a metric.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.advice import quieten
from common.errors import InputError
from common.identity import AFTERWARDS, covered, flatten

if TYPE_CHECKING:
    from common.training.cli import StudyCLI

STUDIES = ("supervised", "mae", "diffusion", "locality_ablation")
ROOT = Path(__file__).parent.parent.parent
RUNS = Path("runs")
MEASURES = "measures.json"  # what the command that draws has measured, by run folder

_KEYS = {"shows": str, "metric": object, "draws": str, "prints": str, "paper": dict, "arms": dict, "scales": dict}
_COMMANDS = ("draws", "prints")
_PAPER_KEYS = {"values": dict, "differences": dict, "says": str, "unknown": str}
_SCALE_KEYS = {"config": str, "shows": str, "metric": object, "draws": str, "prints": str, "set": dict,
               "arms": dict, "seeds": int, "differences": dict}


@dataclass(frozen=True)
class Arm:
    """A config of a study with overrides; `runs` are options that name other arms' run folders: option -> arm; `again`
    is the arm that this one is a copy of, to be tested otherwise; `prepare` is a command, module and words, that makes
    what the training reads.
    """

    name: str
    study: str
    config: Path
    overrides: Mapping[str, Any]
    runs: Mapping[str, str]
    again: str | None = None
    prepare: tuple[str, ...] = ()

    def seed(self, seed: int) -> int:
        """The one that it is trained with where others are trained with `seed`."""
        return self.overrides.get("seed_everything", seed)


@dataclass(frozen=True)
class Start:
    """One run of an exhibit: an arm with a seed, and the runs that it uses, by option.

    Args:
        judged_by: the metric that a test must leave, of a run that is tested; others are trained alone.
    """

    arm: Arm
    seed: int
    sources: Mapping[str, Start]
    judged_by: str | None = None

    @property
    def arguments(self) -> list[str]:
        """What follows `python -m STUDY fit`. With sources it takes the time of locating them."""
        options = {**self.arm.overrides, "seed_everything": self.seed}
        options |= {option: str(source.located[0]) for option, source in self.sources.items()}
        pairs = [(f"--{key}", _typed(value)) for key, value in options.items()]
        return ["--config", os.path.relpath(self.arm.config), *(word for pair in pairs for word in pair)]

    @property
    def identity(self) -> tuple:
        """Equal for runs of several exhibits that are one, as far as can be told without a parser."""
        overrides = {key: value for key, value in self.arm.overrides.items() if key != "seed_everything"}
        sources = tuple((option, source.identity) for option, source in sorted(self.sources.items()))
        return (os.path.relpath(self.arm.config, ROOT), json.dumps(overrides, sort_keys=True), self.seed, sources)

    @property
    def before(self) -> Start | None:
        """The run that this one is a copy of or goes on from, whose training is no part of its own."""
        return self.sources.get("copy_of") or self.sources.get("continue_from")

    @property
    def stages(self) -> tuple[str, ...]:
        return (*["prepare"] * bool(self.arm.prepare), "fit", *["test"] * bool(self.judged_by))

    def command(self, stage: str) -> list[str]:
        words = self.arm.prepare if stage == "prepare" else (self.arm.study, stage)
        return [sys.executable, "-m", *words, *self.arguments]

    @property
    def located(self) -> tuple[Path, dict[str, Any]]:
        """The run folder, and what results depend on in the config that belongs into it."""
        folder, config = _read(self.arm.study, tuple(self.arguments))
        return folder, covered(config)

    @property
    def sampling(self) -> dict[str, Any]:
        """What a test of a generative model samples, as its record names it."""
        options = flatten(_read(self.arm.study, tuple(self.arguments))[1])
        names = ("samples", "solver", "steps", "guidance", "guidance_channels", "seed")
        return {name: options[f"model.predict.{name}"] for name in names}

    def parsed(self) -> StudyCLI:
        """Its command line, read and not run."""
        return _parsed(self.arm.study, self.arguments)

    def shown(self, stage: str) -> str:
        return shlex.join(["python", *self.command(stage)[1:]])


def _parsed(study: str, arguments: list[str]) -> StudyCLI:
    # Importing Lightning takes seconds, and `list` in a fresh clone needs none of it.
    from common.training.cli import StudyCLI

    quieten()  # Lightning would report the seed of each look-up
    return StudyCLI(study, ["fit", *arguments], run=False)


@functools.cache
def _read(study: str, arguments: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The run folder and the config of a command; reading one takes a third of a second, and several ids share runs."""
    cli = _parsed(study, list(arguments))
    return cli.folder, cli.resolved


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Scale:
    """An exhibit at one cost: `demo` on two cores within minutes, `gpu` within half an hour, `paper` as published.

    Args:
        differences: between two of its arms, and the one that the paper states of the arms that these stand for.
    """

    name: str
    shows: str
    arms: tuple[Arm, ...]
    seeds: int
    metric: str
    columns: tuple[str, ...]
    differences: Mapping[str, str]
    draws: tuple[str, ...]
    prints: tuple[str, ...]

    @property
    def sources(self) -> set[str]:
        """The names of arms that are there for others to use."""
        return {name for arm in self.arms for name in arm.runs.values() if name != arm.again}

    def starts(self, seeds: int | None = None) -> list[Start]:
        """All runs, seed by seed, so that every arm has a first result early; what a run uses stands before it."""
        arms = {arm.name: arm for arm in self.arms}
        starts: dict[tuple[str, int], Start] = {}
        for common in range(seeds or self.seeds):
            for arm in self.arms:
                seed = arm.seed(common)
                sources = {option: starts[name, arms[name].seed(common)] for option, name in arm.runs.items()}
                tested = self.metric.startswith("test/") and arm.name not in self.sources
                starts.setdefault((arm.name, seed), Start(arm, seed, sources, self.metric if tested else None))
        return list(starts.values())

    def compared(self, seeds: int | None = None) -> list[Start]:
        return [start for start in self.starts(seeds) if start.arm.name not in self.sources]

    def drawing(self, exhibit: str, seeds: int | None = None) -> list[str]:
        """The command that draws the figure, to `figure`; it takes the time of locating the runs."""
        module, *options = self.draws
        folders = [str(start.located[0]) for start in self.compared(seeds)]
        measuring = any("/" not in metric for metric in (self.metric, *self.columns) if metric)
        return [sys.executable, "-m", module, *folders, "--figure", str(self.figure(exhibit)), *options,
                *["--measures", str(self.folder(exhibit) / MEASURES)] * measuring]

    def figure(self, exhibit: str) -> Path:
        return self.folder(exhibit) / "figure.png"

    def folder(self, exhibit: str) -> Path:
        """Where its comparison and its figure lie."""
        return RUNS / "paper" / f"{exhibit}-{self.name}"


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper."""

    id: str
    study: str
    shows: str
    metric: str
    values: Mapping[str, float]
    differences: Mapping[str, float]
    says: str
    unknown: str
    scales: Mapping[str, Scale]

    def scale(self, name: str) -> Scale:
        if name not in self.scales:
            raise InputError(f"--scale {name}: {self.id} has no such scale; it has {', '.join(self.scales)}")
        return self.scales[name]

    @cached_property
    def statements(self) -> list[str]:
        """What the paper states, line by line, with what we do not have called unknown."""
        lines = [f"{self.metric} of {arm} = {value:g}" for arm, value in self.values.items()]
        lines += [f"{self.metric}: {pair} = {value:+g}" for pair, value in self.differences.items()]
        return lines + [self.says] * bool(self.says) + [f"unknown: {self.unknown}"] * bool(self.unknown)


def read_exhibits(root: Path = ROOT) -> dict[str, Exhibit]:
    """Every exhibit of every study below `root` that has a paper.yaml, by id.

    Raises:
        InputError: names the file and the key of what is malformed.
    """
    exhibits: dict[str, Exhibit] = {}
    for study in STUDIES:
        path = Path(os.path.relpath(root / study / "paper.yaml"))
        if not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
        for name, entry in _mapping(content, f"{path}").items():
            if name in exhibits:
                raise InputError(f"{path}: {name} stands in {exhibits[name].study}/paper.yaml too")
            exhibits[name] = _exhibit(study, path, str(name), entry)
    return exhibits


def runs_of(exhibits: Iterable[Exhibit], scale: str, seeds: int | None) -> list[Start]:
    """The runs of these exhibits that have the scale, those that several share once; what a run uses stands before it.
    """
    starts: dict[tuple, Start] = {}
    for exhibit in exhibits:
        for start in exhibit.scales[scale].starts(seeds) if scale in exhibit.scales else ():
            key = start.identity
            if key not in starts or start.judged_by and not starts[key].judged_by:
                starts[key] = start
    return list(starts.values())


def _exhibit(study: str, path: Path, name: str, entry: Any) -> Exhibit:
    where = f"{path}: {name}"
    _check(entry, _KEYS, where, needed=("shows", "scales"))
    paper = entry.get("paper", {})
    _check(paper, _PAPER_KEYS, f"{where}.paper")
    metric = _metrics(entry["metric"], where)[0] if "metric" in entry else ""
    arms, judged = entry.get("arms", {}), {key: entry[key] for key in ("metric", *_COMMANDS) if key in entry}
    named = {arm for pair in paper.get("differences", {}) for arm in pair.split(" - ")} | set(paper.get("values", {}))
    if not named <= set(arms):
        raise InputError(f"{where}.paper: {', '.join(sorted(named - set(arms)))} is none of the arms {', '.join(arms)}")
    scales = {scale: _scale(study, path, name, scale, content, arms, judged, paper.get("differences", {}))
              for scale, content in entry["scales"].items()}
    return Exhibit(name, study, entry["shows"], metric, paper.get("values", {}),
                   paper.get("differences", {}), paper.get("says", ""), paper.get("unknown", ""), scales)


def _scale(
    study: str, path: Path, exhibit: str, name: str, content: Any, arms: dict, judged: dict, stated: dict
) -> Scale:
    where = f"{path}: {exhibit}.scales.{name}"
    content = _mapping(content, where, empty=True)
    given = {key: where if key in content else f"{path}: {exhibit}" for key in _COMMANDS}
    content = judged | content
    training = not set(_COMMANDS) & set(content) or arms or "arms" in content
    made_by = {key: _command(path, content[key], f"{given[key]}.{key}") if key in content else () for key in _COMMANDS}
    _check(content, _SCALE_KEYS, where, needed=("config", "metric") if training else ())
    if content.get("seeds", 1) < 1:
        raise InputError(f"{where}.seeds: {content['seeds']} is not a number of seeds, 1 or more")
    for key in ("config", "runs", "prepare"):
        if key in content.get("set", {}):
            raise InputError(f"{where}.set.{key}: {content['set'][key]} is no override; give it to each arm it is for")
    metrics = _metrics(content["metric"], where) if training else ("",)
    above = where if "arms" in content else f"{path}: {exhibit}"
    made: dict[str, Arm] = {}
    for arm, entry in content.get("arms", arms).items():
        place = f"{above}.arms.{arm}"
        own = dict(_mapping(entry, place, empty=True))
        if "again" in own:
            if not metrics[0].startswith("test/"):
                raise InputError(f"{place}.again: a copy has no other {metrics[0]}; the metric is to be one of test/")
            made[str(arm)] = _again(made, str(arm), own.pop("again"), own, place)
            continue
        given, uses, prepare = own.pop("config", None), own.pop("runs", {}), own.pop("prepare", None)
        if given is None:
            of, config = _config(path, f"{study}/*", content["config"], f"{where}.config: {content['config']}")
        else:
            of, config = _config(path, given, content["config"], f"{place}.config: {given}")
        for option, source in _mapping(uses, f"{place}.runs").items():
            _above(made, source, f"{place}.runs.{option}")
        made[str(arm)] = Arm(str(arm), of, config, {**content.get("set", {}), **own},
                             {option: str(source) for option, source in uses.items()},
                             prepare=_command(path, prepare, f"{place}.prepare") if prepare is not None else ())
    if not made and training:
        raise InputError(f"{where}: has no arms, and neither has the exhibit")
    differences = content.get("differences", {pair: pair for pair in stated if set(pair.split(" - ")) <= set(made)})
    for pair, of in differences.items():
        if not set(pair.split(" - ")) <= set(made) or of not in stated:
            raise InputError(f"{where}.differences.{pair}: {of} should be one of {', '.join(stated) or 'none'}, and "
                             f"the key ARM - ARM, of {', '.join(made)}")
    columns = metrics if training and isinstance(content["metric"], list) else ()
    return Scale(name, content.get("shows", ""), tuple(made.values()), content.get("seeds", 1), metrics[0], columns,
                 differences, **made_by)


def _again(made: Mapping[str, Arm], name: str, of: Any, overrides: dict[str, Any], where: str) -> Arm:
    source = _above(made, of, f"{where}.again")
    trained = [key for key in overrides if not key.startswith(AFTERWARDS)]
    if trained or not overrides:
        raise InputError(f"{where}.{trained[0] if trained else 'again'}: {of} is tested otherwise, not trained; give "
                         f"options that begin with {' or '.join(AFTERWARDS)}")
    own = {key: value for key, value in source.overrides.items() if key != "run_name"}
    return replace(source, name=name, overrides=own | overrides, runs={**source.runs, "copy_of": source.name},
                   again=source.name, prepare=())


def _above(made: Mapping[str, Arm], name: Any, where: str) -> Arm:
    if str(name) not in made:
        raise InputError(f"{where}: {name} is no arm above this one; there is {', '.join(made) or 'none'}")
    return made[str(name)]


def _metrics(given: Any, where: str) -> tuple[str, ...]:
    metrics = tuple(given) if isinstance(given, list) else (given,)
    if not metrics or not all(isinstance(metric, str) for metric in metrics):
        raise InputError(f"{where}.metric: {given!r} is neither a tag, such as val/acc1, nor a list of tags")
    return metrics


def _command(path: Path, given: Any, where: str) -> tuple[str, ...]:
    """A module beside the study of `path`, and its options: a mistake is not to show after hours of training."""
    if not isinstance(given, str):
        raise InputError(f"{where}: {given!r} is no command, such as diffusion.side_by_side")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise InputError(f"{where}: {given}: {error}") from error
    if not words:
        raise InputError(f"{where}: {given!r} names no module, such as diffusion.side_by_side")
    module = Path(os.path.relpath(path.parent / ".." / words[0].replace(".", "/")))
    if not module.with_suffix(".py").is_file() and not (module / "__main__.py").is_file():
        raise InputError(f"{where}: {words[0]} is no module; there is no file {module.with_suffix('.py')}")
    return tuple(words)


def _config(path: Path, given: Any, scale: str, where: str) -> tuple[str, Path]:
    """The study and the file that STUDY/NAME stands for, with `scale` in place of *, beside the study of `path`."""
    if not isinstance(given, str) or given.count("/") != 1:
        raise InputError(f"{where} is not STUDY/NAME, such as supervised/*, where * stands for the scale's config")
    study, name = given.split("/")
    config = Path(os.path.relpath(path.parent / ".." / study / "configs" / f"{name.replace('*', scale)}.yaml"))
    if not config.is_file():
        raise InputError(f"{where}; there is no file {config}")
    return study, config


def _mapping(value: Any, where: str, empty: bool = False) -> dict:
    if value is None and empty:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r} is not a mapping of keys to values")
    return value


def _check(entry: Any, keys: dict[str, type], where: str, needed: tuple[str, ...] = ()) -> None:
    for key, value in _mapping(entry, where).items():
        if key not in keys:
            raise InputError(f"{where}.{key}: unknown key; there is {', '.join(keys)}")
        if not isinstance(value, keys[key]):
            raise InputError(f"{where}.{key}: {value!r} should be {keys[key].__name__}")
    for key in needed:
        if key not in entry:
            raise InputError(f"{where}: lacks {key}")

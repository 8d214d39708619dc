"""What the command line says: help that lists a config's own keys first, and errors in one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from common.errors import InputError
from common.identity import flatten
from common.training.checkpoints import Checkpoints
from common.training.options import OPTIONS
from common.training.trainer import Trainer


def given_configs(argv: list[str]) -> list[Path]:
    """The files behind --config and -c."""
    paths = []
    for position, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name in ("--config", "-c"):
            paths.append(Path(value or next(iter(argv[position + 1 :]), "")))
    return paths


def with_extended(argv: list[str]) -> list[str]:
    """The command line with the files that its configs extend named before them: later files win."""
    expanded: list[str] = []
    for path in given_configs(argv):
        for ancestor in _lineage(path):
            expanded += ["--config", str(ancestor)]
    subcommand, rest = argv[:1], argv[1:]
    return subcommand + expanded + _without_configs(rest) if expanded else argv


def _without_configs(argv: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in ("--config", "-c"):
            skip = True
        elif not argument.startswith(("--config=", "-c=")):
            kept.append(argument)
    return kept


def _lineage(path: Path) -> list[Path]:
    """The files that `path` extends, oldest first, and itself."""
    files = [path]
    while (config := _load(files[0])) and (parent := config.get("extends")):
        parent = files[0].parent / str(parent)
        if parent.resolve() in [file.resolve() for file in files]:
            raise InputError(f"{path}: extends itself by way of {parent}")
        if not parent.is_file():
            raise InputError(f"{files[0]}: extends {parent}, which is no file")
        files.insert(0, parent)
    return files


def _load(path: Path) -> dict[str, Any]:
    """A config file; {} where it cannot be read, which the parser reports by itself.

    Raises:
        InputError: a group of keys is something else, which the parser would let pass.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(config, dict):
        return {}
    for group in ("model", "data", "trainer", "checkpoint"):
        if not isinstance(config.get(group, {}), dict):
            raise InputError(f"{group}: {config[group]} in {path} is not a mapping of keys to values")
    return config


def _files(argv: list[str]) -> list[Path]:
    return [file for path in given_configs(argv) for file in _lineage(path)]


def _classes(argv: list[str]) -> dict[str, type]:
    """The classes that the config files, and after them the command line, name for `model` and `data`."""
    classes = {}
    for group in ("model", "data"):
        named = [(name, where) for name, where in _typed_values(argv).get(group, []) if "." in str(name)]
        if named:
            name, where = named[-1]
            module, _, attribute = name.rpartition(".")
            try:
                classes[group] = getattr(importlib.import_module(module), attribute)
            except Exception as error:  # a module of one's own raises whatever is wrong with it
                raise InputError(f"{group}.class_path: {name} in {where} cannot be imported "
                                 f"({type(error).__name__}: {error})") from error
    return classes


def _class_parser(classes: dict[str, type]) -> ArgumentParser:
    parser = ArgumentParser(prog="", usage="", add_help=False)
    for group, cls in classes.items():
        parser.add_class_arguments(cls, group, fail_untyped=False)
    return parser


def class_help(argv: list[str]) -> str:
    """The keys of the model and the data that the given config names; the general help follows it."""
    classes = _classes(argv)
    if not classes:
        return "Add --config FILE to see the model's and the data's keys first.\n"
    return _class_parser(classes).format_help().removeprefix("usage: \n\n")


def _known_keys(argv: list[str]) -> set[str]:
    parser = _class_parser({**_classes(argv), "trainer": Trainer, "checkpoint": Checkpoints})
    keys = {action.dest for action in parser._actions}
    for option, named in _typed_values(argv).items():
        if f"{option}.help" in keys and (cls := _imported(named[-1][0])):
            keys.remove(f"{option}.help")
            keys |= {f"{option}.{parameter}" for parameter in inspect.signature(cls).parameters}
    return keys | {*OPTIONS, "config", "seed_everything", "model", "data", "model.class_path", "data.class_path"}


def _typed_values(argv: list[str]) -> dict[str, list[tuple[Any, str]]]:
    """What is given to each option, and where: first in the config files, then on the command line.

    A class stands under its option: `data` for data.class_path.
    """
    values: dict[str, list[tuple[Any, str]]] = {}
    for path in _files(argv):
        for key, value in flatten(_load(path)).items():
            values.setdefault(key.removesuffix(".class_path"), []).append((value, str(path)))
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            given = value if equals else following
            values.setdefault(name.removesuffix(".class_path"), []).append((given, "the command line"))
    return values


def _imported(path: Any) -> type | None:
    """The class of an import path; None where there is none, which the parser says."""
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _typed_keys(argv: list[str]) -> list[tuple[str, str]]:
    """(key, where it stands) of everything in the config files and on the command line."""
    keys = [(key.removesuffix("+"), str(path)) for path in _files(argv) for key in flatten(_load(path))]
    options = [a[2:].partition("=")[0] for a in argv if a.startswith("--") and a != "--"]
    return keys + [(key.removesuffix("+").replace(".init_args", ""), "the command line") for key in options]


def explain(message: str, error: Exception | None, argv: list[str]) -> str:
    """One line for the parser's message: a misspelt key, a missing file, or a value of the wrong type."""
    cause = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    for path in given_configs(argv):
        problem = _unreadable(path)
        if problem:
            return problem
    if "arguments are required" in message and not given_configs(argv):
        return "--config: name a config file of the study, as in --config STUDY/configs/NAME.yaml"
    return _foreign_class(message) or _misspelt(argv) or _condensed(message)


def _unreadable(path: Path) -> str | None:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        return f"--config: there is no file {path}{hint}"
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return f"{path}: not readable as YAML: {' '.join(str(error).split())}"
    if not isinstance(config, dict):
        return f"{path}: holds {type(config).__name__}, not a mapping with model, data and trainer"
    return None


def _foreign_class(message: str) -> str | None:
    found = re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message)
    return f"{_key(message)}.class_path: {found[1]} is no {found[2]}" if found else None


def _misspelt(argv: list[str]) -> str | None:
    known = _known_keys(argv)
    for key, where in _typed_keys(argv):
        unknown = _unknown_part(key, known)
        if unknown:
            hint = _nearest(unknown, known)
            return f"{unknown}: unknown key in {where}" + (f"; did you mean {hint}?" if hint else "")
    return None


def _unknown_part(key: str, known: set[str]) -> str | None:
    """`modle` of modle.size, `model.sise` of model.sise; None for a known key and inside a class or a dict."""
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        part = ".".join(parts[:length])
        if f"{part}.help" in known:  # the options of a class that is not known here
            return None
        group = any(k.startswith(f"{part}.") for k in known)
        if not group:
            return None if part in known or parts[length - 1] == "class_path" else part
    return None


def _nearest(key: str, known: set[str]) -> str | None:
    """The nearest key of the same group, else of any: a long prefix in common says nothing of the name."""
    group, dot, name = key.rpartition(".")
    names = {k[len(group + dot):].partition(".")[0] for k in known if k.startswith(group + dot)}
    beside = difflib.get_close_matches(name, names, 1)
    return group + dot + beside[0] if beside else next(iter(difflib.get_close_matches(key, known, 1, 0.7)), None)


def _condensed(message: str) -> str:
    """jsonargparse's nested report as one line: the whole key, the value, what would be right."""
    key = _key(message)
    if not key:
        return " ".join(message.split())
    problem = re.findall(r"Problem with given class_path '([^']+)':\s*(.*)", message)
    if problem and not problem[-1][1].startswith("Parser key"):
        return f"{key}{'.class_path' if key in ('model', 'data') else ''}: {problem[-1][0]}: {problem[-1][1]}"
    # The innermost report comes first, and those around it repeat it for the whole class.
    value = re.search(r"(?:(?:Got|Given) value|import path string): (?!NestedArg)(.+)|load config \"(.*)\"", message)
    value = next(filter(None, value.groups())) if value else "this value"
    return f"{key}: {value} {_rejection(value, message)}"


def _key(message: str) -> str:
    names = re.findall(r'[Pp]arser key "([^"]+)"', message)
    return ".".join(name for name, before in zip(names, [None, *names], strict=False) if name != before)


def _rejection(value: str, message: str) -> str:
    """What the value is not: "is none of cls, avg", "is not an int or a float"."""
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.MULTILINE))
    choices = [choice for kind in expected if "Literal[" in kind for choice in re.findall(r"'([^']+)'", kind)]
    kinds = [re.sub(r"<class '([^']+)'>", r"\1", kind) for kind in expected if "Literal[" not in kind]
    kinds = [kind for kind in kinds if kind != "NoneType" and not kind.startswith("path but")]
    if any(kind.startswith("dot import path") for kind in kinds):
        return "is not the import path of a class"
    if "load config" in message:
        return "is not a mapping of keys to values"
    if "float" in kinds and value.lstrip("+-.").lower() in ("nan", "inf"):
        return "is not a finite number"
    kinds = " or ".join(f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds)
    if choices:
        return f"is not {kinds}, nor one of {', '.join(choices)}" if kinds else f"is none of {', '.join(choices)}"
    return f"is not {kinds or 'accepted'}"

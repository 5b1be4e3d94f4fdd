"""The command line of a training script: its own flags, the Trainer's arguments, and every config field.

``--continue_path RUN`` and the other TrainerArgs are plain flags; ``--coqpit.NAME=VALUE`` sets a field of the config,
with dots for what is nested: ``--coqpit.optimizer_params.eps=1e-9``, ``--coqpit.betas.0=0.8``.
"""

import argparse
import copy
import dataclasses
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import (
    CheckedConfig,
    ConfigError,
    TrainerArgs,
    convert,
    element_types,
    find_problems,
    is_union,
    matches,
    metadata_of,
    nearest,
    type_name,
)

PREFIX = "coqpit."


def parse_command_line(
    config: CheckedConfig,
    parser: argparse.ArgumentParser | None = None,
    argv: Sequence[str] | None = None,
    args: TrainerArgs | None = None,
) -> tuple[TrainerArgs, argparse.Namespace]:
    """Apply the command line to ``config`` (in place) and read the Trainer's arguments.

    With ``--continue_path`` the config is first loaded from that run, then overridden.

    Args:
        config: gives the fields and their defaults.
        parser: holds the script's own flags; it is not changed, so it can be used again with another config.
        argv: the arguments, ``sys.argv[1:]`` by default.
        args: defaults of the Trainer's arguments; set in place.

    Returns:
        The Trainer's arguments, and the namespace with the script's own flags.

    Raises:
        SystemExit: 0 after ``--help``; 2 when anything is wrong, after every problem has been printed.
    """
    args = TrainerArgs() if args is None else args
    parser = _full_parser(parser, args, config)
    words, dotted, problems = _take_dotted(sys.argv[1:] if argv is None else argv, config)
    namespace, rest = parser.parse_known_args(words)
    paths = {path for path, *_ in [*_walk(args, ""), *_walk(config, PREFIX)]}
    given = {name: text for name, text in vars(namespace).items() if name in paths}
    flags = argparse.Namespace(**{k: v for k, v in vars(namespace).items() if k not in given})
    overrides = {k: given.pop(k) for k in list(given) if k.startswith(PREFIX)}
    problems += _unknown(rest, parser) + _apply(args, "", given)
    problems += _load_run_config(config, args.continue_path)
    problems += _apply(config, PREFIX, {**overrides, **dotted})
    problems += find_problems(args, "--") + find_problems(config, "--" + PREFIX)
    if not problems:
        try:
            config.check()
        except ValueError as error:  # the config's own check_values
            problems = [str(error)]
    if problems:
        parser.exit(2, "\n  - ".join([f"{parser.prog}: error on the command line", *problems]) + "\n")
    return args, flags


def _load_run_config(config: CheckedConfig, folder: str) -> list[str]:
    if not folder:
        return []
    path = Path(folder) / "config.json"
    if not path.is_file():
        what = "has no config.json" if path.parent.is_dir() else "is no folder"
        return [f"--continue_path={folder}: {what}; give the folder of a run, such as output/run-..."]
    try:
        config.load_json(path)
    except ConfigError as error:
        return [f"{path}: {problem}" for problem in error.problems]
    return []


def _full_parser(
    parser: argparse.ArgumentParser | None, args: TrainerArgs, config: CheckedConfig
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser() if parser is None else copy.deepcopy(parser)
    # a prefix such as --coqpit.epoch must be an error, not another spelling of --coqpit.epochs
    parser.allow_abbrev = False
    _add_flags(parser.add_argument_group("trainer arguments"), args, "")
    _add_flags(parser.add_argument_group(f"config ({type(config).__name__})"), config, PREFIX)
    return parser


def _walk(config: Any, prefix: str) -> typing.Iterator[tuple[str, Any, Any, Mapping[str, Any]]]:
    """(dotted path, value, annotation, metadata) of every field, nested configs entered."""
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        nested = dataclasses.is_dataclass(value)
        # what may be another nested config, or none, can be given whole as well
        if not nested or is_union(hints[entry.name]):
            yield prefix + entry.name, value, hints[entry.name], metadata_of(type(config), entry.name)
        if nested:
            yield from _walk(value, f"{prefix}{entry.name}.")


def _add_flags(group: Any, config: Any, prefix: str) -> None:
    for path, value, annotation, metadata in _walk(config, prefix):
        unit = f" [{metadata['unit']}]" if metadata.get("unit") else ""
        choices = metadata.get("choices")
        among = f" One of {', '.join(map(str, choices))}." if choices else ""
        shown = "''" if value == "" else str(value)
        text = f"{metadata.get('help', '')}{among}{unit} (default: {shown})".strip().replace("%", "%%")
        # a bool alone means true; values stay text here, so that all that is wrong is told at once
        alone = {"nargs": "?", "const": "true"} if annotation is bool else {}
        kind = type_name(annotation)
        kind = kind if "'" in kind else kind.upper()  # the words of a Literal are shown as they must be written
        group.add_argument(f"--{path}", dest=path, default=argparse.SUPPRESS, metavar=kind, help=text, **alone)


def _take_dotted(argv: Sequence[str], config: Any) -> tuple[list[str], dict[str, str], list[str]]:
    """Split argv into what argparse reads, every `--coqpit.field.key value` (into a dict or list), and problems.

    Argparse does not know the latter flags: it would take their values for positional arguments of the script.
    """
    fields = {path for path, *_ in _walk(config, PREFIX)}
    words, rest, dotted, problems = list(argv), [], {}, []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        path = name.removeprefix("--")
        inside = name.startswith("--") and any(path.startswith(field + ".") for field in fields - {path})
        if not inside or path in fields:
            rest.append(word)
        elif equals:
            dotted[path] = value
        elif words and not words[0].startswith("--"):
            dotted[path] = words.pop(0)
        else:
            problems.append(f"{name}: needs a value")
    return rest, dotted, problems


def _unknown(rest: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """What to say of the words that argparse did not know."""
    known = sorted(option for action in parser._actions for option in action.option_strings)
    words, problems = list(rest), []
    while words:
        name, equals, _ = words.pop(0).partition("=")
        problems.append(f"{name}: unknown argument{nearest(name, known)}")
        if not equals and name.startswith("--") and words and not words[0].startswith("--"):
            words.pop(0)  # the unknown flag's value
    return problems


def _apply(config: Any, prefix: str, overrides: dict[str, str]) -> list[str]:
    """Set what ``overrides`` (dotted path to text) names; returns what could not be set."""
    problems = []
    for path, text in overrides.items():
        *parents, name = path.removeprefix(prefix).split(".")
        owner, annotation = config, type(config)
        try:
            for parent in parents:
                annotation = _type_at(owner, annotation, parent)
                owner = _item(owner, parent)
            _set(owner, name, parse_value(text, _type_at(owner, annotation, name)))
        except ValueError as error:
            problems.append(f"--{path}={text!r}: {error}")
    return problems


def _type_at(owner: Any, annotation: Any, key: str) -> Any:
    """The annotation of an item of a config, dict or list, which is itself annotated so."""
    if dataclasses.is_dataclass(owner):
        known = [entry.name for entry in dataclasses.fields(owner)]
        if key not in known:
            raise ValueError(f"{type(owner).__name__} has no field {key!r}{nearest(key, known)}")
        return typing.get_type_hints(type(owner))[key]
    options = typing.get_args(annotation) if is_union(annotation) else (annotation,)
    arguments = next((typing.get_args(option) for option in options if matches(owner, option)), ())
    if isinstance(owner, dict):
        return arguments[1] if arguments else Any
    if not isinstance(owner, list):
        raise ValueError(f"{owner!r} has no items that could be set: give all of it")
    if not key.isdigit() or int(key) > len(owner):
        raise ValueError(f"the list has {len(owner)} items; give an index from 0 to {len(owner)} (which appends)")
    return arguments[0] if arguments else Any


def _item(owner: Any, key: str) -> Any:
    if dataclasses.is_dataclass(owner):
        return getattr(owner, key)
    items = owner if isinstance(owner, dict) else {str(i): item for i, item in enumerate(owner)}
    if key not in items:
        raise ValueError(f"there is no {key!r}; there are {', '.join(map(repr, items)) or 'no items'}")
    return items[key]


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    elif isinstance(owner, list):
        owner[int(key) : int(key) + 1] = [value]
    else:
        setattr(owner, key, value)


def parse_value(text: str, annotation: Any) -> Any:
    """A command line's text as the annotated type.

    ``none`` is None where None is allowed; lists are JSON (``[1, 2]``) or comma separated (``1,2``); dicts and nested
    configs are JSON.

    Raises:
        ValueError: the text is no such value.
    """
    options = list(typing.get_args(annotation)) if is_union(annotation) else [annotation]
    listlike = text.startswith("[") or "," in text

    # "3" is an int before it is a str; "X" is a str before it is a list of one
    def rank(option: Any) -> int:
        if (typing.get_origin(option) or option) in (list, tuple, set):
            return 0 if listlike else 3
        return 2 if option in (str, Path, Any) else 1

    problems: list[str] = []
    for option in sorted(options, key=rank):
        value = _parse_as(text, option, problems)
        if value is not _NO_VALUE and matches(value, option):
            return value
    raise ValueError("; ".join([f"must be {type_name(annotation)}", *problems]))


_NO_VALUE = object()
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PYTHON_WORDS = {"none": None, "true": True, "false": False}


def _parse_as(text: str, annotation: Any, problems: list[str]) -> Any:
    if annotation in (str, Path):
        return annotation(text)
    if annotation is Any:
        return _guess(text)
    if annotation is type(None):
        return None if text.lower() in ("none", "null", "") else _NO_VALUE
    if annotation is bool:
        return _WORDS.get(text.lower(), _NO_VALUE)
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            return _NO_VALUE
    kind = typing.get_origin(annotation) or annotation
    if kind is typing.Literal:
        return next((a for a in typing.get_args(annotation) if str(a) == text), _NO_VALUE)
    if kind in (list, tuple, set) and not text.startswith("["):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        values = [_parse_as(part, k, problems) for part, k in zip(parts, element_types(annotation, len(parts)))]
        return _NO_VALUE if _NO_VALUE in values or len(values) < len(parts) else kind(values)
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return _NO_VALUE
    found: list[str] = []
    value = convert(data, annotation, "", found)
    problems += [problem.lstrip(".") for problem in found]
    return _NO_VALUE if found else value


def _guess(text: str) -> Any:
    """What a person would take the text for, where anything is allowed: ``.5`` and ``None`` are no strings."""
    if text.lower() in _PYTHON_WORDS:
        return _PYTHON_WORDS[text.lower()]
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text

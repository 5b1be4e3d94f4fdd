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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import CheckedConfig, ConfigError, TrainerArgs, find_problems, is_union, matches, nearest, type_name

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
    namespace, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    paths = {path for path, *_ in [*_walk(args, ""), *_walk(config, PREFIX)]}
    given = {name: text for name, text in vars(namespace).items() if name in paths}
    flags = argparse.Namespace(**{k: v for k, v in vars(namespace).items() if k not in given})
    overrides = {k: given.pop(k) for k in list(given) if k.startswith(PREFIX)}
    problems = _apply(args, "", given)
    problems += _load_run_config(config, args.continue_path)
    problems += _take_dotted(rest, overrides, config, parser)
    problems += _apply(config, PREFIX, overrides)
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


def _walk(config: Any, prefix: str) -> typing.Iterator[tuple[str, Any, Any, dataclasses.Field]]:
    """(dotted path, value, annotation, field) of every field, nested configs entered."""
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, hints[entry.name], entry


def _add_flags(group: Any, config: Any, prefix: str) -> None:
    for path, value, annotation, entry in _walk(config, prefix):
        unit = f" [{entry.metadata['unit']}]" if entry.metadata.get("unit") else ""
        choices = entry.metadata.get("choices")
        among = f" One of {', '.join(map(str, choices))}." if choices else ""
        shown = "''" if value == "" else str(value)
        text = f"{entry.metadata.get('help', '')}{among}{unit} (default: {shown})".strip().replace("%", "%%")
        # a bool alone means true; values stay text here, so that all that is wrong is told at once
        alone = {"nargs": "?", "const": "true"} if annotation is bool else {}
        kind = type_name(annotation).upper()
        group.add_argument(f"--{path}", dest=path, default=argparse.SUPPRESS, metavar=kind, help=text, **alone)


def _take_dotted(rest: list[str], overrides: dict, config: Any, parser: argparse.ArgumentParser) -> list[str]:
    """Move `--coqpit.field.key value` (into a dict or list) from ``rest`` to ``overrides``; the others are problems."""
    problems = []
    fields = {path: value for path, value, *_ in _walk(config, PREFIX)}
    known = sorted(option for action in parser._actions for option in action.option_strings)
    words = list(rest)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        path = name.removeprefix("--")
        owner = path.rpartition(".")[0]
        while owner and owner not in fields:
            owner = owner.rpartition(".")[0]
        if name.startswith("--") and owner and isinstance(fields[owner], dict | list):
            if not equals and not (words and not words[0].startswith("--")):
                problems.append(f"{name}: needs a value")
            else:
                overrides[path] = value if equals else words.pop(0)
            continue
        problems.append(f"{name}: unknown argument{nearest(name, known)}")
        if not equals and name.startswith("--") and words and not words[0].startswith("--"):
            words.pop(0)  # the unknown flag's value
    return problems


def _apply(config: Any, prefix: str, overrides: dict[str, str]) -> list[str]:
    """Set the fields that ``overrides`` (dotted path to text) names; returns what could not be read."""
    problems = []
    annotations = {path: annotation for path, _, annotation, _ in _walk(config, prefix)}
    for path, text in overrides.items():
        *parents, name = path.removeprefix(prefix).split(".")
        owner, annotation, here = config, None, prefix.rstrip(".")
        for i, parent in enumerate(parents):
            here = f"{here}.{parent}".lstrip(".")
            annotation = annotations.get(here, annotation)
            owner = _item(owner, parent)
            if owner is None:
                problems.append(f"--{path}: there is no {'.'.join(parents[: i + 1])}")
                break
        else:
            annotation = annotations.get(path, Any)
            try:
                _set(owner, name, parse_value(text, annotation))
            except (ValueError, IndexError) as error:
                problems.append(f"--{path}={text!r}: {error}")
    return problems


def _item(owner: Any, key: str) -> Any:
    if isinstance(owner, dict):
        return owner.get(key)
    if isinstance(owner, list):
        return owner[int(key)] if key.isdigit() and int(key) < len(owner) else None
    return getattr(owner, key, None)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    elif isinstance(owner, list):
        if not key.isdigit() or int(key) > len(owner):
            raise IndexError(f"the list has {len(owner)} items; give an index from 0 to {len(owner)} (which appends)")
        owner[int(key) : int(key) + 1] = [value]
    else:
        setattr(owner, key, value)


def parse_value(text: str, annotation: Any) -> Any:
    """A command line's text as the annotated type.

    ``none`` is None where None is allowed; lists are JSON (``[1, 2]``) or comma separated (``1,2``); dicts are JSON.

    Raises:
        ValueError: the text is no such value.
    """
    options = list(typing.get_args(annotation)) if is_union(annotation) else [annotation]
    listlike = text.startswith("[") or "," in text

    # "3" is an int before it is a str; "X" is a str before it is a list of one
    def rank(option: Any) -> int:
        is_list = typing.get_origin(option) in (list, tuple)
        return (0 if listlike else 3) if is_list else 2 if option is str else 1

    for option in sorted(options, key=rank):
        value = _parse_as(text, option)
        if value is not _NO_VALUE and matches(value, option):
            return value
    raise ValueError(f"must be {type_name(annotation)}")


_NO_VALUE = object()
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _parse_as(text: str, annotation: Any) -> Any:
    if annotation is str:
        return text
    if annotation is type(None):
        return None if text.lower() in ("none", "null", "") else _NO_VALUE
    if annotation is bool:
        return _WORDS.get(text.lower(), _NO_VALUE)
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            return _NO_VALUE
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple) and not text.startswith("["):
        parts = [_parse_as(part.strip(), arguments[0]) for part in text.split(",") if part.strip()]
        return _NO_VALUE if _NO_VALUE in parts else origin(parts)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text if annotation is Any else _NO_VALUE
    return tuple(value) if origin is tuple and isinstance(value, list) else value

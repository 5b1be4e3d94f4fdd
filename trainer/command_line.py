"""The command line of a training script: its own flags, the Trainer's arguments, and every config field.

``--continue_path RUN`` and the other TrainerArgs are plain flags; ``--coqpit.NAME=VALUE`` sets a field of the config,
with dots for what is nested: ``--coqpit.optimizer_params.eps=1e-9``, ``--coqpit.betas.0=0.8``.
"""

import argparse
import copy
import dataclasses
import json
import logging
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checked_config import (
    CheckedConfig,
    ConfigError,
    convert,
    element_types,
    field_types,
    is_unset,
    matches,
    metadata_of,
    nearest,
    options,
    reason,
    type_name,
    value_of,
)
from trainer.config import TrainerArgs, TrainerConfig

PREFIX = "coqpit."
logger = logging.getLogger("trainer")


def parse_command_line(
    config: CheckedConfig,
    parser: argparse.ArgumentParser | None = None,
    argv: Sequence[str] | None = None,
    args: TrainerArgs | None = None,
    leave_others: bool = False,
) -> tuple[TrainerArgs, argparse.Namespace]:
    """Apply the command line to ``config`` (in place) and read the Trainer's arguments.

    With ``--continue_path`` the config is first loaded from that run, then overridden.

    Args:
        config: gives the fields and their defaults.
        parser: holds the script's own flags; it is not changed, so it can be used again with another config.
        argv: the arguments, ``sys.argv[1:]`` by default.
        args: defaults of the Trainer's arguments; set in place.
        leave_others: the Trainer calls, for a script that does not parse. Flags that are neither the config's nor like
            one of the Trainer's are the script's own: a warning names them, and another one the fields of the model's
            own config, since the model is built already. Otherwise unknown flags are errors.

    Returns:
        The Trainer's arguments, and the namespace with the script's own flags.

    Raises:
        SystemExit: 0 after ``--help``; 2 when anything is wrong, after every problem has been printed.
    """
    args = TrainerArgs() if args is None else args
    parser = _full_parser(parser, args, config)
    words, dotted, problems = _take_dotted(sys.argv[1:] if argv is None else argv, config, PREFIX)
    namespace, rest = parser.parse_known_args(words)
    paths = {path for path, *_ in [*_walk(args, ""), *_walk(config, PREFIX)]}
    given = {name: text for name, text in vars(namespace).items() if name in paths}
    flags = argparse.Namespace(**{k: v for k, v in vars(namespace).items() if k not in given})
    overrides = {k: given.pop(k) for k in list(given) if k.startswith(PREFIX)}
    problems += _unknown(rest, parser, leave_others) + _apply(args, "", given)
    if args.continue_path:
        try:
            load_run_config(config, args.continue_path)
        except ConfigError as error:
            problems += [f"{error.source}: {problem}" for problem in error.problems]
    problems += _apply(config, PREFIX, {**overrides, **dotted})
    problems += _check(args, "") + _check(config, PREFIX)
    _exit_with(parser, problems)
    if leave_others:
        _warn_of_late({**overrides, **dotted}, config)
    return args, flags


def load_run_config(config: CheckedConfig, folder: str | Path) -> None:
    """Set the config's fields as the run in ``folder`` had them.

    Raises:
        ConfigError: there is no config.json, or it is not one of this config's class. Nothing is changed.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        what = "has no config.json" if path.parent.is_dir() else "is no folder"
        raise ConfigError(
            [f"{str(folder)!r} {what}; give the folder of a run, such as output/run-..."], "continue_path"
        )
    config.load_json(path)


def override(
    config: CheckedConfig, argv: Sequence[str] | None, arg_prefix: str = "coqpit", hand_back: bool = False
) -> list[str]:
    """Set the fields of ``config`` that the command line names; what ``Coqpit.parse_args`` should do.

    Args:
        config: gives the fields and their defaults; set in place.
        argv: the arguments, ``sys.argv[1:]`` by default.
        arg_prefix: ``coqpit`` reads ``--coqpit.NAME``, an empty string ``--NAME``.
        hand_back: return words without the prefix, instead of refusing them.

    Raises:
        SystemExit: 2 when anything is wrong, after every problem has been printed.
    """
    prefix = f"{arg_prefix}." if arg_prefix else ""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    _add_flags(parser, config, prefix)
    words, dotted, problems = _take_dotted(sys.argv[1:] if argv is None else argv, config, prefix)
    namespace, rest = parser.parse_known_args(words)
    mine = [word for word in rest if prefix and word.startswith(f"--{prefix}")] if hand_back else rest
    problems += _unknown(mine, parser) + _apply(config, prefix, {**vars(namespace), **dotted})
    _exit_with(parser, problems + _check(config, prefix, complete=False))
    return rest


def set_from_namespace(config: CheckedConfig, namespace: argparse.Namespace, arg_prefix: str) -> None:
    """Set fields to the values of a namespace that ``new_parser``'s parser has returned.

    Raises:
        ConfigError: a name is no field, or a value is wrong.
    """
    prefix, problems = f"{arg_prefix}." if arg_prefix else "", []
    for path, value in vars(namespace).items():
        try:
            owner, name, _ = _place(config, path.removeprefix(prefix))
            _set(owner, name, value)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(problems, type(config).__name__)
    config.check(complete=False)


def new_parser(
    config: CheckedConfig, arg_prefix: str, parser: argparse.ArgumentParser | None = None
) -> argparse.ArgumentParser:
    """A parser, or the given one, with a flag for every field, whose values come out with their types."""
    prefix = f"{arg_prefix}." if arg_prefix else ""
    if parser is None:
        parser = _ConfigParser(config, prefix)
    parser.allow_abbrev = False
    _add_flags(parser, config, prefix, typed=True)
    return parser


class _ConfigParser(argparse.ArgumentParser):
    """Also reads flags for items of lists and dicts, which no parser can know beforehand."""

    def __init__(self, config: CheckedConfig, prefix: str) -> None:
        super().__init__()
        self._config, self._prefix = config, prefix

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        words, dotted, problems = _take_dotted(sys.argv[1:] if args is None else args, self._config, self._prefix)
        namespace, rest = super().parse_known_args(words, namespace)
        config = copy.deepcopy(self._config)
        problems += _apply(config, self._prefix, dotted)
        _exit_with(self, problems)
        for path in dotted:
            owner, name, _ = _place(config, path.removeprefix(self._prefix))
            setattr(namespace, path, _item(owner, name))
        return namespace, rest


class _TypedValue(argparse.Action):
    """Stores a flag's text as its field's type."""

    def __init__(self, *args: Any, annotation: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.annotation = annotation

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, parse_value(values, self.annotation))
        except ValueError as error:
            raise argparse.ArgumentError(self, f"{_shown(values)!r}: {error}") from error


def _check(config: CheckedConfig, prefix: str, complete: bool = True) -> list[str]:
    try:
        config.check(complete)
    except ConfigError as error:
        return [f"--{prefix}{problem}" for problem in error.problems]
    except (ValueError, AssertionError) as error:  # the config's own check_values
        return [reason(type(config), error)]
    return []


def _exit_with(parser: argparse.ArgumentParser, problems: list[str]) -> None:
    if problems:
        parser.exit(2, "\n  - ".join([f"{parser.prog}: error on the command line", *problems]) + "\n")


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
    for entry in dataclasses.fields(config):
        value, annotation = value_of(config, entry.name), field_types(type(config))[entry.name]
        nested = dataclasses.is_dataclass(value)
        # what may be another nested config, or none, can be given whole as well
        if not nested or len(options(annotation)) > 1:
            yield prefix + entry.name, value, annotation, metadata_of(type(config), entry.name)
        if nested:
            yield from _walk(value, f"{prefix}{entry.name}.")


def _add_flags(group: Any, config: Any, prefix: str, typed: bool = False) -> None:
    """Add a flag for every field, whose value is text, or ``typed`` and there by default (of what is not nested)."""
    for path, value, annotation, metadata in _walk(config, prefix):
        unit = f" [{metadata['unit']}]" if metadata.get("unit") else ""
        choices = metadata.get("choices")
        among = f" One of {', '.join(map(str, choices))}." if choices else ""
        default = "must be given" if is_unset(value) else f"default: {value if value != '' else repr(value)}"
        text = f"{metadata.get('help', '')}{among}{unit} ({default})".strip().replace("%", "%%")
        kind = type_name(annotation)
        kind = kind if "'" in kind else kind.upper()  # the words of a Literal are shown as they must be written
        arguments: dict[str, Any] = {"dest": path, "default": argparse.SUPPRESS, "metavar": kind, "help": text}
        if bool in options(annotation):
            arguments |= {"nargs": "?", "const": "true"}  # a bool alone means true
        elif any(_is_listlike(option) for option in options(annotation)):
            arguments |= {"nargs": "+", "metavar": (kind, "MORE")}
        if typed:
            arguments |= {"action": _TypedValue, "annotation": annotation}
            if path.count(".") == prefix.count("."):
                arguments["default"] = value
        group.add_argument(f"--{path}", **arguments)


def _shown(text: str | list[str]) -> str:
    return text if isinstance(text, str) else " ".join(text)


def _is_listlike(annotation: Any) -> bool:
    return (typing.get_origin(annotation) or annotation) in (list, tuple, set)


def _take_dotted(argv: Sequence[str], config: Any, prefix: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Split argv into what argparse reads, every `--coqpit.field.key value` (into a dict or list), and problems.

    Argparse does not know the latter flags: it would take their values for positional arguments of the script.
    """
    fields = {path for path, *_ in _walk(config, prefix)}
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


def _unknown(rest: list[str], parser: argparse.ArgumentParser, leave_others: bool = False) -> list[str]:
    """What to say of the words that argparse did not know."""
    known = sorted(option for action in parser._actions for option in action.option_strings)
    words, problems, others = list(rest), [], []
    while words:
        name, equals, _ = words.pop(0).partition("=")
        is_ours = name.startswith("--" + PREFIX) or nearest(name, known, cutoff=0.85)
        if is_ours or not leave_others:
            problems.append(f"{name}: unknown argument{nearest(name, known)}")
        else:
            others.append(name)
        if not equals and name.startswith("--") and words and not words[0].startswith("--"):
            words.pop(0)  # the unknown flag's value
    if others:
        fields = [f"--{PREFIX}{n.lstrip('-')}" for n in others if f"--{PREFIX}{n.lstrip('-')}" in known]
        meant = f" (the config's fields are {', '.join(fields)})" if fields else ""
        logger.warning("not the Trainer's arguments, left to the script: %s%s", ", ".join(others), meant)
    return problems


def _warn_of_late(paths: Iterable[str], config: CheckedConfig) -> None:
    """Say that the model, which is there already, may not have seen these fields."""
    names = {path.removeprefix(PREFIX).partition(".")[0] for path in paths} - set(TrainerConfig.__dataclass_fields__)
    if names:
        logger.warning(
            "%s: set after the model was built, which may not see it; call parse_command_line(config) before, and give "
            "the Trainer parse_command_line_args=False",
            ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(names)),
        )


def _apply(config: Any, prefix: str, overrides: Mapping[str, str | list[str]]) -> list[str]:
    """Set what ``overrides`` (dotted path to text) names; returns what could not be set."""
    problems = []
    for path, text in overrides.items():
        try:
            owner, name, annotation = _place(config, path.removeprefix(prefix))
            _set(owner, name, parse_value(text, annotation))
        except ValueError as error:
            problems.append(f"--{path}={_shown(text)!r}: {error}")
    return problems


def _place(config: Any, path: str) -> tuple[Any, str, Any]:
    """What holds the value at a dotted path, its name or key in there, and its annotation."""
    *parents, name = path.split(".")
    owner, annotation = config, type(config)
    for parent in parents:
        annotation = _type_at(owner, annotation, parent)
        owner = _item(owner, parent)
    return owner, name, _type_at(owner, annotation, name)


def _type_at(owner: Any, annotation: Any, key: str) -> Any:
    """The annotation of an item of a config, dict or list, which is itself annotated so."""
    if dataclasses.is_dataclass(owner):
        kinds = field_types(type(owner))
        if key not in kinds:
            raise ValueError(f"{type(owner).__name__} has no field {key!r}{nearest(key, kinds)}")
        return kinds[key]
    arguments = next((typing.get_args(option) for option in options(annotation) if matches(owner, option)), ())
    if isinstance(owner, dict):
        return arguments[1] if arguments else Any
    if not isinstance(owner, list):
        raise ValueError(f"{owner!r} has no items that could be set: give all of it")
    if not key.isdigit() or int(key) > len(owner):
        raise ValueError(f"the list has {len(owner)} items; give an index from 0 to {len(owner)} (which appends)")
    return arguments[0] if arguments else Any


def _item(owner: Any, key: str) -> Any:
    if dataclasses.is_dataclass(owner):
        return value_of(owner, key)
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


def parse_value(text: str | list[str], annotation: Any) -> Any:
    """A command line's text as the annotated type.

    ``none`` is None where None is allowed; lists are JSON (``[1, 2]``), comma separated (``1,2``) or several words;
    dicts and nested configs are JSON.

    Raises:
        ValueError: the text is no such value.
    """
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    problems: list[str] = []
    value = _parse_as_one_of(text, options(annotation), problems)
    if value is _NO_VALUE:
        raise ValueError("; ".join([f"must be {type_name(annotation)}", *problems]))
    return value


_NO_VALUE = object()
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PYTHON_WORDS = {"none": None, "true": True, "false": False}


def _parse_as_one_of(text: Any, kinds: tuple, problems: list[str]) -> Any:
    listlike = isinstance(text, list) or text.startswith("[") or "," in text

    # "3" is an int before it is a str; "X" is a str before it is a list of one
    def rank(kind: Any) -> int:
        if _is_listlike(kind):
            return 0 if listlike else 3
        return 2 if kind in (str, Path, Any) else 1

    for kind in sorted(kinds, key=rank):
        if isinstance(text, list) and not _is_listlike(kind):
            continue
        value = _parse_as(text, kind, problems)
        if value is not _NO_VALUE and matches(value, kind):
            return value
    return _NO_VALUE


def _parse_as(text: Any, annotation: Any, problems: list[str]) -> Any:
    if len(options(annotation)) > 1:
        return _parse_as_one_of(text, options(annotation), problems)
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
    if kind in (list, tuple, set) and (isinstance(text, list) or not text.startswith("[")):
        parts = text if isinstance(text, list) else [part.strip() for part in text.split(",") if part.strip()]
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

"""Configs: coqpit dataclasses whose values are checked when they are built, loaded and overridden.

Coqpit checks nothing by itself: it ignores unknown JSON keys, turns 3.7 into 3 and silently takes defaults. Here one
walk over the dataclass fields collects every problem, with its dotted path, before anything is changed.

Two kinds of fields: those declared with ``field()`` take exactly what they are annotated with. For all others, which
is how configs for Coqui's Trainer are written, the annotation is a hint: None and whole floats pass for anything.
"""

import argparse
import copy
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from coqpit import MISSING, Coqpit


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every problem found, one per line."""

    def __init__(self, problems: list[str], source: str = "config") -> None:
        self.problems = problems
        self.source = source
        super().__init__("\n  - ".join([f"{source}: {len(problems)} problem{'s'[: len(problems) > 1]}", *problems]))


def field(
    default: Any = dataclasses.MISSING,
    help: str = "",
    unit: str = "",
    min: float | None = None,
    max: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """A dataclass field that documents itself.

    Args:
        default: default value; a list, dict or nested config is copied for every instance.
        help: one sentence, shown by ``--help``.
        unit: unit of the value, such as ``"Hz"`` or ``"samples"``.
        min: smallest allowed number (of every element for a list).
        max: largest allowed number.
        choices: the allowed values.
    """
    metadata = {"help": help, "unit": unit, "min": min, "max": max, "choices": choices}
    if isinstance(default, list | dict | set) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def type_name(annotation: Any) -> str:
    """How an annotation is written in messages and in ``--help``, e.g. ``float | list[float]``."""
    if annotation is type(None):
        return "none"
    if annotation is Any:
        return "any"
    if annotation is Ellipsis:
        return "..."
    if len(options(annotation)) > 1:
        return " | ".join(type_name(a) for a in options(annotation))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(repr(a) for a in arguments)
    if not arguments:
        return getattr(origin or annotation, "__name__", str(annotation))
    return f"{origin.__name__}[{', '.join(type_name(a) for a in arguments)}]"


def options(annotation: Any) -> tuple:
    """The members of a union; of any other annotation, the annotation alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def matches(value: Any, annotation: Any, loosely: bool = False) -> bool:
    """Whether ``value`` is of the annotated type. An int passes for a float; a bool is no int.

    Loosely, None passes for anything, and a whole float such as 60.0 for an int, inside lists and dicts too.
    """
    if annotation is Any or (loosely and value is None):
        return True
    if len(options(annotation)) > 1:
        return any(matches(value, option, loosely) for option in options(annotation))
    if annotation is None or annotation is type(None):
        return value is None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return value in arguments
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float or (loosely and annotation is int and isinstance(value, float) and value.is_integer()):
        return isinstance(value, int | float)
    if origin in (list, set, tuple):
        if not isinstance(value, origin):
            return False
        kinds = element_types(annotation, len(value))
        return len(kinds) == len(value) and all(matches(v, kind, loosely) for v, kind in zip(value, kinds))
    if origin is dict:
        keys, values = arguments or (Any, Any)
        return isinstance(value, dict) and all(
            matches(k, keys) and matches(v, values, loosely) for k, v in value.items()
        )
    # An annotation that is no plain type (a TypeVar, a Protocol) cannot be checked here: the user's code will.
    return isinstance(value, origin or annotation) if isinstance(origin or annotation, type) else True


def element_types(annotation: Any, size: int) -> list[Any]:
    """The annotation of each of ``size`` elements of a list, set or tuple; ``tuple[int, str]`` always has two."""
    arguments = typing.get_args(annotation) or (Any,)
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation) and arguments[-1] is not Ellipsis:
        return list(arguments)
    return [arguments[0]] * size


def metadata_of(cls: type, name: str) -> Mapping[str, Any]:
    """Help, unit and range of a field; what a subclass does not say anew is as in its base."""
    merged: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        entry = getattr(base, "__dataclass_fields__", {}).get(name)
        merged.update(entry.metadata if entry is not None else {})
    return merged


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """The annotation of every field, widened by the type of its default: ``x: str = None`` is ``str | None``."""
    hints, found = typing.get_type_hints(cls), {}
    for entry in dataclasses.fields(cls):
        default, annotation = default_of(entry), hints[entry.name]
        known = is_unset(default) or matches(default, annotation)
        found[entry.name] = annotation if known else typing.Union[annotation, type(default)]  # noqa: UP007
    return found


def default_of(entry: dataclasses.Field) -> Any:
    """A field's default; coqpit's MISSING where it has none."""
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return MISSING if entry.default is dataclasses.MISSING else entry.default


def value_of(config: Any, name: str) -> Any:
    """A field's value; coqpit's own access raises on one that is still MISSING."""
    return object.__getattribute__(config, name)


def is_unset(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _is_taken(cls: type, name: str, value: Any) -> bool:
    # only field() writes a minimum into the metadata, None for no minimum
    return matches(value, field_types(cls)[name], loosely="min" not in metadata_of(cls, name))


def find_problems(config: Any, unset: list[str], prefix: str = "") -> list[str]:
    """Every value of a config that has the wrong type or lies out of range, with its dotted path.

    The paths of fields that are still MISSING are added to ``unset``.
    """
    problems = []
    for entry in dataclasses.fields(config):
        value, path = value_of(config, entry.name), prefix + entry.name
        if is_unset(value):
            unset.append(path)
            continue
        if not _is_taken(type(config), entry.name, value):
            problems.append(_type_problem(path, value, field_types(type(config))[entry.name]))
            continue
        problems += _range_problems(path, value, metadata_of(type(config), entry.name))
        elements = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list | tuple) else ())
        )
        nested = [(path, value), *((f"{path}.{key}", element) for key, element in elements)]
        for at, element in nested:
            if dataclasses.is_dataclass(element) and not isinstance(element, type):
                problems += find_problems(element, unset, at + ".")
    return problems


def _type_problem(path: str, value: Any, annotation: Any) -> str:
    return f"{path}={value!r} ({type(value).__name__}): must be {type_name(annotation)}"


def _range_problems(path: str, value: Any, metadata: Any) -> list[str]:
    low, high, choices = (metadata.get(key) for key in ("min", "max", "choices"))
    unit = f" {metadata['unit']}" if metadata.get("unit") else ""
    problems = []
    for v in value if isinstance(value, list | tuple) else (value,):
        if v is None:
            continue
        if choices is not None and v not in choices:
            near = difflib.get_close_matches(str(v), [str(c) for c in choices], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"{path}={v!r}: must be one of {', '.join(map(repr, choices))}{hint}")
        if not isinstance(v, int | float):  # the range is for the numbers of a field that also takes a word
            continue
        # `not (low <= v)` also refuses NaN
        if low is not None and not low <= v:
            problems.append(f"{path}={v!r}: must be at least {low}{unit}")
        if high is not None and not v <= high:
            problems.append(f"{path}={v!r}: must be at most {high}{unit}")
    return problems


def nearest(name: str, known: typing.Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` for the known name nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def convert(value: Any, annotation: Any, path: str, problems: list[str]) -> Any:
    """A JSON value as the annotated type: dicts become nested configs, lists tuples, ints floats, strings paths.

    What is wrong inside is added to ``problems``; what is of another type altogether comes back as it is.
    """
    if len(options(annotation)) > 1:
        return _convert_to_one_of(value, options(annotation), path, problems)
    arguments = typing.get_args(annotation)
    kind = typing.get_origin(annotation) or annotation
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return _build_nested(annotation, value, path, problems)
    if kind in (list, tuple, set) and isinstance(value, list):
        kinds = element_types(annotation, len(value))
        if len(kinds) != len(value):
            return value
        return kind([convert(v, k, f"{path}.{i}", problems) for i, (v, k) in enumerate(zip(value, kinds))])
    if kind is dict and isinstance(value, dict) and arguments:
        # JSON's keys are strings
        read = int if arguments[0] is int and all(re.fullmatch(r"-?\d+", str(k)) for k in value) else lambda k: k
        return {read(k): convert(v, arguments[1], f"{path}.{k}", problems) for k, v in value.items()}
    if annotation is float and matches(value, int):
        return float(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    return value


def _convert_to_one_of(value: Any, kinds: tuple, path: str, problems: list[str]) -> Any:
    # what fits as it is comes before what fits after a conversion
    for option in sorted(kinds, key=lambda option: not matches(value, option)):
        found: list[str] = []
        converted = convert(value, option, path, found)
        if not found and matches(converted, option):
            return converted
    meant = [
        o
        for o in kinds
        if type(value) is typing.get_origin(o) or (dataclasses.is_dataclass(o) and isinstance(value, dict))
    ]
    return convert(value, meant[0], path, problems) if meant else value


def _build_nested(cls: Any, data: dict, path: str, problems: list[str]) -> Any:
    before = len(problems)
    values = _converted_fields(cls, data, path + ".", problems)
    for entry in dataclasses.fields(cls):
        has_default = (entry.default, entry.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if entry.init and not has_default and entry.name not in data:
            problems.append(f"{path}.{entry.name}: is missing")
    if len(problems) > before:
        return data
    try:
        return cls(**values)
    except ConfigError as error:
        problems += [f"{path}.{problem}" for problem in error.problems]
    except (ValueError, AssertionError) as error:  # the nested config's own check_values
        problems.append(f"{path}: {reason(cls, error)}")
    return data


def reason(cls: type, error: Exception) -> str:
    """What to say of an error that a config's check_values raised, perhaps without a message."""
    return str(error) or f"{cls.__name__}.check_values raised {type(error).__name__}"


def _converted_fields(cls: Any, data: dict, prefix: str, problems: list[str]) -> dict[str, Any]:
    kinds = field_types(cls)
    converted = {}
    for key, value in data.items():
        path, before = f"{prefix}{key}", len(problems)
        if key not in kinds:
            if key not in getattr(cls, "_ignored_keys", ()):
                problems.append(f"{path}: unknown field{nearest(str(key), kinds)}")
            continue
        converted[key] = convert(value, kinds[key], path, problems)
        if len(problems) > before:
            continue  # told in detail
        if _is_taken(cls, key, converted[key]):
            problems += _range_problems(path, converted[key], metadata_of(cls, key))
        else:
            problems.append(_type_problem(path, value, kinds[key]))
    return converted


def _plain(value: Any) -> Any:
    """A value as dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass
class CheckedConfig(Coqpit):
    """A Coqpit that refuses unknown names, wrong types and values out of range, all of them at once."""

    _ignored_keys: ClassVar[tuple[str, ...]] = ()  # of a JSON file, which are no fields and no mistake

    def __new__(cls, *args: Any, **kwargs: Any) -> "CheckedConfig":
        # without its decorator, which Coqui's own example lacks, a subclass would ignore the values that it writes
        if "__dataclass_fields__" not in vars(cls):
            dataclass(cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._initialized = True
        for name, value in vars(self).items():
            if isinstance(value, list | dict):  # which may be shared, with a preset for example
                vars(self)[name] = copy.deepcopy(value)
        self.check(complete=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name) and name not in self.__dataclass_fields__:
            # Models keep values of their own on a config (num_chars); what looks like a field is a misspelt one.
            alike = [known for known in self.__dataclass_fields__ if abs(len(known) - len(name)) <= 2]
            if hint := nearest(name, alike, cutoff=0.8):
                raise AttributeError(f"{type(self).__name__} has no field {name!r}{hint}")
        super().__setattr__(name, value)

    def check(self, complete: bool = True) -> None:
        """Raise a ConfigError that lists every wrong type and value out of range; then call ``check_values``.

        Args:
            complete: fields that are MISSING are problems too; otherwise ``check_values`` waits until they are set.
        """
        unset: list[str] = []
        problems = find_problems(self, unset)
        if complete:
            problems += [f"{path}: is not set; give it a value" for path in unset]
        if problems:
            raise ConfigError(problems, type(self).__name__)
        if not unset:
            self.check_values()

    def validate(self) -> None:
        """Coqpit's name for ``check``."""
        self.check()

    def deserialize(self, data: dict[str, Any], source: str = "") -> "CheckedConfig":
        """Set the fields that ``data`` names, or raise a ConfigError and change nothing."""
        problems: list[str] = []
        converted = _converted_fields(type(self), data, "", problems)
        if problems:
            raise ConfigError(problems, source or type(self).__name__)
        before = dict(vars(self))
        vars(self).update(copy.deepcopy(converted))
        try:
            self.check(complete=False)
        except Exception:
            vars(self).clear()
            vars(self).update(before)
            raise
        return self

    def serialize(self) -> dict[str, Any]:
        """All fields as what JSON holds; ``deserialize`` makes the same config of it."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)}

    @classmethod
    def deserialize_immutable(cls, data: dict[str, Any]) -> "CheckedConfig":
        """A new config with the values of ``data``; the other fields have their defaults."""
        problems: list[str] = []
        converted = _converted_fields(cls, data, "", problems)
        if problems:
            raise ConfigError(problems, cls.__name__)
        return cls(**converted)

    def load_json(self, file_name: Any) -> None:
        """Set the fields from a JSON file.

        Raises:
            ConfigError: the file is no JSON object, or names unknown fields, or has wrong values. Nothing is changed.
        """
        text = Path(file_name).read_text(encoding="utf8")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError([f"not valid JSON: {error}"], str(file_name)) from error
        if not isinstance(data, dict):
            raise ConfigError([f"holds a {type(data).__name__}, not a JSON object"], str(file_name))
        self.deserialize(data, source=str(file_name))

    # Coqpit's way to read the command line, for scripts that do it themselves; trainer.command_line does the work.

    @classmethod
    def init_argparse(
        cls,
        *,
        instance: "CheckedConfig | None" = None,
        parser: argparse.ArgumentParser | None = None,
        arg_prefix: str = "coqpit",
        help_prefix: str = "",
        relaxed_parser: bool = False,
    ) -> argparse.ArgumentParser:
        """A parser with a flag for every field; its namespace holds their typed values, defaults included.

        Args:
            instance: gives the defaults; those of the class otherwise.
            parser: gets the flags. A new one is made by default; only that one also takes items of lists and dicts.
            arg_prefix: ``coqpit`` makes ``--coqpit.NAME``, an empty string ``--NAME``.
            help_prefix: without effect.
            relaxed_parser: without effect: flags can have every type here.
        """
        from trainer import command_line

        return command_line.new_parser(cls._with_defaults() if instance is None else instance, arg_prefix, parser)

    def parse_args(self, args: argparse.Namespace | list[str] | None = None, arg_prefix: str = "coqpit") -> None:
        """Set fields from a namespace of ``init_argparse``'s parser, or from words (default: the command line's).

        Raises:
            ConfigError: the namespace has an unknown name or a wrong value.
            SystemExit: a word is unknown or a value wrong; all of them have been printed.
        """
        from trainer import command_line

        if isinstance(args, argparse.Namespace):
            command_line.set_from_namespace(self, args, arg_prefix)
        else:
            command_line.override(self, args, arg_prefix)

    def parse_known_args(
        self,
        args: argparse.Namespace | list[str] | None = None,
        arg_prefix: str = "coqpit",
        *,
        relaxed_parser: bool = False,
    ) -> list[str]:
        """As ``parse_args``, but returns the words that are not this config's: those without its prefix.

        Args:
            args: a namespace, or words.
            arg_prefix: as for ``init_argparse``; with an empty one all unknown words are returned.
            relaxed_parser: without effect.
        """
        from trainer import command_line

        if isinstance(args, argparse.Namespace):
            command_line.set_from_namespace(self, args, arg_prefix)
            return []
        return command_line.override(self, args, arg_prefix, hand_back=True)

    @classmethod
    def init_from_argparse(
        cls, args: argparse.Namespace | list[str] | None = None, arg_prefix: str = "coqpit"
    ) -> "CheckedConfig":
        """A new config from a namespace or words, as ``parse_args`` reads them."""
        config = cls._with_defaults()
        config.parse_args(args, arg_prefix)
        return cls(**{entry.name: value_of(config, entry.name) for entry in dataclasses.fields(cls) if entry.init})

    @classmethod
    def _with_defaults(cls) -> "CheckedConfig":
        """The defaults alone: ``__init__`` is not called, and a field without a default is MISSING."""
        config = cls.__new__(cls)
        vars(config).update({entry.name: default_of(entry) for entry in dataclasses.fields(cls)})
        return config

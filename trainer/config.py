"""Configs: coqpit dataclasses whose values are checked when they are built, loaded and overridden.

Coqpit checks nothing by itself: it ignores unknown JSON keys, turns 3.7 into 3 and silently takes defaults. Here one
walk over the dataclass fields collects every problem, with its dotted path, before anything is changed.
"""

import copy
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coqpit import Coqpit


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
    if is_union(annotation):
        return " | ".join(type_name(a) for a in typing.get_args(annotation))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(repr(a) for a in arguments)
    if not arguments:
        return getattr(origin or annotation, "__name__", str(annotation))
    return f"{origin.__name__}[{', '.join(type_name(a) for a in arguments)}]"


def is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def matches(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is of the annotated type. An int passes for a float; a bool is no int."""
    if annotation is Any:
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if is_union(annotation):
        return any(matches(value, a) for a in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is typing.Literal:
        return value in arguments
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, int | float)
    if origin in (list, set, tuple):
        if not isinstance(value, origin):
            return False
        kinds = element_types(annotation, len(value))
        return len(kinds) == len(value) and all(map(matches, value, kinds))
    if origin is dict:
        keys, values = arguments or (Any, Any)
        return isinstance(value, dict) and all(matches(k, keys) and matches(v, values) for k, v in value.items())
    # An annotation that is no plain type (a TypeVar, a Protocol) cannot be checked here: the user's code will.
    return isinstance(value, origin or annotation) if isinstance(origin or annotation, type) else True


def element_types(annotation: Any, size: int) -> list[Any]:
    """The annotation of each of ``size`` elements of a list, set or tuple; ``tuple[int, str]`` always has two."""
    arguments = typing.get_args(annotation) or (Any,)
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation) and arguments[-1] is not Ellipsis:
        return list(arguments)
    return [arguments[0]] * size


def metadata_of(cls: type, name: str) -> Mapping[str, Any]:
    """Help, unit and range of a field; one that a subclass only gives another default keeps those of its base."""
    for base in cls.__mro__:
        entry = getattr(base, "__dataclass_fields__", {}).get(name)
        if entry is not None and entry.metadata:
            return entry.metadata
    return {}


def find_problems(config: Any, prefix: str = "") -> list[str]:
    """Every value of a config that has the wrong type or lies out of range, with its dotted path."""
    problems = []
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, path = getattr(config, entry.name), prefix + entry.name
        if not matches(value, hints[entry.name]):
            problems.append(_type_problem(path, value, hints[entry.name]))
            continue
        problems += _range_problems(path, value, metadata_of(type(config), entry.name))
        elements = (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list | tuple) else ())
        )
        nested = [(path, value), *((f"{path}.{key}", element) for key, element in elements)]
        for at, element in nested:
            if dataclasses.is_dataclass(element) and not isinstance(element, type):
                problems += find_problems(element, at + ".")
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


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def convert(value: Any, annotation: Any, path: str, problems: list[str]) -> Any:
    """A JSON value as the annotated type: dicts become nested configs, lists tuples, ints floats, strings paths.

    What is wrong inside is added to ``problems``; what is of another type altogether comes back as it is.
    """
    if is_union(annotation):
        return _convert_to_one_of(value, typing.get_args(annotation), path, problems)
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


def _convert_to_one_of(value: Any, options: tuple, path: str, problems: list[str]) -> Any:
    # what fits as it is comes before what fits after a conversion
    for option in sorted(options, key=lambda option: not matches(value, option)):
        found: list[str] = []
        converted = convert(value, option, path, found)
        if not found and matches(converted, option):
            return converted
    meant = [
        o
        for o in options
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
    except ValueError as error:  # the nested config's own check_values
        problems.append(f"{path}: {error}")
    return data


def _converted_fields(cls: Any, data: dict, prefix: str, problems: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    known = [entry.name for entry in dataclasses.fields(cls)]
    converted = {}
    for key, value in data.items():
        path, before = f"{prefix}{key}", len(problems)
        if key not in known:
            problems.append(f"{path}: unknown field{nearest(str(key), known)}")
            continue
        converted[key] = convert(value, hints[key], path, problems)
        if len(problems) > before:
            continue  # told in detail
        if matches(converted[key], hints[key]):
            problems += _range_problems(path, converted[key], metadata_of(cls, key))
        else:
            problems.append(_type_problem(path, value, hints[key]))
    return converted


def _plain(value: Any) -> Any:
    """A value as dicts, lists, strings and numbers."""
    if isinstance(value, Coqpit):
        return value.serialize()
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

    def __post_init__(self) -> None:
        self._initialized = True
        for name, value in vars(self).items():
            if isinstance(value, list | dict):  # which may be shared, with a preset for example
                vars(self)[name] = copy.deepcopy(value)
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        # a name of the class (field, property, attribute of an undecorated subclass) or a private one; no typo
        if not name.startswith("_") and not hasattr(type(self), name) and name not in self.__dataclass_fields__:
            raise AttributeError(
                f"{type(self).__name__} has no field {name!r}{nearest(name, self.__dataclass_fields__)}"
            )
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raise a ConfigError that lists every wrong type and value out of range."""
        problems = find_problems(self)
        if problems:
            raise ConfigError(problems, type(self).__name__)
        self.check_values()

    def deserialize(self, data: dict[str, Any], source: str = "") -> "CheckedConfig":
        """Set the fields that ``data`` names, or raise a ConfigError and change nothing."""
        problems: list[str] = []
        converted = _converted_fields(type(self), data, "", problems)
        if problems:
            raise ConfigError(problems, source or type(self).__name__)
        before = dict(vars(self))
        vars(self).update(converted)
        try:
            self.__post_init__()
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


@dataclass
class TrainerArgs(CheckedConfig):
    """How this one start of a training goes; given as ``--continue_path``, ``--small_run`` and so on."""

    continue_path: str = field("", "Folder of a run to continue: its config, newest checkpoint and folder are used.")
    restore_path: str = field("", "Checkpoint whose model weights a new run starts from.")
    grad_accum_steps: int = field(1, "Batches accumulated for one update of the weights.", unit="batches", min=1)
    overfit_batch: bool = field(False, "Train and evaluate on the first training batch only, to debug a model.")
    skip_train_epoch: bool = field(False, "Run one evaluation and test, without training.")
    start_with_eval: bool = field(False, "Evaluate once before the first training epoch.")
    small_run: int | None = field(
        None,
        "Use only the first N training and evaluation samples, to debug a recipe.",
        unit="samples",
        min=1,
    )


@dataclass
class TrainerConfig(CheckedConfig):
    """What every training run can set. A model's config inherits from it and adds its own fields.

    Every field can be overridden on the command line: ``--coqpit.lr=1e-4 --coqpit.optimizer_params.eps=1e-9``.

    Example:
        >>> @dataclass
        ... class DigitsConfig(TrainerConfig):
        ...     hidden: int = field(64, "Width of the hidden layers.", min=1)
        >>> DigitsConfig(hidden=0)
        Traceback (most recent call last):
        trainer.config.ConfigError: DigitsConfig: 1 problem
          - hidden=0: must be at least 1
    """

    # the run
    output_path: str = field("output", "Folder in which every run makes a folder of its own.")
    run_name: str = field("run", "First part of the name of the run's folder.")
    training_seed: int = field(54321, "Seed of python's, numpy's and torch's random numbers.", min=0, max=2**32 - 1)
    epochs: int = field(1000, "Epochs to train.", min=1)
    max_steps: int | None = field(None, "Stop after this many updates, if the epochs do not end before.", min=1)
    device: str = field("auto", "Device to train on: auto, cpu, cuda, cuda:N or mps.")

    # logging
    print_step: int = field(25, "Print the losses every N updates.", unit="updates", min=1)
    plot_step: int = field(100, "Write scalars, and the model's train_log, every N updates.", unit="updates", min=1)
    print_eval: bool = field(False, "Print every evaluation batch.")
    dashboard_logger: str = field("tensorboard", "Dashboard to write to.", choices=("tensorboard", "none"))

    # checkpoints
    save_step: int = field(10000, "Save a checkpoint every N updates.", unit="updates", min=1)
    save_n_checkpoints: int = field(5, "Keep the newest N checkpoints.", min=1)
    save_checkpoints: bool = field(True, "Save checkpoints; without them a run cannot be continued.")
    save_on_interrupt: bool = field(True, "Save a checkpoint on Ctrl-C and SIGTERM.")
    save_all_best: bool = field(False, "Keep every best model as best_model_STEP.pth too.")
    save_best_after: int = field(0, "Save no best model before this update.", unit="updates", min=0)
    target_loss: str | None = field(
        None, "Loss that decides which model is best (default: loss, with several optimizers their mean)."
    )

    # evaluation and test
    run_eval: bool = field(True, "Evaluate after the epochs (see run_eval_epochs), and after the last update.")
    run_eval_epochs: int = field(1, "Evaluate and test after every N epochs.", unit="epochs", min=1)
    run_eval_steps: int | None = field(None, "Evaluate every N updates as well.", unit="updates", min=1)
    test_delay_epochs: int = field(0, "First epoch after which the model's test_run is called.", min=0)

    # precision and speed
    mixed_precision: bool = field(False, "Run the forward pass under autocast.")
    precision: str = field("fp16", "Type that autocast computes in; fp16 scales the losses.", choices=("fp16", "bf16"))
    allow_tf32: bool = field(False, "Let GPUs multiply fp32 matrices in TF32: faster, 10 bits of mantissa.")
    cudnn_enable: bool = field(True, "Use cuDNN.")
    cudnn_deterministic: bool = field(False, "Let cuDNN choose deterministic kernels only; slower.")
    cudnn_benchmark: bool = field(False, "Let cuDNN time its kernels; for inputs of constant shape.")

    # data
    batch_size: int = field(32, "Samples in a training batch.", unit="samples", min=1)
    eval_batch_size: int = field(16, "Samples in an evaluation batch.", unit="samples", min=1)
    num_loader_workers: int = field(0, "Processes that load data; 0 loads in the training process.", min=0)

    # optimization
    optimizer: str | None = field(None, "Name of a torch.optim class, when the model brings no optimizer.")
    optimizer_params: dict[str, Any] = field({}, "Arguments of the optimizer.")
    lr: float | list[float] = field(0.001, "Learning rate of the optimizer(s).", min=0)
    lr_scheduler: str | list[str] | None = field(None, "Name of a torch.optim.lr_scheduler class.")
    lr_scheduler_params: dict[str, Any] | list[dict[str, Any]] = field({}, "Arguments of the scheduler(s).")
    scheduler_after_epoch: bool = field(True, "Step the schedulers once an epoch, otherwise after every update.")
    grad_clip: float | list[float] = field(
        0.0, "Largest gradient norm, for all or for each optimizer; 0 clips nothing.", min=0
    )

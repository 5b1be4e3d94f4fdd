"""``python -m trainer.checkpoint``: what a checkpoint holds, whether it is sound, and the small file of its weights."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint_file import load_checkpoint, load_sound, save_checkpoint
from trainer.restore import best_loss_of, is_coquis
from trainer.storage import as_path, exists, is_local, list_files

_MAIN_FIELDS = ("model", "run_name", "epochs", "max_steps", "batch_size", "optimizer", "lr", "lr_scheduler")
_MAIN_FIELDS += ("grad_clip", "mixed_precision", "precision", "ema_decay", "training_seed")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code, 1 when a file is damaged or cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="print what a checkpoint holds", allow_abbrev=False)
    inspecting.add_argument("file", help="a checkpoint of this Trainer or Coqui's, or weights; a path or URL")
    inspecting.add_argument("--tensors", action="store_true", help="list all weights with their shapes and types")
    stripping = commands.add_parser("strip", help="write a file of the weights and config only", allow_abbrev=False)
    stripping.add_argument("file", help="the checkpoint; a path or URL")
    stripping.add_argument("--output", help="the file to write (default: FILE's name with _stripped, beside it)")
    stripping.add_argument("--raw", action="store_true", help="take the weights themselves, not their average (EMA)")
    stripping.add_argument("--force", action="store_true", help="overwrite the output if it is there")
    verifying = commands.add_parser("verify", help="compare checkpoints with their SHA-256", allow_abbrev=False)
    verifying.add_argument("run", help="a run's folder, or a checkpoint; a path or URL")
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            lines, all_sound = verify(options.run)
            print("\n".join(lines))
            return 0 if all_sound else 1
        if options.command == "inspect":
            lines = inspect(options.file, options.tensors)
        else:
            lines = [strip(options.file, options.output, options.raw, options.force)]
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def inspect(path: str, tensors: bool = False) -> list[str]:
    """What a checkpoint holds, as lines to print.

    Args:
        path: path or URL of a checkpoint of this Trainer or Coqui's, stripped or not, or of a state dict.
        tensors: add a table of all weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no checkpoint.
    """
    state, size = load_checkpoint(path, mapped=True), _size_of(path)
    lines = [f"{path}: {_megabytes(size)}, {_kind(state)}"]
    if "step" in state:
        done = f", {state['batches_done']} batches of the next one" if state.get("batches_done") else ""
        date = f", saved {state['date']}" if "date" in state else ""
        lines.append(f"step {state['step']}, {state.get('epoch', 0)} epochs done{done}{date}")
    if best := best_loss_of(state):
        label = "loss" if is_coquis(state) else "best loss"
        shown = [f"{name} {value:.5g}" for name, value in best.items() if value is not None and math.isfinite(value)]
        lines.append(f"{label}: {', '.join(shown) or 'not known yet'}")
    weights = [value for value in state["model"].values() if isinstance(value, torch.Tensor)]
    types = ", ".join(f"{n} {str(dtype)[6:]}" for dtype, n in Counter(w.dtype for w in weights).most_common())
    lines.append(f"model: {len(weights)} tensors ({types}), {sum(w.numel() for w in weights):,} values")
    lines += _sections(state, size)
    config = state.get("config")
    if isinstance(config, Mapping):
        fields = ", ".join(f"{name}={config[name]}" for name in _MAIN_FIELDS if config.get(name) not in (None, ""))
        lines.append(f"config: {len(config)} fields: {fields}")
    if "optimizer" in state:
        states = state["optimizer"]
        several = isinstance(states, Mapping) and "param_groups" not in states
        states = list(states.values()) if several else states if isinstance(states, list) else [states]
        lines += [f"optimizer {i}: {_optimizer(optimizer)}" for i, optimizer in enumerate(states)]
    return lines + (_table(state["model"]) if tensors else [])


def strip(path: str, output: str | None = None, raw: bool = False, force: bool = False) -> str:
    """Write a checkpoint's weights and config alone, for inference or to start a new run from.

    Args:
        path: path or URL of the checkpoint.
        output: the file to write, a path or URL; by default ``NAME_stripped.pth`` beside it.
        raw: take the weights themselves even if the checkpoint holds their average (EMA), which is taken otherwise.
        force: overwrite ``output``.

    Returns:
        a line that says what was written.

    Raises:
        FileExistsError: ``output`` is there, and ``force`` is not given.
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or no checkpoint; or ``output`` is the checkpoint itself.
    """
    output = output or f"{path.removesuffix(Path(path).suffix)}_stripped.pth"
    source, target = as_path(path).absolute(), as_path(output).absolute()
    if source == target:
        raise ValueError(f"output={output!r}: is the checkpoint itself; choose another name")
    if not force and exists(target):
        raise FileExistsError(f"{output}: is there already; --force overwrites it")
    state, _ = load_sound(source)  # compared: the new file gets a sum of its own, which must not cover up damage
    weights, averaged = state["model"], state.get("ema") if not raw else None
    if averaged:
        weights = {name: _as(averaged["weights"].get(name, value), value) for name, value in weights.items()}
    small = {"model": weights}
    if "config" in state:
        small["config"] = state["config"]
    save_checkpoint(small, output)
    before, after = _size_of(path), _size_of(output)
    what = "averaged weights (EMA)" if averaged else "weights"
    return f"{output}: {what} and config, {_megabytes(before)} -> {_megabytes(after)} ({after / before:.0%})"


def verify(run: str) -> tuple[list[str], bool]:
    """Compare every checkpoint of a run, or one, with the SHA-256 that was recorded when it was written.

    Args:
        run: path or URL of a run's folder, or of a checkpoint.

    Returns:
        a line for each file, and whether all are sound.

    Raises:
        FileNotFoundError: there is no such file or folder, or it holds no checkpoint.
    """
    path = as_path(run)
    is_file = path.suffix == ".pth" or (is_local(path) and path.is_file())
    there = [path] if is_file else [entry.path for entry in list_files(path) if entry.path.suffix == ".pth"]
    # what gave a NaN lies there too
    found = there if is_file else [file for file in there if not file.name.startswith("bad_batch_")]
    if not found:
        raise FileNotFoundError(f"{run}: holds no checkpoint")
    files = sorted(found, key=_step_of)
    lines, all_sound = [], True
    for file in files:
        verdict, is_sound = _verdict(file)
        lines.append(f"{file.name}: {verdict}")
        all_sound = all_sound and is_sound
    if not is_file:
        lines.append(f"{len(files)} checkpoints: " + ("all sound" if all_sound else "NOT all sound"))
    return lines, all_sound


def _step_of(path: Path) -> tuple[str, int]:
    name, _, number = path.stem.rpartition("_")
    return (name, int(number)) if number.isdecimal() else (path.stem, 0)


def _verdict(path: Path) -> tuple[str, bool]:
    try:
        state, is_summed = load_sound(path)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: "), False
    step = f"step {state['step']}, " if "step" in state else ""
    if is_summed:
        return f"sound ({step}SHA-256 as recorded)", True
    return f"readable ({step}format {state.get('format', 'unknown')} records no SHA-256)", True


def _as(averaged: Any, value: Any) -> Any:
    """An average as the weight's type: it is kept in fp32 whatever that is. A module's extra state may be anything."""
    return averaged.to(value.dtype) if isinstance(averaged, torch.Tensor) else averaged


def _size_of(path: str) -> int:
    return as_path(path).stat().st_size


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def _kind(state: Mapping[str, Any]) -> str:
    if is_coquis(state):
        return "a checkpoint of Coqui's Trainer"
    if not isinstance(state.get("format"), int):
        return "weights without a format"
    return f"format {state['format']}" + ("" if "optimizer" in state else ", stripped: no training state")


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item)


def _sections(state: Mapping[str, Any], size: int) -> list[str]:
    """How many bytes of the file each section's tensors take; shared ones count where they come first."""
    seen: set[int] = set()
    sizes = Counter()
    for name, section in state.items():
        for tensor in _tensors_in(section):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                sizes[name] += storage.nbytes()
                seen.add(storage.data_ptr())
    sizes["other"] = size - sum(sizes.values())
    return [f"  {name}: {_megabytes(n)}" for name, n in sizes.most_common()]


def _optimizer(state: Any) -> str:
    if not isinstance(state, Mapping) or "param_groups" not in state:
        return "made of several, or of a form of its own"
    groups = state["param_groups"]
    rates = ", ".join(f"{float(group['lr']):.4g}" for group in groups)
    kept = sorted({name for entry in state["state"].values() for name in entry})
    parameters = sum(len(group["params"]) for group in groups)
    return f"groups: {len(groups)}, parameters: {parameters}, lr: {rates}, state: {', '.join(kept) or 'none'}"


def _table(weights: Mapping[str, Any]) -> list[str]:
    rows = [(name, str(list(w.shape)), str(w.dtype)[6:]) for name, w in weights.items() if isinstance(w, torch.Tensor)]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    return [f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype}" for name, shape, dtype in rows]

"""``python -m trainer.checkpoint``: what a checkpoint holds, and the small file of its weights for inference."""

import argparse
import io
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import torch

from trainer.checkpoint import FORMAT_VERSION, load_checkpoint, write_file
from trainer.restore import best_loss_of, is_coquis

_MAIN_FIELDS = ("model", "run_name", "epochs", "max_steps", "batch_size", "optimizer", "lr", "lr_scheduler")
_MAIN_FIELDS += ("grad_clip", "mixed_precision", "precision", "ema_decay", "training_seed")


def main(arguments: list[str] | None = None) -> int:
    """Run ``inspect`` or ``strip``; returns the exit code, 1 when a file cannot be read or written."""
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
    options = parser.parse_args(arguments)
    try:
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
    (source, source_path), (target, target_path) = fsspec.core.url_to_fs(path), fsspec.core.url_to_fs(output)
    if (type(source), source_path) == (type(target), target_path):
        raise ValueError(f"output={output!r}: is the checkpoint itself; choose another name")
    if not force and target.exists(target_path):
        raise FileExistsError(f"{output}: is there already; --force overwrites it")
    state = load_checkpoint(path, mapped=True)
    weights, averaged = state["model"], state.get("ema") if not raw else None
    if averaged:
        weights = {name: _as(averaged["weights"].get(name, value), value) for name, value in weights.items()}
    small = {"format": FORMAT_VERSION, "model": weights}
    if "config" in state:
        small["config"] = state["config"]
    if target.protocol[0] == "file":
        write_file(Path(target_path), lambda file: torch.save(small, file))
    else:
        buffer = io.BytesIO()
        torch.save(small, buffer)
        target.pipe_file(target_path, buffer.getvalue())  # a store shows the file only when it is there whole
    before, after = _size_of(path), _size_of(output)
    what = "averaged weights (EMA)" if averaged else "weights"
    return f"{output}: {what} and config, {_megabytes(before)} -> {_megabytes(after)} ({after / before:.0%})"


def _as(averaged: Any, value: Any) -> Any:
    """An average as the weight's type: it is kept in fp32 whatever that is. A module's extra state may be anything."""
    return averaged.to(value.dtype) if isinstance(averaged, torch.Tensor) else averaged


def _size_of(path: str) -> int:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.size(inner)


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

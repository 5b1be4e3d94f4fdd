"""Devices: which one to train on, and how a batch gets there."""

import dataclasses
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the first of cuda, mps and cpu that is there.

    Raises:
        ValueError: no such device, with those that are there.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"device={name!r}: not on this machine; take auto or one of {', '.join(available)}")
    return torch.device(name)


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in nested dicts, lists, tuples, namedtuples and dataclasses, without waiting for the copy."""
    if isinstance(value, torch.Tensor | PackedSequence):  # a PackedSequence keeps its batch_sizes on the CPU
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **moved)
    return value


def count_samples(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor (read from the shape, not from the device).

    Raises:
        ValueError: the batch holds no tensor with a dimension.
    """
    found = _first_dimension(batch)
    if found is None:
        raise ValueError(f"a batch ({type(batch).__name__}) holds no tensor: its samples cannot be counted")
    return found


def _first_dimension(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.size(0) if value.dim() else None
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, f.name) for f in dataclasses.fields(value)]
    else:
        return None
    return next((n for n in map(_first_dimension, items) if n is not None), None)

"""Devices: which one to train on, and how a batch gets there."""

import copy
import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def pick_device(name: str, gpu: int | None = None, local_rank: int | None = None) -> torch.device:
    """The device to train on.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``auto`` is the first of cuda, mps and cpu that is there.
        gpu: index of the GPU that ``auto`` and ``cuda`` mean; ignored where CUDA_VISIBLE_DEVICES is set, which has
            chosen already.
        local_rank: the number of this process among several on this machine; each takes the GPU of its number.

    Raises:
        ValueError: no such device, with those that are there; or name, gpu and local_rank contradict each other.
    """
    name = os.environ.get("TRAINER_DEVICE") or name  # the launcher's --device reaches every script this way
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available = ["cuda"] * bool(gpus) + gpus + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    chosen, source = name, f"device={name!r}"
    index = None if "CUDA_VISIBLE_DEVICES" in os.environ else gpu
    if local_rank is not None and name != "cpu":
        # ranks talk to each other through nccl or gloo, which know no mps
        index = local_rank if gpus or name != "auto" else None
        chosen = "cpu" if index is None else name
        source = f"device={name!r} of rank {local_rank} on this machine"
    elif index is not None:
        source = f"gpu={gpu} with device={name!r}"
    if index is not None:
        if name not in ("auto", "cuda", f"cuda:{index}"):
            raise ValueError(f"{source}: they contradict each other; take device='auto' or 'cuda'")
        chosen = f"cuda:{index}"
    if chosen == "auto":
        chosen = available[0]
    if chosen not in available:
        raise ValueError(f"{source}: {chosen} is not on this machine; take auto or one of {', '.join(available)}")
    return torch.device(chosen)


def to_device(value: Any, device: torch.device, name: str = "batch") -> Any:
    """Move every tensor of a batch, however deep, without waiting for the copies.

    Mappings, lists, tuples, sets and dataclasses are made anew, of their own types; an object with a method ``to`` is
    asked to move itself. All else, and tensors that are on the device already, come back as the same objects.

    Tensors that are not in pinned memory are pinned on their way to a GPU: from pageable memory the driver may wait
    until the GPU has done all that was asked of it. Loaders with ``pin_memory=True`` have done this in another thread.

    Args:
        value: a batch, or a part of it.
        device: where to.
        name: what the value is called in messages.

    Raises:
        TypeError: a tensor of double precision is to go to mps, which has none.
    """
    if isinstance(value, torch.Tensor):
        return _tensor_to_device(value, device, name)
    if isinstance(value, PackedSequence):  # whose batch_sizes stay on the CPU
        parts = value.data, value.sorted_indices, value.unsorted_indices
        data, *indices = (to_device(part, device, name) for part in parts)
        return PackedSequence(data, value.batch_sizes, *indices)
    if callable(getattr(type(value), "to", None)):
        has_option = "non_blocking" in inspect.signature(value.to).parameters
        return value.to(device, non_blocking=True) if has_option else value.to(device)
    if isinstance(value, Mapping):
        items = {key: to_device(item, device, f"{name}[{key!r}]") for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return type(value)(items)
        moved = copy.copy(value)  # with what else it holds: a defaultdict's factory
        moved.update(items)
        return moved
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device, f"{name}.{k}") for k, item in zip(value._fields, value)))
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(to_device(item, device, f"{name}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)  # not built anew, which would compute its other fields again
        for key, item in _fields(value):
            object.__setattr__(moved, key, to_device(item, device, f"{name}.{key}"))  # it may be frozen
        return moved
    return value


def _tensor_to_device(tensor: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    if device.type == "mps" and tensor.dtype in (torch.float64, torch.complex128):
        # not made float32 here: on other devices the same batch would be computed in double precision
        raise TypeError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which mps does not have: make it single precision "
            "in the collate function or in format_batch"
        )
    # only such can be pinned
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.layout == torch.strided:
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass that are set."""
    return ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name))


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
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])  # always on the CPU
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [item for _, item in _fields(value)]
    else:
        return None
    return next((n for n in map(_first_dimension, items) if n is not None), None)

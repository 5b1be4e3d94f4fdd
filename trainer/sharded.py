"""Tensors of which each rank holds a part (DTensors, see fsdp.py), beside whole ones, for which nothing is done here.

With one rank, and with ``strategy: ddp``, all tensors are whole.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch


def is_sharded(value: Any) -> bool:
    """Whether this is a DTensor; found by its method, since importing the class takes long."""
    return hasattr(value, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory; a tensor that is not sharded as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, from all ranks, which must all call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sum_over_ranks(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum of a plain tensor over the ranks between which ``like`` is sharded, if it is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(tensor, like.device_mesh, [Partial()], run_check=False).full_tensor()


def shard_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every rank has, sharded as ``like`` is; nothing is sent."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None)


def unlocal(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The DTensor of which ``part`` is this rank's part, where ``like`` is one; the inverse of ``local``."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def full_state(state: Any, keep: bool = True) -> Any:
    """A state (of dicts and lists) with whole tensors, on the CPU, in place of the sharded ones.

    Args:
        state: of a model, an optimizer or an average. All ranks must call this with theirs.
        keep: whether this rank needs the whole tensors; without it they are None, and take no memory.
    """
    if is_sharded(state):
        whole = state.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        found = copy.copy(state)  # with what a module's state dict has besides its entries
        found.update({name: full_state(value, keep) for name, value in state.items()})
        return found
    return [full_state(value, keep) for value in state] if isinstance(state, list) else state

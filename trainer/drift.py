"""Whether all ranks still have the same weights, bit for bit.

Ranks begin with equal weights and make equal updates. A flipped bit, a kernel that is not deterministic, or a weight
that a model changes on one rank alone, goes unnoticed otherwise: the losses of two slightly different models look fine.
"""

import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from trainer.distributed import Ranks

_CHUNK = 2**16  # words that are hashed at once: with their random numbers they stay in a CPU's cache
_MULTIPLIER = 6364136223846793005  # odd; Knuth's, of MMIX's linear congruential generator
_WORDS = {1: torch.int8, 2: torch.int16}  # by the size of an element; others are taken as words of 32 bits


class DriftCheck:
    """Compares a hash of every parameter over the ranks.

    Buffers are left out (rank 0's are broadcast after every update), and so are parameters that are sharded. What has
    drifted in an optimizer's state shows in the weights after its next update.

    Args:
        model: its parameters are looked up at each check.
        ranks: this rank among the others.
        every: updates between checks; None checks only when asked.
    """

    def __init__(self, model: nn.Module, ranks: "Ranks", every: int | None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"drift_check_steps={every}: at least 1 is needed, or None")
        self._model, self._ranks, self._every = model, ranks, every
        self._checked: int | None = None

    def after_update(self, step: int) -> None:
        """Check if it is due after this update; otherwise this costs nothing."""
        if self._every is not None and step % self._every == 0:
            self.check(step)

    def check(self, step: int) -> None:
        """Compare now, unless it was done after this very update; all ranks must call it, and wait for their devices.

        Args:
            step: updates done.

        Raises:
            RuntimeError: on all ranks, a parameter is not the same everywhere.
        """
        if self._ranks.world_size == 1 or self._checked == step:
            return
        self._checked = step
        everyones = self._ranks.gather(hash_parameters(self._model))
        names = list(dict.fromkeys(name for hashes in everyones for name in hashes))
        differing = [name for name in names if len({hashes.get(name) for hashes in everyones}) > 1]
        if differing:
            more = f", and {len(differing) - 1} more of {len(names)}" if len(differing) > 1 else ""
            raise RuntimeError(
                f"step {step}: weight {differing[0]} differs between ranks ({_who(differing[0], everyones)}){more}: "
                "something has changed it on one rank alone, such as code that asks for the rank, an operation that is "
                "not deterministic, or a faulty device; drift_check_steps=1 finds the update, and an older checkpoint "
                "is from before"
            )


def _who(name: str, everyones: list[Mapping[str, int]]) -> str:
    """``rank 1 from rank 0``: who differs from most ranks; of as many, from those of the lowest rank."""
    values = [hashes.get(name) for hashes in everyones]
    usual = collections.Counter(values).most_common(1)[0][0]
    odd = [rank for rank, value in enumerate(values) if value != usual]
    return f"{_listed(odd)} from {_listed([rank for rank in range(len(values)) if rank not in odd])}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


@torch.no_grad()
def hash_parameters(model: nn.Module) -> dict[str, int]:
    """A hash of 64 bits of each parameter's bits, by name; the same on all devices.

    It is the sum of the parameter's words times random odd numbers, modulo 2^64, so that every single bit that is
    flipped is noticed: the zero's sign, or a bit of a NaN. Other differences, elements that have changed places among
    them, are missed with a chance of 2^-32 at most. Sums of integers are exact in any order. The device is waited for
    once.
    """
    # sharded parameters are other ones on each rank; they belong to torch.distributed.tensor, which is slow to import
    parameters = {name: p for name, p in model.named_parameters() if not hasattr(p, "device_mesh")}
    factors: dict[torch.device, torch.Tensor] = {}
    hashes = []
    for parameter in parameters.values():
        if parameter.device not in factors:
            factors[parameter.device] = _odd_numbers(parameter.device)
        hashes.append(_hash(parameter, factors[parameter.device]))
    if not hashes:
        return {}
    return dict(zip(parameters, torch.stack([value.to(hashes[0].device) for value in hashes]).tolist()))


def _odd_numbers(device: torch.device) -> torch.Tensor:
    numbers = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=torch.Generator().manual_seed(0))
    return (numbers | 1).to(device)


def _hash(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The hash, on the tensor's device."""
    words = tensor.reshape(-1).view(_WORDS.get(tensor.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in words.split(_CHUNK):
        total = total * _MULTIPLIER + (chunk * factors[: len(chunk)]).sum()
    return total

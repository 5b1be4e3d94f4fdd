"""Gradients over several ranks: a DistributedDataParallel for each optimizer, through which the model is entered."""

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.distributed import Ranks
from trainer.model import Losses, Outputs
from trainer.optimizers import parameters_of

if TYPE_CHECKING:
    from trainer.fsdp import Shards

# which parameters a pass uses may change from pass to pass; gradients that lie in the buckets need not be copied back
_OPTIONS = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
Step = Callable[[], tuple[Outputs, Losses]]


def build_reducers(
    shards: "Shards | None",
    model: nn.Module,
    optimizers: list[Optimizer],
    ranks: Ranks,
    device: torch.device,
    overlap: bool,
) -> "Reducers | Shards":
    """What sums the gradients over the ranks: the shards of a model, if it is sharded (see fsdp.py)."""
    return Reducers(model, optimizers, ranks, device, overlap) if shards is None else shards.attach(optimizers)


class Reducers:
    """Sums each optimizer's gradients over the ranks while the backward pass goes on, bucket by bucket.

    Each optimizer has a reducer of its own, which knows its parameters alone: a pass communicates what its optimizer
    needs, and outputs that one pass hands to the next are nobody else's business. Only the loss goes through it:
    autograd otherwise frees the graph of all outputs in the first backward pass.

    With one rank the model is called as it is.

    Args:
        model: whose gradients they are.
        optimizers: the Trainer's, in the order in which they are stepped, which is the same on all ranks.
        ranks: the process group must be open when a step is made.
        device: where losses are.
        overlap: False sums the gradients after the backward pass instead.

    Raises:
        ValueError: a layer has sparse gradients, and there are several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        ranks: Ranks,
        device: torch.device,
        overlap: bool = True,
    ) -> None:
        for name, layer in model.named_modules() if ranks.world_size > 1 else ():
            if getattr(layer, "sparse", False) is True:
                raise ValueError(f"{name}: sparse=True: its gradients cannot be summed over ranks; build it without")
        self._optimizers, self._ranks, self._device = optimizers, ranks, device
        parameters = [p for optimizer in optimizers for p in {id(p): p for p in parameters_of(optimizer)}.values()]
        # one that two optimizers have would be known to two reducers, each of which waits for it in the other's pass
        is_shared = len(set(parameters)) < len(parameters)
        self._is_used = ranks.world_size > 1 and overlap and not is_shared
        self._reducers: dict[int, DistributedDataParallel] = {}
        self._covered: list[list[nn.Parameter]] = [[] for _ in optimizers]  # parameters that a reducer knows
        self._left_out = [parameters_of(optimizer) for optimizer in optimizers]  # those that were always frozen
        self._anchors = [nn.Parameter(torch.zeros((), device=device)) for _ in optimizers]

    def begin(self) -> None:
        """Forget a pass that failed before the end of its backward pass."""
        for reducer in self._reducers.values():
            reducer.reducer._reset_state()
        for anchor in self._anchors:
            anchor.grad = None

    def enter(self, idx: int, step: Step, is_last: bool) -> tuple[Outputs, Losses]:
        """Run an optimizer's step for one batch of the window.

        The gradients of the last batch's backward pass, with those that were accumulated before, are summed over the
        ranks. A rank that has no loss for the last batch takes part at once, by a backward pass of nothing.

        Args:
            idx: the optimizer's.
            step: gives outputs and losses, or no losses where the model skips the batch.
            is_last: of the window's batches.

        Returns:
            What step gives; its ``loss`` is to be multiplied with ``scale`` before the backward pass.
        """
        if not self._is_used:
            return step()
        if self._left_out[idx]:
            # the model may thaw them for this very pass: GANs freeze, in each pass, what it does not train
            result = step()
            reducer, step = self._reducer(idx), lambda: result
        else:
            reducer = self._reducer(idx)
        if is_last:
            loss = reducer(step)
        else:
            with reducer.no_sync():
                loss = reducer(step)
        (outputs, losses), reducer.module.result = reducer.module.result, None
        if losses:
            return outputs, {**losses, "loss": loss}
        if is_last:
            loss.backward()
        return outputs, losses

    @property
    def scale(self) -> int:
        """What losses are multiplied with, since DistributedDataParallel divides gradients by it."""
        return self._ranks.world_size if self._is_used else 1

    def inputs(self, idx: int, parameters: list[nn.Parameter] | None) -> list[nn.Parameter] | None:
        """What a backward pass that is only to reach these parameters has to reach."""
        return [*parameters, self._anchors[idx]] if parameters is not None and self._is_used else parameters

    def summed(self, idx: int, losses: torch.Tensor, has_loss: bool) -> tuple[torch.Tensor, bool]:
        """After the window's last backward pass: the sum of losses, and whether any rank had one, on all ranks.

        Args:
            idx: the optimizer's.
            losses: this rank's sum.
            has_loss: whether this rank had one.
        """
        if not self._is_used:
            return losses, self._ranks.sum_gradients(parameters_of(self._optimizers[idx]), losses, has_loss)
        # a rank without a loss has gradients where another rank had them
        has_gradients = any(p.grad is not None for p in parameters_of(self._optimizers[idx]))
        # without any, all are frozen or unused, on all ranks
        has_loss = has_gradients or self._ranks.any(has_loss)
        losses, self._anchors[idx].grad = self._anchors[idx].grad, None
        return losses, has_loss

    def _reducer(self, idx: int) -> DistributedDataParallel:
        """Built when it is needed, and again when a parameter that was frozen until now is no longer."""
        thawed = []
        if self._left_out[idx]:
            # of all ranks: one that skips the batch may not have come to where the model thaws them
            found = self._ranks.highest([parameter.requires_grad for parameter in self._left_out[idx]])
            thawed = [parameter for parameter, is_thawed in zip(self._left_out[idx], found) if is_thawed]
        if idx in self._reducers and not thawed:
            return self._reducers[idx]
        _use_up_the_warning(self._device)
        self._covered[idx] += thawed
        known = set(self._covered[idx])
        self._left_out[idx] = [parameter for parameter in self._left_out[idx] if parameter not in known]
        frozen = [parameter for parameter in known if not parameter.requires_grad]
        for parameter in frozen:  # for now: a reducer is not built of such
            parameter.requires_grad_(True)
        step = _Step(self._covered[idx], self._anchors[idx])
        self._reducers[idx] = DistributedDataParallel(step, **_OPTIONS, init_sync=False)
        for parameter in frozen:
            parameter.requires_grad_(False)
        return self._reducers[idx]


@functools.cache
def _use_up_the_warning(device: torch.device) -> None:
    """Let torch say once, where nobody reads it, that no parameter is unused and that to look for them takes time.

    Its C++ prints it on every rank, past Python's warnings. To find unused parameters is no choice of the user's here.
    """
    # weights that are drawn here would shift the training's random numbers, of a fresh process only
    net = DistributedDataParallel(nn.utils.skip_init(nn.Linear, 1, 1, device=device), **_OPTIONS)
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        net(torch.zeros(1, 1, device=device)).sum().backward()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


class _Step(nn.Module):
    """A step of the model, as DistributedDataParallel wants it: with one optimizer's parameters, and a loss as output.

    The anchor is a parameter that every loss depends on, with a gradient that is the loss: the sum of losses over the
    ranks comes with the gradients, and a rank without a loss has something to go backward from.
    """

    def __init__(self, parameters: list[nn.Parameter], anchor: nn.Parameter) -> None:
        super().__init__()
        for i, parameter in enumerate(parameters):
            self.register_parameter(str(i), parameter)
        self.anchor = anchor  # the last one: in the bucket that is sent first
        self.result: tuple[Outputs, Losses] | None = None

    def forward(self, step: Step) -> torch.Tensor:
        self.result = step()
        if not self.result[1]:
            return self.anchor * 0.0
        loss = self.result[1]["loss"]
        if not loss.requires_grad and any(p.requires_grad for p in self.parameters() if p is not self.anchor):
            return loss  # a mistake of the model's, of which autograd tells
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()  # a scaled loss need not fit into half precision
        return loss + self.anchor * loss.detach()

"""Losses and gradients that are not finite are caught before they reach the weights."""

import collections
import logging
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config import TrainerConfig
from trainer.precision import Precision
from trainer.sharded import full, local, sum_over_ranks

logger = logging.getLogger("trainer")
MAX_OVERFLOWS = 50  # in a row: the loss scale starts at 2^16 and is halved by each


class _Pending(NamedTuple):
    """An update whose verdict is still on its way from the device."""

    step: int
    batches: list[Any]
    values: torch.Tensor  # on the host, once `copied`: the loss, then the norm of each gradient
    names: list[str]  # of the parameters
    copied: Any  # an event, or None where copies are done at once


class NanGuard:
    """Decides before every optimizer's step whether it may change the weights.

    ``nan_policy: raise`` stops the training with a FloatingPointError that names the step, the loss and the first bad
    parameter, and saves the batch; ``skip`` leaves such updates out, and stops after ``nan_skip_limit`` in a row.

    The host has to know the verdict before it goes on. On the CPU it can look; under loss scaling, or to skip, it
    waits for the device. Otherwise a fused optimizer asks the device by itself (its ``found_inf``): the guard then
    hears of a bad update some updates later, and none of these has changed a weight.

    Attributes:
        skipped: updates of an optimizer that were skipped, without those that overflowed under loss scaling.
        reads_are_free: the host and the device are one.
    """

    def __init__(
        self,
        config: TrainerConfig,
        model: nn.Module,
        precision: Precision,
        device: torch.device,
        in_step: bool = False,
    ) -> None:
        self._in_step = in_step
        self._skips, self._limit = config.nan_policy == "skip", config.nan_skip_limit
        self._model, self._precision, self._device = model, precision, device
        self.reads_are_free = device.type == "cpu"
        self.folder: Path | None = None  # where bad batches are saved
        self.suffix = ""  # of their files' names: one for each rank
        self.skipped = 0
        self._in_a_row, self._overflows_in_a_row = collections.Counter(), collections.Counter()  # by optimizer
        self._step, self._batches, self._losses = 0, [], []
        self._buffers: dict[str, torch.Tensor] = {}
        self._bad: torch.Tensor | None = None  # 1.0 from the first bad update on
        self._pending: collections.deque[_Pending] = collections.deque()

    def begin(self, step: int, batches: list[Any]) -> None:
        """An update begins, from these batches (as the loader gave them)."""
        self._look_at_pending(wait=False)
        self._step, self._batches = step, batches
        self._losses.clear()
        if self._skips:
            # a forward pass on a bad batch writes into BatchNorm's running statistics, whether it is used or not
            self._buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}

    def saw(self, loss: torch.Tensor) -> None:
        """A loss that is minimised in this update."""
        self._losses.append(loss.detach())

    def sum_of_losses(self) -> torch.Tensor:
        """Of those since the last optimizer; not finite if one of them is not."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).float().sum() if losses else torch.zeros((), device=self._device)

    def allows(self, idx: int, optimizer: Optimizer, losses: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether optimizer ``idx`` may step, after losses of this sum and with unscaled gradients of this norm.

        Raises:
            FloatingPointError: a loss or a gradient is not finite, and the policy is to stop.
        """
        if self._is_deferred(optimizer):
            self._defer(optimizer, losses, norm)
            return True
        loss, norm = self._read([losses, norm])
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row[idx] = self._overflows_in_a_row[idx] = 0
            return True
        if math.isfinite(loss) and self._precision.scaling and self._overflows_in_a_row[idx] < MAX_OVERFLOWS:
            self._overflows_in_a_row[idx] += 1
            self._precision.overflows += 1  # not the loss, but its scale was too large: it will be halved
            return False
        self._in_a_row[idx] += 1
        parameter = self._first_bad_parameter()
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        if not self._skips or self._in_a_row[idx] >= self._limit:
            row = f" (bad update number {self._in_a_row[idx]} in a row)" if self._in_a_row[idx] > 1 else ""
            self._stop(self._step, what + row, parameter, self._batches)
        logger.warning("step %d: %s%s; this update is skipped", self._step, what, _first(parameter))
        self.skipped += 1
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                if name in self._buffers:  # not made in this update
                    buffer.copy_(self._buffers[name])
        return False

    def finish(self) -> None:
        """Wait for the verdict on every update so far; called before anything is saved.

        Raises:
            FloatingPointError: see allows.
        """
        self._look_at_pending(wait=True)

    def stats(self) -> dict[str, float]:
        """What is worth logging."""
        return {"skipped_updates": self.skipped} if self._skips else {}

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        in_a_row = {"in_a_row": dict(self._in_a_row), "overflows_in_a_row": dict(self._overflows_in_a_row)}
        return {"skipped": self.skipped, "overflows": self._precision.overflows, **in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting; earlier states do not say how many were in a row."""
        self.skipped, self._precision.overflows = state["skipped"], state["overflows"]
        self._in_a_row = collections.Counter(state.get("in_a_row", {}))
        self._overflows_in_a_row = collections.Counter(state.get("overflows_in_a_row", {}))

    def _read(self, tensors: list[torch.Tensor]) -> list[float]:
        if self.reads_are_free:
            # not item(), which is a synchronisation on every other device and is counted as one by the tests
            return [float(tensor.float().numpy()) for tensor in tensors]
        return torch.stack([tensor.float() for tensor in tensors]).tolist()

    # ---- fused optimizers on a device ----

    def _is_deferred(self, optimizer: Optimizer) -> bool:
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        return fused and not self.reads_are_free and not self._skips and not self._precision.scaling

    def _defer(self, optimizer: Optimizer, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Let the device decide: a fused optimizer changes nothing where ``found_inf`` is 1."""
        bad = 1.0 - torch.isfinite(loss + norm.float()).float()
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        optimizer.found_inf, optimizer.grad_scale = self._bad, None
        named = [(name, p.grad) for name, p in self._model.named_parameters() if p.grad is not None]
        norms = torch._foreach_norm([local(gradient) for _, gradient in named])
        # of sharded gradients the sum of their parts' norms, which is finite if all of them are
        norms = sum_over_ranks(torch.stack([norm.float() for norm in norms]), named[0][1])
        values = torch.cat([loss.reshape(1), norms])
        on_cuda = values.device.type == "cuda"
        host = torch.empty(values.shape, pin_memory=on_cuda).copy_(values, non_blocking=True)
        copied = torch.cuda.Event() if on_cuda else None
        if copied is not None:
            copied.record()
        names = [name for name, _ in named]
        self._pending.append(_Pending(self._step, self._batches, host, names, copied))

    def _look_at_pending(self, wait: bool) -> None:
        # more than four would keep too many batches alive; the device has work for long enough
        while self._pending:
            first = self._pending[0]
            if first.copied is not None:
                # all ranks have to hear of it in the same update, whichever device is ahead
                if not wait and len(self._pending) <= 4 and (self._in_step or not first.copied.query()):
                    return
                first.copied.synchronize()
            self._pending.popleft()
            values = first.values.tolist()
            if all(map(math.isfinite, values)):
                continue
            names = [name for name, value in zip(first.names, values[1:]) if not math.isfinite(value)]
            what = "gradient norm is not finite" if math.isfinite(values[0]) else f"loss is {values[0]}"
            parameter = f"gradient of {names[0]}" if names else None
            self._stop(first.step, what, parameter, first.batches)

    # ---- what is told ----

    def _first_bad_parameter(self) -> str | None:
        parameters = list(self._model.named_parameters())
        gradients = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
        for kind, found in (("weight", parameters), ("gradient of", gradients)):
            for name, tensor in found:
                if full((~torch.isfinite(tensor.coalesce().values() if tensor.is_sparse else tensor)).sum()) > 0:
                    return f"{kind} {name}"
        return None

    def _stop(self, step: int, what: str, parameter: str | None, batches: list[Any]) -> None:
        saved = ""
        if self.folder is not None:
            path = self.folder / f"bad_batch_{step}{self.suffix}.pth"
            try:
                torch.save({"step": step, "batches": batches, "what": what, "parameter": parameter}, path)
                saved = f"; its batches are saved in {path}"
            except (pickle.PicklingError, AttributeError, TypeError) as error:  # a batch may hold anything
                saved = f"; its batches cannot be saved ({error})"
        advice = "look at the batch, lower lr or grad_clip" + ("" if self._skips else ", or set nan_policy=skip")
        raise FloatingPointError(f"step {step}: {what}{_first(parameter)}{saved}; the update was not made: {advice}")


def _first(parameter: str | None) -> str:
    return f", first in the {parameter}" if parameter else ""

"""Mixed precision: the forward pass under autocast, and loss scaling for fp16."""

import contextlib
from typing import Any

import torch
from torch.optim import Optimizer

from trainer.config import TrainerConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """One place for autocast and the gradient scaler; in fp32 it adds nothing to a plain backward and step.

    Attributes:
        scaler: the ``torch.amp.GradScaler`` (disabled unless the config asks for fp16, or for ``use_grad_scaler``).
        overflows: updates that were skipped because the scaled gradients overflowed.
    """

    def __init__(self, config: TrainerConfig, device: torch.device) -> None:
        self.device_type = device.type
        self.dtype = DTYPES[config.precision] if config.mixed_precision else None
        scaling = self.dtype is torch.float16 or config.use_grad_scaler
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaling)
        self.scaling = scaling
        self.overflows = 0
        self._unscaled: set[int] = set()  # ids of the optimizers whose gradients are unscaled in this update

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def no_autocast(self) -> contextlib.AbstractContextManager:
        """The context of what is called inside ``autocast`` and must not be under it."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device_type, enabled=False)

    def backward(
        self, loss: torch.Tensor, weight: float | torch.Tensor, parameters: list | None = None, **options: Any
    ) -> None:
        """Add the gradient of ``weight * loss`` to the parameters' (only to these, when they are given).

        ``options`` are those of ``Tensor.backward``, such as retain_graph.
        """
        if isinstance(weight, torch.Tensor) or weight != 1.0:
            loss = loss * weight
        if parameters is not None:
            # `inputs` also spares autograd the gradients of the other optimizers' weights; it refuses frozen ones
            options["inputs"] = [parameter for parameter in parameters if parameter.requires_grad]
        self.scaler.scale(loss).backward(**options)

    def begin(self) -> None:
        """Forget an update that failed between unscale and update."""
        self._unscaled.clear()
        if self.scaling:
            self.scaler._per_optimizer_states.clear()

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the loss scale; a second call in one update does nothing."""
        if not self.scaling or id(optimizer) in self._unscaled:
            return
        # with no gradient at all there is nothing to unscale, and the scaler would have nothing to judge by
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._unscaled.add(id(optimizer))
            # the class's: on the object it may be the one that ManualOptimization has put there
            torch.amp.GradScaler.unscale_(self.scaler, optimizer)

    def update(self) -> None:
        """Adapt the loss scale, once after all optimizers of an update.

        ``scaler.step`` is not used: it reads from the device whether a gradient overflowed, which the norm has told.
        """
        if self._unscaled:
            torch.amp.GradScaler.update(self.scaler)
            self._unscaled.clear()

    def stats(self) -> dict[str, float]:
        """What is worth logging: the loss scale, and how many updates it has skipped."""
        return {"amp_scaler": self.scaler.get_scale(), "amp_skipped": self.overflows} if self.scaling else {}

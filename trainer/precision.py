"""Mixed precision: the forward pass under autocast, and loss scaling for fp16."""

import contextlib

import torch
from torch.optim import Optimizer

from trainer.config import TrainerConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """One place for autocast and the gradient scaler; in fp32 it adds nothing to a plain backward and step.

    Attributes:
        scaler: the ``torch.amp.GradScaler`` (disabled unless the config asks for fp16).
    """

    def __init__(self, config: TrainerConfig, device: torch.device) -> None:
        self.device_type = device.type
        self.dtype = DTYPES[config.precision] if config.mixed_precision else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self._stepped = False

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: torch.Tensor, weight: float, parameters: list[torch.nn.Parameter] | None) -> None:
        """Add the gradient of ``weight * loss`` to the parameters' (only to these, when they are given)."""
        if weight != 1.0:
            loss = loss * weight
        if parameters is not None:
            # `inputs` also spares autograd the gradients of the other optimizers' weights; it refuses frozen ones
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.scaler.scale(loss).backward(inputs=parameters)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the loss scale; notes whether one of them is not finite."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Step the optimizer; False when the scaler skipped it because a gradient was not finite.

        A fused optimizer skips inside its kernel, where nobody sees it: True.
        """
        self._stepped = True
        if not self.scaler.is_enabled():
            optimizer.step()
            return True
        ran = []
        handle = optimizer.register_step_post_hook(lambda *_: ran.append(True))
        self.scaler.step(optimizer)
        handle.remove()
        return bool(ran)

    def update(self) -> None:
        """Adapt the loss scale, once after all optimizers of an update."""
        if self._stepped and self.scaler.is_enabled():
            self.scaler.update()
        self._stepped = False

    def stats(self) -> dict[str, float]:
        """What is worth logging: the loss scale."""
        return {"amp_scaler": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

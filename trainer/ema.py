"""An exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer.sharded import local, shard_as, unlocal


class EMA:
    """Keeps an exponential moving average of all floating-point parameters, on their devices, at least in fp32.

    Buffers are not averaged: the averaged model has the buffers of the trained one. The average follows fast at first:
    after ``t`` updates the decay is ``min(decay, (1 + t) / (10 + t))``, as in TensorFlow's ExponentialMovingAverage.

    Args:
        model: on its device; its parameters may change in place afterwards, and may be shared between modules.
        decay: what is kept of the average at each update, in [0, 1].

    Attributes:
        updates: updates so far.

    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay={decay}: must be in [0, 1], such as 0.999")
        self.decay, self.updates, self._model = decay, 0, model
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]  # a shared one comes once
        self._averages = [self._wide(p).clone() for p in self._weights()]

    def _weights(self) -> list[torch.Tensor]:
        """The weights; of sharded ones this rank's part, in their memory."""
        return [local(p.detach()) for p in self._parameters]

    @staticmethod
    def _wide(tensor: torch.Tensor) -> torch.Tensor:
        # half precision is too coarse: 0.001 of a weight's change would be rounded away
        return tensor.float() if tensor.element_size() < 4 else tensor

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the weights that the model has now, for example those of a checkpoint."""
        self.updates = 0
        torch._foreach_copy_(self._averages, self._weights())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's weights; call it after each update of these."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._averages, [self._wide(p) for p in self._weights()], 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averaged weights inside the block, and its own again afterwards.

        The weights are copied, not exchanged: whoever knows their addresses (flattened RNN weights, a captured CUDA
        graph) goes on working. For the length of the block this takes as much memory as the gradients do, which are
        not there between two updates. What the block changes in the weights is lost.
        """
        own = [p.clone() for p in self._weights()]
        try:
            with torch.no_grad():
                torch._foreach_copy_(self._weights(), self._averages)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights(), own)

    def state_dict(self) -> dict[str, Any]:
        """``weights``, a whole state dict of the averaged model (with the model's buffers), and ``updates``.

        The tensors are not copied: they change with the next update.
        """
        averages = {id(p): unlocal(average, p) for p, average in zip(self._parameters, self._averages)}
        state = self._model.state_dict(keep_vars=True)
        return {"weights": {name: averages.get(id(v), v) for name, v in state.items()}, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the average of another EMA of an equal model; the buffers in the state are not used.

        Raises:
            ValueError: a weight is missing, or has another shape; nothing is changed then.
        """
        names = {id(p): name for name, p in self._model.named_parameters()}
        names = [names[id(p)] for p in self._parameters]
        weights, problems = state["weights"], []
        for name, parameter in zip(names, self._parameters):
            if name not in weights:
                problems.append(f"missing: {name}")
            elif weights[name].shape != parameter.shape:
                problems.append(f"{name}: has shape {list(weights[name].shape)}, the model {list(parameter.shape)}")
        if problems:
            raise ValueError("\n  - ".join(["the averaged weights (EMA) are of another model", *problems[:10]]))
        self.updates = state["updates"]
        found = [local(shard_as(weights[name], p)) for name, p in zip(names, self._parameters)]
        torch._foreach_copy_(self._averages, found)

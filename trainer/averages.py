"""Means of losses that stay on the device until somebody reads them."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def named(losses: Mapping[str, Any], idx: int | None, owners: dict[str, int]) -> dict[str, torch.Tensor]:
    """A model's losses that are numbers, as tensors on the device of ``loss``, under the names that are logged.

    Args:
        losses: what a step returned.
        idx: which of several optimizers they belong to; None when there is one.
        owners: which optimizer a name was first seen with, kept by the caller. Of several optimizers ``loss`` is
            ``loss_0``, ``loss_1`` ..., and a name that another optimizer has, too, is ``name-1``.
    """
    device, values = losses["loss"].device, {}
    for name, value in losses.items():
        if idx is not None and name == "loss":
            name = f"loss_{idx}"
        elif idx is not None and owners.setdefault(name, idx) != idx:
            name = f"{name}-{idx}"
        if isinstance(value, torch.Tensor):
            values[name] = value.detach().to(device, non_blocking=True)
        elif isinstance(value, int | float):
            values[name] = torch.full((), float(value), device=device)  # a tensor made there: nothing waits for a copy
    return values


def target_loss(means: Mapping[str, float], target: str | None, optimizers: int) -> float:
    """The loss that decides which model is best: the target, else ``loss``, else the mean of ``loss_0``, ``loss_1``.

    Raises:
        ValueError: there is no loss of that name.
    """
    names = [target] if target else ["loss"] if optimizers == 1 else [f"loss_{i}" for i in range(optimizers)]
    missing = [name for name in names if name not in means]
    if missing:
        raise ValueError(f"target_loss={missing[0]!r}: not among the losses {', '.join(means)}")
    return sum(means[name] for name in names) / len(names)


class Averages:
    """Records losses step by step without waiting for the device; reads them all in one transfer.

    Every mean is weighted by the number of samples, so that a short last batch counts for what it holds.
    """

    def __init__(self, unit: str = "step") -> None:
        self._unit = unit  # what is counted, for messages
        self._pending: list[tuple[int, tuple[str, ...], torch.Tensor, float, bool]] = []
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last_step = -1
        self._last: dict[str, tuple[float, float]] = {}

    def add(self, step: int, losses: Mapping[str, torch.Tensor], samples: float, must_be_finite: bool = True) -> None:
        """Record scalars of ``samples`` samples; several calls with one ``step`` (accumulation) are averaged.

        Values that need not be finite (gradient norms of updates that loss scaling skips) are then left out.

        Raises:
            ValueError: a loss is no scalar.
        """
        if not losses:
            return
        for name, value in losses.items():
            if value.numel() != 1:
                raise ValueError(f"loss {name!r} has shape {list(value.shape)}: return a scalar, such as its mean()")
        # stacking copies: a captured graph may overwrite its outputs in the next step
        vector = torch.stack([value.detach().reshape(()) for value in losses.values()])
        self._pending.append((step, tuple(losses), vector, float(samples), must_be_finite))

    def read(self) -> None:
        """Bring what was recorded to the host, in one transfer.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names the loss and the step.
        """
        if not self._pending:
            return
        values = torch.cat([vector for _, _, vector, _, _ in self._pending]).tolist()
        position = 0
        pending, self._pending = self._pending, []
        for step, names, _, samples, must_be_finite in pending:
            if step != self._last_step:
                self._last_step, self._last = step, {}
            for name in names:
                value = values[position]
                position += 1
                if not math.isfinite(value) and not must_be_finite:
                    continue
                if not math.isfinite(value):
                    raise FloatingPointError(f"{self._unit} {step}: {name} is {value}")
                self._sums[name] = self._sums.get(name, 0.0) + value * samples
                self._weights[name] = self._weights.get(name, 0.0) + samples
                total, weight = self._last.get(name, (0.0, 0.0))
                self._last[name] = (total + value * samples, weight + samples)

    @property
    def last(self) -> dict[str, float]:
        """The values of the last step that was read."""
        return {name: total / weight for name, (total, weight) in self._last.items()}

    @property
    def means(self) -> dict[str, float]:
        """The means over all samples that were read."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The running sums; call ``read`` first."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Go on with the sums of another Averages."""
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])

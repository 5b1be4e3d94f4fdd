"""Means of losses that stay on the device until somebody reads them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Gather = Callable[[Any], list[Any]]


def named(losses: Mapping[str, Any], idx: int | None, owners: dict[str, int]) -> dict[str, torch.Tensor]:
    """A model's losses that are numbers, as tensors on the device of the first, under the names that are logged.

    Args:
        losses: what a step returned; one of them at least is a tensor.
        idx: which of several optimizers they belong to; None when there is one.
        owners: which optimizer a name was first seen with, kept by the caller. Of several optimizers ``loss`` is
            ``loss_0``, ``loss_1`` ..., and a name that another optimizer has, too, is ``name-1``.
    """
    tensor = losses.get("loss", next((v for v in losses.values() if isinstance(v, torch.Tensor)), None))
    device, values = None if tensor is None else tensor.device, {}
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


def target_loss(means: Mapping[str, float], target: str | None, optimizers: int) -> float | None:
    """The loss that decides which model is best: the target, else ``loss``, else the mean of ``loss_0``, ``loss_1``.

    None if no target is named, and there is none of these: models with their own ``optimize`` name losses as they like.

    Raises:
        ValueError: there is no loss of the target's name.
    """
    if target and target not in means:
        raise ValueError(f"target_loss={target!r}: not among the losses {', '.join(means)}")
    names = [target] if target else [f"loss_{i}" for i in range(optimizers)] if optimizers > 1 else []
    # an optimizer that is skipped has no loss; an eval_step without optimizer_idx has a single one for all
    found = [means[name] for name in names if name in means] or [means[name] for name in ("loss",) if name in means]
    return sum(found) / len(found) if found else None


class Averages:
    """Records losses step by step without waiting for the device; reads them all in one transfer.

    Every mean is weighted by the number of samples, so that a short last batch counts for what it holds.

    Args:
        unit: what is counted, for messages.
        not_finite: what happens to values that are not finite: "raise", "leave out", or "keep", for a mean that is not
            finite either.
        gather: makes a list of what all ranks hand to it; then the means are those of all ranks.
    """

    def __init__(self, unit: str = "step", not_finite: str = "raise", gather: Gather | None = None) -> None:
        self._unit = unit
        self._not_finite = not_finite
        self._gather = gather
        self._pending: list[tuple[int, tuple[str, ...], torch.Tensor, float, bool]] = []
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last_step = -1
        self._last: dict[str, tuple[float, float]] = {}

    def add(self, step: int, losses: Mapping[str, torch.Tensor], samples: float, must_be_finite: bool = True) -> None:
        """Record scalars of ``samples`` samples; several calls with one ``step`` (accumulation) are averaged.

        Values that need not be finite (gradient norms: an update may be skipped for them) are then left out.

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
        """Bring what was recorded to the host, in one transfer; all ranks together.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names the loss and the step.
        """
        if not self._pending and self._gather is None:
            return
        pending, self._pending = self._pending, []
        values = torch.cat([vector for _, _, vector, _, _ in pending]).tolist() if pending else []
        labels = [(step, name, samples, strict) for step, names, _, samples, strict in pending for name in names]
        entries = [(step, name, value, samples, strict) for (step, name, samples, strict), value in zip(labels, values)]
        if self._gather is not None:
            entries = [entry for of_rank in self._gather(entries) for entry in of_rank]
        for step, name, value, _, strict in entries:
            if strict and self._not_finite == "raise" and not math.isfinite(value):
                raise FloatingPointError(f"{self._unit} {step}: {name} is {value}")
        newest = max((step for step, *_ in entries), default=self._last_step)
        if newest != self._last_step:
            self._last_step, self._last = newest, {}
        for step, name, value, samples, strict in entries:
            counts = math.isfinite(value) or (strict and self._not_finite == "keep")
            if counts and samples:
                self._sums[name] = self._sums.get(name, 0.0) + value * samples
                self._weights[name] = self._weights.get(name, 0.0) + samples
                if step == newest:
                    total, weight = self._last.get(name, (0.0, 0.0))
                    self._last[name] = (total + value * samples, weight + samples)

    def drop_unread(self) -> None:
        """Forget what was recorded and not read, such as the losses of an update that failed."""
        self._pending.clear()

    @property
    def avg_values(self) -> dict[str, float]:
        """The means under Coqui's names, ``avg_loss``; over several ranks, as they were read last."""
        if self._gather is None:
            self.read()
        return {f"avg_{name}": value for name, value in self.means.items()}

    def __getitem__(self, name: str) -> float:
        """A mean by Coqui's name, ``avg_loss``."""
        return self.avg_values[name]

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

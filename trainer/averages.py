"""Means of losses that stay on the device until somebody reads them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Gather = Callable[[Any], list[Any]]


def scalars(losses: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A model's losses that are numbers, as tensors on the device of the first; one of them at least is a tensor."""
    tensor = losses.get("loss", next((v for v in losses.values() if isinstance(v, torch.Tensor)), None))
    device, values = None if tensor is None else tensor.device, {}
    for name, value in losses.items():
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

    Of several optimizers, ``loss`` is shown as ``loss_0``, ``loss_1`` ... Of any other name that two of them log, the
    first one keeps it, and that of optimizer 1 is ``NAME-1``. Who was first is decided when all ranks' values are
    there, since a rank may skip an optimizer's batch, and is part of the state.

    Args:
        unit: what is counted, for messages.
        not_finite: what happens to values that are not finite: "raise", "leave out", or "keep", for a mean that is not
            finite either.
        gather: makes a list of what all ranks hand to it; then the means are those of all ranks.
        owners: which optimizer a name was first seen with; shared by those that are to agree on names.
    """

    def __init__(
        self,
        unit: str = "step",
        not_finite: str = "raise",
        gather: Gather | None = None,
        owners: dict[str, int] | None = None,
    ) -> None:
        self._unit = unit
        self._not_finite = not_finite
        self._gather = gather
        self._owners = {} if owners is None else owners
        self._pending: list[tuple[int, int | None, tuple[str, ...], torch.Tensor, float, bool]] = []
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last_step = -1
        self._last: dict[str, tuple[float, float]] = {}

    def add(
        self,
        step: int,
        losses: Mapping[str, torch.Tensor],
        samples: float,
        must_be_finite: bool = True,
        idx: int | None = None,
    ) -> None:
        """Record scalars of ``samples`` samples; several calls with one ``step`` (accumulation) are averaged.

        Args:
            step: counted in the unit.
            losses: by name.
            samples: which they are means of.
            must_be_finite: False for what may be otherwise, and is then left out (gradient norms: an update may be
                skipped for them).
            idx: which of several optimizers they belong to; None when there is one, or for names of their own.

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
        self._pending.append((step, idx, tuple(losses), vector, float(samples), must_be_finite))

    def read(self) -> None:
        """Bring what was recorded to the host, in one transfer; all ranks together.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names the loss and the step.
        """
        if not self._pending and self._gather is None:
            return
        pending, self._pending = self._pending, []
        values = torch.cat([entry[3] for entry in pending]).tolist() if pending else []
        labels = [(step, idx, name, n, strict) for step, idx, names, _, n, strict in pending for name in names]
        entries = [(step, idx, name, value, n, strict) for (step, idx, name, n, strict), value in zip(labels, values)]
        if self._gather is not None:
            entries = [entry for of_rank in self._gather(entries) for entry in of_rank]
            entries.sort(key=lambda entry: entry[0])  # sums are then rounded alike, however often they are read
        entries = self._named(entries)
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

    def _named(self, entries: list[tuple]) -> list[tuple]:
        """Entries of all ranks under the names that are shown, without the optimizers."""
        for _, idx, name in sorted({entry[:3] for entry in entries if entry[1] is not None}):
            self._owners.setdefault(name, idx)
        return [(step, self._shown(name, idx), *rest) for step, idx, name, *rest in entries]

    def _shown(self, name: str, idx: int | None) -> str:
        if idx is None:
            return name
        if name == "loss":
            return f"loss_{idx}"
        return name if self._owners[name] == idx else f"{name}-{idx}"

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

    def state_dict(self) -> dict[str, Any]:
        """The running sums, the last values, and whose the names are; call ``read`` first."""
        last = {"last_step": self._last_step, "last": dict(self._last)}
        return {"sums": dict(self._sums), "weights": dict(self._weights), "owners": dict(self._owners), **last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of another Averages; earlier states hold no last values, and no owners of names."""
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])
        self._owners.update(state.get("owners", {}))
        self._last_step, self._last = state.get("last_step", -1), dict(state.get("last", {}))

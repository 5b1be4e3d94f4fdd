"""Early stopping: the training ends when the target loss has not become better for long enough."""

import math
from typing import Any


class EarlyStopping:
    """Counts the evaluations without a better loss.

    Args:
        patience: stop after so many of them in a row, at least 1; None never stops.
        min_delta: a loss is better if it is lower than the best so far by more than this.

    Attributes:
        best: the last loss that was better.
        waited: evaluations since then.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"early_stopping_patience={patience}: at least 1 evaluation is needed, or None")
        if not min_delta >= 0:
            raise ValueError(f"early_stopping_min_delta={min_delta}: must be at least 0")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = math.inf, 0

    def update(self, loss: float) -> None:
        """Count an evaluation with this target loss. NaN is never better."""
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1

    @property
    def should_stop(self) -> bool:
        """Whether the training has waited long enough."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def message(self) -> str:
        """Why it stops: ``no better loss than 0.123 in 5 evaluations``."""
        better = "no better loss" if self.min_delta == 0 else f"no loss better by more than {self.min_delta:g}"
        evaluations = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        return f"{better} than {self.best:.5g} in {evaluations}"

    def state_dict(self) -> dict[str, Any]:
        """The best loss and the count."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.best, self.waited = state["best"], state["waited"]

"""The two learning rate schedules of speech models that torch.optim.lr_scheduler lacks."""

from bisect import bisect_right

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class NoamLR(LRScheduler):
    """Linear warm-up, then decay with the inverse square root (Vaswani et al. 2017, section 5.3).

    The rate at count t (from 1) is ``base * min(t / warmup_steps, sqrt(warmup_steps / t))``: the highest one, reached
    at ``warmup_steps``, is the group's own rate and not the paper's d_model^-0.5 * warmup_steps^-0.5.

    Args:
        optimizer: each of its groups keeps its own base rate.
        warmup_steps: length of the warm-up, in what the scheduler counts (updates, epochs or evaluations).
        last_epoch: count to go on from; -1 starts.

    Raises:
        ValueError: ``warmup_steps`` is not above 0.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0.1, last_epoch: int = -1) -> None:
        if not warmup_steps > 0:
            raise ValueError(
                f"warmup_steps={warmup_steps}: must be above 0; leave lr_scheduler out for a constant rate"
            )
        self.warmup_steps = float(warmup_steps)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the present count."""
        t = self.last_epoch + 1
        scale = self.warmup_steps**0.5 * min(t * self.warmup_steps**-1.5, t**-0.5)
        return [base * scale for base in self.base_lrs]


class StepwiseGradualLR(LRScheduler):
    """Rates written out: from each threshold on, the rate that stands beside it, for all groups.

    Args:
        optimizer: its own rate is not used.
        gradual_learning_rates: ``[[count, rate], ...]``, counts (updates, epochs or evaluations) rising. The first
            rate holds before the first count, too.
        last_epoch: count to go on from; -1 starts.

    Raises:
        ValueError: the list is empty, holds something else than pairs, or its counts do not rise.
    """

    def __init__(self, optimizer: Optimizer, gradual_learning_rates: list[list[float]], last_epoch: int = -1) -> None:
        wanted = "[[0, 1e-3], [20000, 5e-4], ...]"
        if not gradual_learning_rates or any(len(pair) != 2 for pair in gradual_learning_rates):
            raise ValueError(f"gradual_learning_rates={gradual_learning_rates}: must be pairs such as {wanted}")
        self.step_thresholds, self.learning_rates = map(list, zip(*gradual_learning_rates))
        if any(a >= b for a, b in zip(self.step_thresholds, self.step_thresholds[1:])):
            raise ValueError(f"gradual_learning_rates={gradual_learning_rates}: counts must rise, as in {wanted}")
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the present count."""
        reached = bisect_right(self.step_thresholds, self.last_epoch) - 1
        return [self.learning_rates[max(reached, 0)]] * len(self.base_lrs)

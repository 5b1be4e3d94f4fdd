"""Training under torch.profiler."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainer.loggers.base import DashboardLogger

if TYPE_CHECKING:
    from torch.profiler import profile

    from trainer.trainer import Trainer


def profile_fit(
    trainer: "Trainer", torch_profiler: "profile", epochs: int | None = None, small_run: int | None = None
) -> "profile":
    """Train under a profiler, which steps with every update: without dashboard, evaluation, test and checkpoints.

    The training is a real one: the model's weights change, and a later ``fit`` goes on from there. The config, the
    samples, the dashboard and the early stopping are as before when it is done.

    Args:
        trainer: whose ``fit`` is profiled.
        torch_profiler: not started yet. One update is one step of its schedule; the updates that the schedule needs
            are ``(wait + warmup + active) * repeat``, after ``skip_first``.
        epochs: how many epochs to train; the config's by default.
        small_run: train on the first N samples only.

    Returns:
        The profiler, stopped.

    Raises:
        ValueError: small_run, and there are no samples that could be cut; or a number below 1.
    """
    for name, value in (("epochs", epochs), ("small_run", small_run)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    if small_run is not None and trainer.train_samples is None:
        raise ValueError(f"small_run={small_run} cuts the samples, and there are none: hand train_samples over")
    trainer.close_run()
    silent = DashboardLogger()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_changed(trainer, _dashboard=silent, _given_dashboard=silent, early_stopping=None))
        if small_run is not None:
            samples = trainer.train_samples[:small_run]
            stack.enter_context(_changed(trainer, train_samples=samples, train_loader=None))
        # before the config is changed: what the run's folder says of it is what a later fit goes on with
        trainer.open_run()
        stack.callback(trainer.close_run)
        last = trainer.config.epochs if epochs is None else trainer.epochs_done + epochs
        off = {"run_eval": False, "save_checkpoints": False, "model_param_stats": False}
        never = {"test_delay_epochs": last + 1, "plot_step": sys.maxsize}  # what these call draws figures
        stack.enter_context(_changed(trainer.config, epochs=last, **off, **never))
        stack.callback(trainer.callbacks.add("on_train_step_end", lambda _: torch_profiler.step()))
        with torch_profiler:
            trainer.fit()
    return torch_profiler


@contextlib.contextmanager
def _changed(target: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values inside the block."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)

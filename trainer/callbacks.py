"""Calling user code at fixed points of a training: hooks of model, criterion and optimizer, and given functions."""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.checked_config import nearest
from trainer.model import TrainerModel, overrides

NAMES = (
    "on_init_start",
    "on_init_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_step_start",
    "on_train_step_end",
    "before_backward_pass",
    "before_gradient_clipping",
    "on_eval_epoch_start",
    "on_eval_epoch_end",
    "on_eval_step_start",
    "on_eval_step_end",
    "on_keyboard_interrupt",
)


class Callbacks:
    """Collects, once, who wants to hear of what; then ``callbacks("on_epoch_start", trainer)`` calls them in order.

    Args:
        model: its overridden hooks come first.
        others: criteria and optimizers; whatever has a method of the name is called next.
        functions: a user's dict of name to function or list of functions, called last.
    """

    def __init__(
        self,
        model: TrainerModel,
        others: list[Any],
        functions: Mapping[str, Callable | list[Callable]] | None = None,
    ) -> None:
        functions = functions or {}
        for name in functions:
            if name not in NAMES:
                raise ValueError(
                    f"callbacks: {name!r} is no callback{nearest(name, NAMES)}; there are {', '.join(NAMES)}"
                )
        # the same criterion may serve several optimizers: it is called once
        unique = list({id(other): other for other in others}.values())
        self._calls: dict[str, list[Callable]] = {}
        for name in NAMES:
            calls = [getattr(model, name)] if overrides(model, name) or name in vars(model) else []
            calls += [getattr(other, name) for other in unique if hasattr(other, name)]
            given = functions.get(name, [])
            self._calls[name] = calls + (list(given) if isinstance(given, list | tuple) else [given])

    def hears(self, name: str) -> bool:
        """Whether anything is registered under ``name``."""
        return bool(self._calls[name])

    def add(self, name: str, function: Callable) -> Callable[[], None]:
        """Call another function under ``name``; returns what takes it away again."""
        self._calls[name].append(function)
        return lambda: self._calls[name].remove(function)

    def __call__(self, name: str, *args: Any) -> None:
        """Call everything that is registered under ``name``."""
        for call in self._calls[name]:
            call(*args)

"""Building optimizers and schedulers: the model's own, or those that the config names."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.config import TrainerConfig, nearest
from trainer.model import TrainerModel, overrides


def _class_named(name: str, module: Any, base: type, field: str) -> type:
    """The subclass of ``base`` in ``module`` with this name, or an error with the nearest name."""
    known = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    if name not in known:
        raise ValueError(f"{field}={name!r}: there is no {module.__name__}.{name}{nearest(name, known)}")
    return getattr(module, name)


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def build_optimizers(model: TrainerModel, config: TrainerConfig) -> list[Optimizer]:
    """The model's ``get_optimizer()``, or the ``optimizer`` that the config names over all its parameters."""
    if overrides(model, "get_optimizer"):
        return _as_list(model.get_optimizer())
    if config.optimizer is None:
        raise ValueError(
            "optimizer=None: name a torch.optim class in the config, or define get_optimizer() in the model"
        )
    rates = _as_list(model.get_lr() if overrides(model, "get_lr") else config.lr)
    if len(rates) != 1:
        raise ValueError(f"lr={rates}: {len(rates)} rates for the one optimizer of the config; give one")
    cls = _class_named(config.optimizer, torch.optim, Optimizer, "optimizer")
    return [cls(model.parameters(), lr=rates[0], **config.optimizer_params)]


def build_schedulers(
    model: TrainerModel, config: TrainerConfig, optimizers: list[Optimizer]
) -> list[LRScheduler | None]:
    """One scheduler (or None) for each optimizer: the model's ``get_scheduler()``, or those that the config names.

    Raises:
        ValueError: as many schedulers as optimizers are needed, and the names must be torch's.
    """
    if overrides(model, "get_scheduler"):
        schedulers = _as_list(model.get_scheduler(optimizers))
    else:
        names = _as_list(config.lr_scheduler)
        names = names * len(optimizers) if len(names) == 1 else names
        params = _as_list(config.lr_scheduler_params)
        params = params * len(optimizers) if len(params) == 1 else params
        check_lengths(lr_scheduler=names, lr_scheduler_params=params, optimizers=optimizers)
        schedulers = [
            _class_named(name, torch.optim.lr_scheduler, LRScheduler, "lr_scheduler")(optimizer, **kwargs)
            if name
            else None
            for name, kwargs, optimizer in zip(names, params, optimizers)
        ]
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("lr_scheduler='ReduceLROnPlateau' is stepped with a loss: step it in on_epoch_end instead")
    check_lengths(schedulers=schedulers, optimizers=optimizers)
    return schedulers


def build_criteria(model: TrainerModel, optimizers: list[Optimizer], device: torch.device) -> list[nn.Module | None]:
    """The model's criterion for each optimizer, on the device; a single one serves them all."""
    criteria = _as_list(model.get_criterion())
    criteria = criteria * len(optimizers) if len(criteria) == 1 else criteria
    check_lengths(criteria=criteria, optimizers=optimizers)
    return [criterion.to(device) if isinstance(criterion, nn.Module) else criterion for criterion in criteria]


def build_max_norms(config: TrainerConfig, optimizers: list[Optimizer]) -> list[float]:
    """The largest gradient norm for each optimizer; 0 clips nothing."""
    norms = config.grad_clip if isinstance(config.grad_clip, list) else [config.grad_clip] * len(optimizers)
    check_lengths(grad_clip=norms, optimizers=optimizers)
    return norms


def check_lengths(**lists: list) -> None:
    """Raise a ValueError when the named lists are not equally long."""
    if len({len(entries) for entries in lists.values()}) > 1:
        found = ", ".join(f"{len(entries)} {name}" for name, entries in lists.items())
        raise ValueError(f"{found}: give one of each for every optimizer")


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, group after group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradient_norm(optimizer: Optimizer, max_norm: float) -> torch.Tensor:
    """The true (unscaled) 2-norm of all gradients of an optimizer, which are then clipped when ``max_norm`` > 0."""
    parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_schedulers(schedulers: list[LRScheduler | None], indices: set[int]) -> None:
    """Step the schedulers of the optimizers with these indices."""
    for idx in sorted(indices):
        if (scheduler := schedulers[idx]) is not None:
            scheduler.step()

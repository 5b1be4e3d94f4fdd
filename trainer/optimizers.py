"""Building optimizers, schedulers and criteria (the model's own, or those that the config names), and stepping them."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.checked_config import nearest
from trainer.config import TrainerConfig
from trainer.model import TrainerModel, overrides
from trainer.schedulers import NoamLR, StepwiseGradualLR
from trainer.sharded import full, is_sharded

UNITS = ("step", "epoch", "evaluation")
# Adagrad takes fused=True as well, but for CPUs only
_FUSED_ON_GPUS = ("Adam", "AdamW", "SGD")
# what a config cannot write: functions, or other schedulers
_NEED_OBJECTS = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")


# ---- optimizers ----


def build_optimizers(model: TrainerModel, config: TrainerConfig, device: torch.device | None = None) -> list[Optimizer]:
    """The model's ``get_optimizer()``, or the optimizers that the config names.

    Several optimizers of the config train the submodules that ``optimizer_modules`` gives them; without it each of them
    trains the whole model. On a GPU torch's fused kernels are used, unless ``optimizer_params`` chooses.

    Args:
        model: on its device already.
        config: its optimizer, optimizer_params, optimizer_modules and lr are used.
        device: the device that is trained on.

    Raises:
        TypeError: ``get_optimizer()`` returned something that is no optimizer.
        ValueError: an unknown name or argument, lists of different lengths, or ``optimizer_modules`` that leave a
            parameter out or give it twice.
    """
    if overrides(model, "get_optimizer"):
        return _checked_optimizers(model)
    if not config.optimizer:
        raise ValueError(
            f"optimizer={config.optimizer!r}: name a torch.optim class in the config, or define get_optimizer() in the "
            "model"
        )
    names = as_list(config.optimizer)
    n = len(config.optimizer_modules or names)
    names = one_each("optimizer", names, n)
    all_params = [params or {} for params in one_each("optimizer_params", config.optimizer_params, n)]
    rates = get_lr(model, config, n)
    if config.optimizer_modules:
        parts = _split_parameters(model, config.optimizer_modules)
    else:
        parts = [list(model.parameters())] * n
    return [
        new_optimizer(name, {**_fused(name, params, model, device), **params}, rate, part)
        for name, params, rate, part in zip(names, all_params, rates, parts)
    ]


def new_optimizer(name: str, params: dict[str, Any] | None, lr: float, parameters: Iterable) -> Optimizer:
    """The torch.optim optimizer with this name (of ``RAdam`` in any case) over parameters or parameter groups."""
    # configs of Coqui TTS write radam
    cls = _class_named("RAdam" if name.lower() == "radam" else name, torch.optim, Optimizer, "optimizer")
    if cls is torch.optim.LBFGS:
        raise ValueError("optimizer='LBFGS': computes the loss several times an update, which the Trainer does not do")
    return _construct("optimizer", cls, parameters, {"lr": lr}, params or {})


def _checked_optimizers(model: TrainerModel) -> list[Optimizer]:
    """What get_optimizer() returns, as a list; anything that can do what is asked of an optimizer will do."""
    optimizers = as_list(model.get_optimizer())
    needed = ("step", "zero_grad", "state_dict", "load_state_dict", "param_groups")
    bad = [type(o).__name__ for o in optimizers if not all(hasattr(o, name) for name in needed)]
    if bad or not optimizers:
        raise TypeError(
            f"{type(model).__name__}.get_optimizer() returned {', '.join(bad) or 'an empty list'}: return "
            f"one or several optimizers, each with {', '.join(needed)}"
        )
    return optimizers


def _split_parameters(model: nn.Module, optimizer_modules: list[list[str]]) -> list[list[nn.Parameter]]:
    """The parameters of each optimizer: those in the modules (or with the names) that are given for it."""
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {*named, *(name for name, _ in model.named_modules(remove_duplicate=False) if name)}
    parts, owners = [], {}
    for idx, modules in enumerate(optimizer_modules):
        part: dict[nn.Parameter, str] = {}  # a parameter under two names is one parameter
        for module in modules:
            if module not in known:
                raise ValueError(
                    f"optimizer_modules: {type(model).__name__} has no module {module!r}{nearest(module, known)}"
                )
            part.update({p: name for name, p in named.items() if f"{name}.".startswith(f"{module}.")})
        for parameter, name in part.items():
            if parameter in owners:
                raise ValueError(
                    f"optimizer_modules: {name} belongs to optimizers {owners[parameter]} and {idx}; give it to one"
                )
            owners[parameter] = idx
        parts.append(list(part))
    left = [name for name, parameter in named.items() if parameter.requires_grad and parameter not in owners]
    if left:
        raise ValueError(
            f"optimizer_modules: no optimizer has {', '.join(left[:3])}{', ...' * (len(left) > 3)}; add the module, or "
            "freeze it (requires_grad=False)"
        )
    return parts


def _fused(name: str, params: dict[str, Any], model: nn.Module, device: torch.device | None) -> dict[str, bool]:
    """``fused=True`` where torch has such kernels for the model on this device, and the config leaves the choice."""
    chosen = {"fused", "foreach", "capturable", "differentiable"} & params.keys()
    if device is None or device.type != "cuda" or name not in _FUSED_ON_GPUS or chosen:
        return {}
    # complex weights, and sparse gradients, are left to the other kernels
    dense = not any(getattr(module, "sparse", False) for module in model.modules())
    if name == "SGD" and any(map(is_sharded, model.parameters())):
        return {}
    return {"fused": True} if dense and all(p.is_floating_point() for p in model.parameters()) else {}


# ---- rates ----


def get_lr(model: TrainerModel, config: TrainerConfig, n: int) -> list[float]:
    """The initial rate of each of ``n`` optimizers: the model's ``get_lr()``, or the config's ``lr``."""
    if overrides(model, "get_lr"):
        return one_each("get_lr()", model.get_lr(), n)
    return one_each("lr", config.lr, n)


def reset_lr(optimizers: list[Optimizer]) -> None:
    """Put every parameter group back to its own base rate: the one before any schedule, warm-up included.

    A scheduler that computes rates from the base rate (NoamLR, LambdaLR) returns to its schedule at its next step; one
    that multiplies the present rate (ExponentialLR, StepLR) goes on from here.

    Raises:
        ValueError: a group whose base rate is not known, as it came later or from a checkpoint without it.
    """
    for optimizer in optimizers:
        for i, group in enumerate(_groups_of(optimizer)):
            if "initial_lr" not in group:
                raise ValueError(
                    f"reset_lr: the base rate of group {i} of {type(optimizer).__name__} is not known: set its "
                    "group['initial_lr']"
                )
            if isinstance(group["lr"], torch.Tensor):  # of a captured graph, which reads this very tensor
                group["lr"].fill_(group["initial_lr"])
            else:
                group["lr"] = group["initial_lr"]


def _remember_rates(optimizers: list[Optimizer]) -> None:
    """Keep every group's base rate as torch's schedulers do; those that have one have set it already."""
    for optimizer in optimizers:
        for group in _groups_of(optimizer):
            rate = group["lr"]
            group.setdefault("initial_lr", rate.clone() if isinstance(rate, torch.Tensor) else rate)


def _groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups that are stepped: an object around torch optimizers may list those of an earlier state."""
    if isinstance(optimizer, Optimizer):
        return optimizer.param_groups
    inner = [value for value in getattr(optimizer, "__dict__", {}).values() if isinstance(value, Optimizer)]
    return [group for o in inner for group in o.param_groups] or optimizer.param_groups


# ---- schedulers ----


def build_schedulers(
    model: TrainerModel, config: TrainerConfig, optimizers: list[Optimizer]
) -> list[LRScheduler | None]:
    """One scheduler (or None) for each optimizer: the model's ``get_scheduler()``, or those that the config names.

    Raises:
        TypeError: ``get_scheduler()`` returned something that is no scheduler.
        ValueError: an unknown name or argument, or another number of schedulers than of optimizers.
    """
    n = len(optimizers)
    if overrides(model, "get_scheduler"):
        schedulers = _own_schedulers(model, optimizers)
    else:
        names = one_each("lr_scheduler", config.lr_scheduler, n)
        params = one_each("lr_scheduler_params", config.lr_scheduler_params, n)
        schedulers = [new_scheduler(*entry) for entry in zip(names, params, optimizers)]
    _remember_rates(optimizers)
    return schedulers


def new_scheduler(name: str | None, params: dict[str, Any] | None, optimizer: Optimizer) -> LRScheduler | None:
    """The scheduler with this name: of torch.optim.lr_scheduler, or NoamLR or StepwiseGradualLR in any case."""
    if not name:
        return None
    if name in _NEED_OBJECTS:
        raise ValueError(
            f"lr_scheduler={name!r}: is made of functions or other schedulers, which a config cannot hold: build it in "
            "the model's get_scheduler()"
        )
    own = {cls.__name__.lower(): cls for cls in (NoamLR, StepwiseGradualLR)}
    cls = own.get(name.lower()) or _class_named(
        name, torch.optim.lr_scheduler, LRScheduler, "lr_scheduler", (NoamLR.__name__, StepwiseGradualLR.__name__)
    )
    return _construct("lr_scheduler", cls, optimizer, {}, params or {})


def _own_schedulers(model: TrainerModel, optimizers: list[Optimizer]) -> list[LRScheduler | None]:
    """What get_scheduler() returns, one for each optimizer; a single one goes to the optimizer that it drives."""
    found, n = as_list(model.get_scheduler(optimizers)), len(optimizers)
    needed = ("step", "state_dict", "load_state_dict")
    for scheduler in found:
        if scheduler is not None and not all(hasattr(scheduler, name) for name in needed):
            raise TypeError(
                f"{type(model).__name__}.get_scheduler() returned a {type(scheduler).__name__}: return None or a "
                f"scheduler for each optimizer, with {', '.join(needed)}"
            )
    if found == [None]:
        return [None] * n
    if len(found) == 1 < n and any(getattr(found[0], "optimizer", None) is o for o in optimizers):
        return [found[0] if found[0].optimizer is o else None for o in optimizers]
    if len(found) != n:
        names = ", ".join(type(scheduler).__name__ for scheduler in found)
        raise ValueError(f"get_scheduler(): {len(found)} schedulers ({names}) for {n} optimizers; return one for each")
    return found


def scheduler_units(config: TrainerConfig, schedulers: list[LRScheduler | None]) -> list[str]:
    """What each scheduler counts: "step" (updates), "epoch" or "evaluation".

    The scheduler's own attribute ``unit`` comes first, if the model has set one, then the config's
    ``lr_scheduler_unit``, then what the scheduler can only be (ReduceLROnPlateau needs the loss of an evaluation), then
    ``scheduler_after_epoch``.

    Raises:
        ValueError: an unknown unit, or one with which the scheduler would never step.
    """
    default = "epoch" if config.scheduler_after_epoch else "step"
    units = []
    for scheduler, named in zip(schedulers, one_each("lr_scheduler_unit", config.lr_scheduler_unit, len(schedulers))):
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        unit = getattr(scheduler, "unit", None) or named or ("evaluation" if plateau else default)
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} of {type(scheduler).__name__}: must be one of {', '.join(UNITS)}")
        if plateau and unit != "evaluation":
            raise ValueError(f"lr_scheduler_unit={unit!r}: ReduceLROnPlateau needs a loss, so it counts evaluations")
        if scheduler is not None and unit == "evaluation" and not config.run_eval:
            raise ValueError(f"run_eval=False: {type(scheduler).__name__} counts evaluations and would never step")
        units.append(unit)
    return units


def step_schedulers(
    schedulers: list[LRScheduler | None],
    units: list[str],
    unit: str,
    indices: Iterable[int],
    metric: float | None = None,
) -> None:
    """Step those schedulers of ``indices`` that count ``unit``.

    Args:
        schedulers: one for each optimizer, or None.
        units: what each of them counts.
        unit: what has just been done: "step", "epoch" or "evaluation".
        indices: the optimizers that made an update.
        metric: the evaluation's target loss, for ReduceLROnPlateau.
    """
    for idx in sorted(indices):
        scheduler = schedulers[idx]
        if scheduler is None or units[idx] != unit:
            continue
        if isinstance(scheduler, LRScheduler):
            # torch warns when the update was made before the run was stopped and continued
            scheduler.optimizer._opt_called = True
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(metric)
        else:
            scheduler.step()


def describe(schedulers: list[LRScheduler | None], units: list[str]) -> list[str]:
    """A line for the console for each schedule: its name and what it counts."""
    several = len(schedulers) > 1
    return [
        f"lr schedule{f' of optimizer {idx}' if several else ''}: {type(scheduler).__name__}, counts {unit}s"
        for idx, (scheduler, unit) in enumerate(zip(schedulers, units))
        if scheduler is not None
    ]


# ---- criteria ----


class Criteria(list):
    """The criterion of each optimizer; where they are all the same one, also callable as it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(criterion is not self[0] for criterion in self):
            raise TypeError(f"each of the {len(self)} optimizers has its own criterion: call trainer.criterion[i](...)")
        return self[0](*args, **kwargs)


def build_criteria(model: TrainerModel, optimizers: list[Optimizer], device: torch.device) -> Criteria:
    """The model's criterion for each optimizer, on the device; a single one serves them all."""
    criteria = one_each("get_criterion()", model.get_criterion(), len(optimizers))
    return Criteria(criterion.to(device) if isinstance(criterion, nn.Module) else criterion for criterion in criteria)


# ---- gradients ----


@contextlib.contextmanager
def gradients_apart(optimizer: Optimizer) -> Iterator[None]:
    """Keep accumulated gradients from a callback that steps and clears by itself, as Coqui's Capacitron does."""
    held = [(parameter, parameter.grad) for parameter in parameters_of(optimizer)]
    for parameter, _ in held:
        parameter.grad = None
    yield
    for parameter, gradient in held:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def build_max_norms(config: TrainerConfig, optimizers: list[Optimizer]) -> list[float]:
    """The largest gradient norm for each optimizer; 0 or less clips nothing."""
    return [norm or 0.0 for norm in one_each("grad_clip", config.grad_clip, len(optimizers))]


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, group after group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradient_norm(optimizer: Optimizer) -> torch.Tensor:
    """The true (unscaled) 2-norm of all gradients of an optimizer."""
    everything = parameters_of(optimizer)
    parameters = [p for p in everything if p.grad is not None]
    if not parameters:  # torch would put the zero on the CPU
        return torch.zeros((), device=everything[0].device if everything else None)
    for parameter in parameters:
        if parameter.grad.is_sparse:  # of an embedding: add up the gradients of a row that was used several times
            parameter.grad = parameter.grad.coalesce()
    return full(torch.nn.utils.get_total_norm([p.grad.values() if p.grad.is_sparse else p.grad for p in parameters]))


def clip_gradients(optimizer: Optimizer, max_norm: float, norm: torch.Tensor) -> None:
    """Scale an optimizer's gradients, whose norm is given, down to ``max_norm``; 0 or less clips nothing."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters_of(optimizer), max_norm, norm)


# ---- what the above share ----


def as_list(value: Any) -> list:
    """A list or tuple as a list, anything else as a list of it."""
    return list(value) if isinstance(value, list | tuple) else [value]


def one_each(name: str, value: Any, n: int) -> list:
    """``value`` for each of ``n`` optimizers: a single one serves them all.

    Raises:
        ValueError: it is a list of another length.
    """
    entries = as_list(value)
    if len(entries) not in (1, n):
        shown = ", ".join(repr(e) if isinstance(e, str | int | float | dict) else type(e).__name__ for e in entries)
        count = f"{len(entries)} entries ({shown}) for {n} optimizer{'s'[: n != 1]}"
        raise ValueError(f"{name}: {count}; give one for all of them, or one for each")
    return entries * n if len(entries) == 1 else entries


def _class_named(name: str, module: Any, base: type, field: str, more: tuple[str, ...] = ()) -> type:
    """The subclass of ``base`` in ``module`` with this name, or an error with the nearest name."""
    known = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    known = [n for n in known if not n.startswith("_")]
    if name not in known:
        same = [n for n in (*known, *more) if n.lower() == name.lower()]
        hint = nearest(same[0] if same else name, same or (*known, *more))
        raise ValueError(f"{field}={name!r}: there is no {module.__name__}.{name}{hint}")
    return getattr(module, name)


def _construct(field: str, cls: type, first: Any, fixed: dict[str, Any], params: dict[str, Any]) -> Any:
    """``cls(first, **fixed, **params)``, with an error that names the class, the argument and those that there are."""
    try:
        return cls(first, **fixed, **params)
    except (TypeError, ValueError) as error:
        takes = ", ".join(list(inspect.signature(cls).parameters)[1:])
        raise ValueError(f"{field}={cls.__name__} with {field}_params={params}: {error}; it takes {takes}") from error

"""TrainerModel: what a model file implements."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader

    from trainer.config import TrainerConfig
    from trainer.loggers.base import DashboardLogger
    from trainer.trainer import Trainer

Batch = dict[str, Any]
Outputs = dict[str, Any] | None
Losses = dict[str, torch.Tensor] | None


def overrides(model: "TrainerModel", name: str) -> bool:
    """Whether the model's class brings its own ``name``; found by looking, never by catching an exception."""
    return getattr(type(model), name, None) is not getattr(TrainerModel, name)


def eval_passes(model: "TrainerModel", criteria: list[Any]) -> list[tuple[int | None, Any]]:
    """(optimizer_idx, criterion) of each call of eval_step; one without optimizer_idx is called once for all."""
    parameters = inspect.signature(model.eval_step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_idx = len(positional) > 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)
    if len(criteria) > 1 and takes_idx:
        return list(enumerate(criteria))
    is_shared = all(criterion is criteria[0] for criterion in criteria)
    return [(None, criteria[0] if is_shared else criteria)]


def call_step(
    model: "TrainerModel", method: str, batch: Batch, criterion: Any, optimizer_idx: int | None, needs_loss: bool = True
) -> tuple[Outputs, Losses]:
    """Call a model's train_step or eval_step and check what comes back.

    Raises:
        TypeError: the model takes the batch for a dict, and it is a list.
        ValueError: see check_losses.
    """
    arguments = () if optimizer_idx is None else (optimizer_idx,)
    try:
        result = getattr(model, method)(batch, criterion, *arguments)
    except TypeError as error:
        if isinstance(batch, list | tuple) and "indices must be integers" in str(error):
            name = f"{type(model).__name__}.{method}"
            raise TypeError(
                f"{name}: the batch is a {type(batch).__name__} of {len(batch)} items, not a dict: return a dict from "
                "the data set, from the loader's collate_fn, or from format_batch"
            ) from error
        raise
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(
            f"{type(model).__name__}.{method} returned a {type(result).__name__}: return (outputs, losses)"
        )
    check_losses(model, method, result[1], needs_loss)
    return result[0], result[1]


def check_losses(model: "TrainerModel", method: str, losses: Any, needs_loss: bool = True) -> None:
    """Raise a ValueError unless a step returned None, an empty dict, or a dict of losses with a tensor ``loss``."""
    is_dict = isinstance(losses, dict)
    if losses is None or (is_dict and not losses):
        return
    tensors = [name for name, value in losses.items() if isinstance(value, torch.Tensor)] if is_dict else []
    if "loss" not in tensors and (needs_loss or not tensors):
        kinds = [f"{name}: {type(value).__name__}" for name, value in losses.items()] if is_dict else []
        found = ", ".join(kinds) if is_dict else type(losses).__name__
        what = "a tensor 'loss'" if needs_loss else "a tensor"
        raise ValueError(f"{type(model).__name__}.{method} returned losses ({found}) without {what}")
    if "loss" in tensors and losses["loss"].numel() != 1:
        shape = list(losses["loss"].shape)
        raise ValueError(f"loss 'loss' of {method} has shape {shape}: return a scalar, such as its mean()")


@contextlib.contextmanager
def own_tensors(model: "TrainerModel", kept: dict[str, Any]) -> Iterator[None]:
    """Give a model the tensors that it has put on ``self`` in an earlier pass over this batch; keep those of this pass.

    Models for Coqui's Trainer hand outputs from one optimizer's pass to the next in this way; of several batches that
    are accumulated, each then finds its own. Tensors on submodules are not looked after.
    """
    vars(model).update(kept)
    before = dict(vars(model))
    yield
    changed = {name: value for name, value in vars(model).items() if before.get(name) is not value}
    kept.update({name: value for name, value in changed.items() if _holds_tensors(value)})


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_tensors, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor)


class TrainerModel(nn.Module):
    """Base class of every model: what the Trainer calls, and when.

    ``train_step``, ``eval_step``, ``get_criterion`` and ``get_data_loader`` are what a training needs; ``inference`` is
    what everything that uses the trained model needs. A method that is not there is asked for only when it is called,
    by an error that names it. The hooks after them are optional.
    """

    def _missing(self, name: str, signature: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} has no {name}(): define `def {name}({signature})` in its class"
        )

    # ---- needed for training ----

    def train_step(
        self, batch: Batch, criterion: nn.Module, optimizer_idx: int | None = None
    ) -> tuple[Outputs, Losses]:
        """Forward pass and losses of one batch.

        Args:
            batch: what the loader gives, on the device. The same dict is handed to every optimizer's pass over this
                batch, so a pass may leave in it what a later one uses again.
            criterion: the model's criterion (of this optimizer).
            optimizer_idx: which optimizer's losses are asked for; not passed when there is one optimizer.

        Returns:
            outputs (for train_log) and losses. ``losses["loss"]`` is minimised, as a mean over the samples; the others
            are logged. Losses stay on the device. ``(None, None)`` skips this optimizer in this update.
        """
        raise self._missing("train_step", "self, batch, criterion, optimizer_idx=None")

    def eval_step(self, batch: Batch, criterion: nn.Module, optimizer_idx: int | None = None) -> tuple[Outputs, Losses]:
        """As train_step, in eval mode and without gradients."""
        raise self._missing("eval_step", "self, batch, criterion, optimizer_idx=None")

    def get_criterion(self) -> nn.Module | list[nn.Module] | None:
        """The loss, or one for each optimizer."""
        raise self._missing("get_criterion", "self")

    def get_data_loader(
        self, config: "TrainerConfig", is_eval: bool, samples: list | None, verbose: bool
    ) -> "DataLoader":
        """The loader of the training (or evaluation) samples that the Trainer was given."""
        raise self._missing("get_data_loader", "self, config, is_eval, samples, verbose")

    # ---- needed to use the model ----

    def inference(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """From inputs to outputs, as a user of the trained model calls it: a dict of tensors."""
        raise self._missing("inference", "self, ...")

    # ---- optional: data ----

    def format_batch(self, batch: Any) -> Batch:
        """Change the loader's batch before it goes to the device."""
        return batch

    def format_batch_on_device(self, batch: Batch) -> Batch:
        """Change the batch on the device, for example to compute features there."""
        return batch

    # ---- optional: optimization; without them the config's optimizer, lr and lr_scheduler are used ----

    def get_optimizer(self) -> "Optimizer | list[Optimizer]":
        """The optimizer, or the optimizers in the order in which train_step is called for them."""
        raise self._missing("get_optimizer", "self")

    def get_lr(self) -> float | list[float]:
        """Initial learning rate for each optimizer that is built from the config."""
        raise self._missing("get_lr", "self")

    def get_scheduler(self, optimizer: Any) -> "LRScheduler | list[LRScheduler | None] | None":
        """The scheduler for each optimizer (given as a list); None for an optimizer without one."""
        raise self._missing("get_scheduler", "self, optimizer")

    def optimize(self, batch: Batch, trainer: "Trainer") -> tuple[Outputs, Losses]:
        """Forward, backward and step of all optimizers for one batch, by the model itself; instead of train_step.

        Written as for a plain loop, with ``self.scaled_backward(loss, trainer)`` for ``loss.backward()``, then
        ``trainer.optimizer[0].step()`` and ``.zero_grad()``. Loss scaling, accumulation (``grad_accum_steps``),
        clipping (``grad_clip``), gradient norms and the check for NaN happen inside these calls.

        Returns:
            outputs (for train_log) and losses, under any names, for the logs.
        """
        raise self._missing("optimize", "self, batch, trainer")

    def scaled_backward(self, loss: torch.Tensor, trainer: "Trainer", *args: Any, **options: Any) -> None:
        """``loss.backward()`` inside ``optimize``; options are those of ``Tensor.backward``, such as retain_graph."""
        # Coqui's README hands the trainer over as the third argument, after None
        trainer = trainer if trainer is not None else args[0]
        trainer.manual.backward(loss, **options)

    # ---- optional: several GPUs ----

    def fsdp_modules(self) -> list[nn.Module]:
        """The modules that ``strategy: fsdp`` gathers one at a time; by default large entries of module lists.

        A module is gathered while it is called, ``module(x)``; its other methods and its parameters cannot be used from
        outside. Parameters in none of them are gathered for the whole of a step.
        """
        raise self._missing("fsdp_modules", "self")

    # ---- optional: what is shown ----

    def train_log(self, batch: Batch, outputs: dict, logger: "DashboardLogger", steps: int) -> None:
        """Write figures, audio and the like of a training batch; called every plot_step updates."""
        raise self._missing("train_log", "self, batch, outputs, logger, steps")

    def eval_log(self, batch: Batch, outputs: dict, logger: "DashboardLogger", steps: int) -> None:
        """Write figures, audio and the like of the first evaluation batch, in eval mode, after every evaluation."""
        raise self._missing("eval_log", "self, batch, outputs, logger, steps")

    def test_run(self, trainer: "Trainer") -> Any:
        """Try the model as a user would; called after an epoch's evaluation. Its result goes to test_log."""
        raise self._missing("test_run", "self, trainer")

    def test_log(self, outputs: Any, logger: "DashboardLogger", steps: int) -> None:
        """Write what test_run returned."""
        raise self._missing("test_log", "self, outputs, logger, steps")

    # ---- optional: callbacks ----

    def on_init_start(self, trainer: "Trainer") -> None:
        """The Trainer has its model, data and optimizers, and restores nothing yet."""

    def on_init_end(self, trainer: "Trainer") -> None:
        """The Trainer is built."""

    def on_epoch_start(self, trainer: "Trainer") -> None:
        """An epoch (training, evaluation and test) begins."""

    def on_epoch_end(self, trainer: "Trainer") -> None:
        """An epoch is over."""

    def on_train_epoch_start(self, trainer: "Trainer") -> None:
        """The training part of an epoch begins."""

    def on_train_epoch_end(self, trainer: "Trainer") -> None:
        """The training part of an epoch is over."""

    def on_train_step_start(self, trainer: "Trainer") -> None:
        """An update begins."""

    def on_train_step_end(self, trainer: "Trainer") -> None:
        """An update is done, counted, logged, and saved where that is due."""

    def before_backward_pass(self, loss_dict: dict, optimizer: Any) -> None:
        """A batch's losses are computed; ``optimizer`` is the Trainer's list."""

    def before_gradient_clipping(self) -> None:
        """An update's gradients are complete and unscaled, not yet clipped."""

    def on_eval_epoch_start(self, trainer: "Trainer") -> None:
        """An evaluation begins; the model is in eval mode."""

    def on_eval_epoch_end(self, trainer: "Trainer") -> None:
        """An evaluation is over; ``trainer.keep_avg_eval.means`` holds its mean losses."""

    def on_eval_step_start(self, trainer: "Trainer") -> None:
        """An evaluation batch begins."""

    def on_eval_step_end(self, trainer: "Trainer") -> None:
        """An evaluation batch is done."""

    def on_keyboard_interrupt(self, trainer: "Trainer") -> None:
        """Ctrl-C, SIGTERM or SIGUSR1 arrived; the checkpoint is saved."""

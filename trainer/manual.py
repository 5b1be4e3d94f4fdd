"""Models that optimize by themselves: what the Trainer does for the others, done inside their ``optimize``."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainer.averages import scalars
from trainer.optimizers import parameters_of, step_schedulers

if TYPE_CHECKING:
    from trainer.distributed import Agreement
    from trainer.trainer import Trainer


@contextlib.contextmanager
def _replaced(target: Any, **methods: Any) -> Iterator[None]:
    """Give an object other methods inside the block."""
    before = {name: vars(target)[name] for name in methods if name in vars(target)}
    vars(target).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(target).pop(name, None)
        vars(target).update(before)


class ManualOptimization:
    """Runs a model's ``optimize(batch, trainer)`` for each batch of an accumulation window.

    Written as for a plain loop (forward, ``self.scaled_backward(loss, trainer)``, ``optimizer.step()``,
    ``optimizer.zero_grad()``), it gets what the automatic path has. While it runs,

    * ``scaled_backward`` scales the loss, and weighs it by the batch's share of the window's samples;
    * ``optimizer.step()`` puts the gradients aside until the last batch of the window, where neither ``zero_grad`` nor
      another optimizer's loss touches them; then it adds them up, unscales them, calls ``before_gradient_clipping``,
      measures their norm, checks that they are finite, clips, and steps;
    * ``scaler.step(optimizer)`` is the same as ``optimizer.step()``, and ``scaler.update()`` is left to the Trainer;
    * a scheduler of unit ``step`` follows its optimizer. One that ``optimize`` was seen to step is left to it.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._weight = 1.0
        self._first = self._last = True
        self._has_gradients = False
        self._held: dict[int, list] = {}  # gradients of optimizers whose step waits for the window's last batch
        self._stepped: set[int] = set()  # in this call of optimize
        self._asked: set[int] = set()

    def run(self, batches: list[Any], samples: list[int], agreement: "Agreement") -> dict[str, Any] | None:
        """One update from the batches of a window; returns the outputs of the last, None if it skipped all."""
        trainer, outputs = self._trainer, None
        self._held.clear()
        self._has_gradients = False
        for i, (batch, n) in enumerate(zip(batches, samples)):
            self._weight = n / agreement.samples
            self._first, self._last = i == 0, i == len(batches) - 1
            self._stepped.clear()
            self._asked.clear()
            with self._intercepted(), trainer.over_ranks(n), trainer.precision.autocast():
                found, losses = trainer.model.optimize(batch, trainer)
            step_schedulers(trainer.scheduler, trainer.scheduler_units, "step", self._stepped - trainer.own_schedulers)
            if losses:
                trainer.keep_avg_train.add(trainer.total_steps_done + 1, scalars(losses), n)
                outputs = found or {}
        if self._held:  # by optimizers for which the last batch did not ask
            self._stepped.clear()
            with self._intercepted():
                for idx in list(self._held):
                    trainer.optimizer[idx].step()
            step_schedulers(trainer.scheduler, trainer.scheduler_units, "step", self._stepped - trainer.own_schedulers)
        return outputs

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """What ``scaled_backward`` does."""
        self._has_gradients = True
        self._trainer.guard.saw(loss)
        with self._trainer.precision.no_autocast():
            self._trainer.precision.backward(loss, self._weight, **options)

    @contextlib.contextmanager
    def _intercepted(self) -> Iterator[None]:
        scaler = self._trainer.precision.scaler
        with contextlib.ExitStack() as stack:
            for idx, optimizer in enumerate(self._trainer.optimizer):
                step = functools.partial(self._step, idx, optimizer.step)
                step._wrapped_by_lr_sched = True  # schedulers warn when step is not the one that they know
                stack.enter_context(_replaced(optimizer, step=step))
            for idx, scheduler in enumerate(self._trainer.scheduler):
                if scheduler is not None:
                    step = functools.partial(self._step_scheduler, idx, scheduler.step)
                    stack.enter_context(_replaced(scheduler, step=step))
            stack.enter_context(
                _replaced(
                    scaler,
                    step=lambda optimizer: optimizer.step(),
                    unscale_=self._unscale,
                    update=lambda: None,
                )
            )
            yield

    def _step(self, idx: int, original: Callable, closure: Callable | None = None) -> None:
        optimizer, name = self._trainer.optimizer[idx], type(self._trainer.model).__name__
        if closure is not None:
            raise ValueError(
                f"{name}.optimize calls step(closure): compute the gradients with scaled_backward, then call step()"
            )
        waits = not (self._first and self._last)
        if waits and idx in self._asked:
            raise ValueError(
                f"{name}.optimize steps optimizer {idx} twice with one batch, which cannot be accumulated: "
                f"set grad_accum_steps=1 (it is {self._trainer.args.grad_accum_steps})"
            )
        if idx in self._asked:
            self._trainer.precision.update()  # gradients are unscaled once before it
        self._asked.add(idx)
        if not self._has_gradients and (waits or self._trainer.precision.scaling):
            raise ValueError(
                f"{name}.optimize steps optimizer {idx} without scaled_backward: call self.scaled_backward(loss, "
                "trainer) instead of loss.backward(), which can be neither scaled nor accumulated"
            )
        self._add_held(idx)
        if not self._last:
            self._held[idx] = [p.grad for p in parameters_of(optimizer)], self._trainer.guard.sum_of_losses()
            for parameter in parameters_of(optimizer):
                parameter.grad = None
            return
        with _replaced(optimizer, step=original), self._trainer.precision.no_autocast():
            if self._trainer.update(idx):
                self._stepped.add(idx)
                # autocast keeps casted weights until its context ends, which here is that of the whole of optimize
                torch.clear_autocast_cache()

    def _unscale(self, optimizer: Any) -> None:
        if self._last:
            self._add_held(next(i for i, o in enumerate(self._trainer.optimizer) if o is optimizer))
            self._trainer.precision.unscale(optimizer)

    def _add_held(self, idx: int) -> None:
        """Add the gradients of the window's earlier batches."""
        parameters = parameters_of(self._trainer.optimizer[idx])
        gradients, losses = self._held.pop(idx, ([], None))
        if losses is not None:
            self._trainer.guard.saw(losses)
        for parameter, held in zip(parameters, gradients):
            if parameter.grad is None or held is None:
                parameter.grad = held if parameter.grad is None else parameter.grad
            else:
                parameter.grad = held.add_(parameter.grad)

    def _step_scheduler(self, idx: int, original: Callable, *args: Any) -> None:
        self._trainer.own_schedulers.add(idx)
        waits_or_skipped = (idx in self._held and not self._last) or idx in self._asked - self._stepped
        if not waits_or_skipped:
            original(*args)

"""The Trainer: fit, train_step, evaluate. Read it from top to bottom."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer import checkpoint as checkpoints
from trainer import optimizers
from trainer.averages import Averages, named, target_loss
from trainer.callbacks import Callbacks
from trainer.command_line import parse_command_line
from trainer.config import TrainerArgs, TrainerConfig
from trainer.data.loader import rest_of_epoch
from trainer.device import count_samples, pick_device, to_device
from trainer.loggers.base import DashboardLogger
from trainer.loggers.console import ConsoleLogger, StepClock
from trainer.loggers.tensorboard import new_dashboard
from trainer.model import Batch, Losses, Outputs, TrainerModel, check_losses, overrides
from trainer.precision import Precision
from trainer.provenance import new_run_folder
from trainer.seeding import forked_rng, set_backend_flags
from trainer.signals import StopSignals


class Trainer:
    """Trains a TrainerModel. The constructor only assembles; ``fit`` and ``evaluate`` open the run's folder.

    Args:
        args: how this start goes: continue_path, small_run and so on.
        config: the model's config.
        output_path: where the run's folder is made; the config's by default.
        model: the model, built after ``seed_everything(config.training_seed)`` if the run is to be repeatable.
        train_samples: handed to the model's ``get_data_loader``; eval_samples likewise.
        train_loader: a loader to use instead; eval_loader likewise.
        dashboard_logger: a dashboard to use instead of the one that the config names.
        parse_command_line_args: apply ``sys.argv`` to args and config; False when the script has done so.
        callbacks: functions, or lists of them, by callback name.
    """

    def __init__(
        self,
        args: TrainerArgs,
        config: TrainerConfig,
        output_path: str | Path | None = None,
        *,
        model: TrainerModel,
        train_samples: list | None = None,
        eval_samples: list | None = None,
        train_loader: DataLoader | None = None,
        eval_loader: DataLoader | None = None,
        dashboard_logger: DashboardLogger | None = None,
        parse_command_line_args: bool = True,
        callbacks: Mapping[str, Callable | list[Callable]] | None = None,
    ) -> None:
        if parse_command_line_args:
            parse_command_line(config, args=args)
        args.check()
        config.check()
        if not isinstance(model, TrainerModel):
            raise TypeError(f"model is a {type(model).__name__}: derive its class from TrainerModel")
        if args.small_run and (train_loader is not None or eval_loader is not None):
            raise ValueError(f"small_run={args.small_run} cuts the samples; it cannot cut loaders: hand samples over")
        self.args, self.config = args, config
        self._output_root = str(output_path or config.output_path)
        self.output_path: Path | None = None  # the run's folder, once it is open
        self.device = pick_device(config.device)
        set_backend_flags(config)
        self.model = model.to(self.device)
        self.train_samples = train_samples[: args.small_run] if train_samples is not None else None
        self.eval_samples = eval_samples[: args.small_run] if eval_samples is not None else None
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.optimizer = optimizers.build_optimizers(model, config)
        self.scheduler = optimizers.build_schedulers(model, config, self.optimizer)
        self.criterion = optimizers.build_criteria(model, self.optimizer, self.device)
        self._max_norms = optimizers.build_max_norms(config, self.optimizer)
        self.precision = Precision(config, self.device)
        self.callbacks = Callbacks(model, [*self.criterion, *self.optimizer], callbacks)
        self.dashboard_logger = self._given_dashboard = dashboard_logger
        self.c_logger, self._clock, self._signals = ConsoleLogger(), StepClock(), StopSignals()

        self.total_steps_done = 0  # updates
        self.epochs_done, self.batches_done = 0, 0  # batches of the epoch under way; all, while it is evaluated
        self.best_loss = math.inf
        self.keep_avg_train, self.keep_avg_eval = Averages(), Averages()
        self.stepped_optimizers: set[int] = set()  # optimizers that made an update in this epoch
        self.last_eval_step = -1  # the update that was evaluated last
        self._loss_owners: dict[str, int] = {}
        self._open = False

    # ---- fit ----

    def fit(self) -> None:
        """Train, evaluate and test, epoch after epoch, until the config's epochs or max_steps are done.

        Raises:
            SystemExit: Ctrl-C or SIGTERM came (exit code 130 or 143), and the run is saved.
        """
        self.open_run()
        try:
            with self._signals:
                if (self.args.skip_train_epoch or self.args.start_with_eval) and self.config.run_eval:
                    self.evaluate()
                if self.args.skip_train_epoch:
                    self.test()
                    return
                if self._finished():
                    self.c_logger.print("nothing left to train: raise epochs, or max_steps")
                while not self._finished():
                    self.fit_epoch()
                if self.config.save_checkpoints and (self._signals.received is None or self.config.save_on_interrupt):
                    self.save_checkpoint()
            if self._signals.received is not None:
                self.callbacks("on_keyboard_interrupt", self)
                raise SystemExit(128 + self._signals.received)
        finally:
            self.close_run()

    def _finished(self) -> bool:
        steps = math.inf if self.config.max_steps is None else self.config.max_steps
        done = self.epochs_done >= self.config.epochs or self.total_steps_done >= steps
        return done or self._signals.received is not None

    def fit_epoch(self) -> None:
        """One epoch, or what is left of it: train, evaluate, keep the best model, test."""
        self.callbacks("on_epoch_start", self)
        batches = self.train_epoch()
        if self._signals.received is not None:
            return
        if self.config.run_eval and self._evaluation_is_due():
            self._evaluate_and_keep_best()
        elif not self.config.run_eval:
            self._keep_best(self.keep_avg_train.means)
        if self.epochs_done >= self.config.test_delay_epochs and self._evaluation_is_due():
            self.test()
        if self._signals.received is None and self.batches_done == batches:
            self.callbacks("on_epoch_end", self)
            if self.config.scheduler_after_epoch:
                optimizers.step_schedulers(self.scheduler, self.stepped_optimizers)
            self.epochs_done += 1
            self.batches_done = 0
            self.stepped_optimizers.clear()
            self.keep_avg_train = Averages()

    def _evaluation_is_due(self) -> bool:
        epoch = self.epochs_done + 1
        return epoch % self.config.run_eval_epochs == 0 or epoch == self.config.epochs or self._finished()

    def train_epoch(self) -> int:
        """Train on the batches of this epoch that are not done yet; returns how many batches the epoch has."""
        loader = self.get_loader(is_eval=False)
        k = self.args.grad_accum_steps
        updates, done = math.ceil(len(loader) / k), math.ceil(self.batches_done / k)
        self.c_logger.start_epoch(self.epochs_done, self.config.epochs, updates, done)
        self.callbacks("on_train_epoch_start", self)
        self.model.train()
        self._clock.restart()
        for batches in self._clock.wait_for(self._windows(loader)):
            plotting = (self.total_steps_done + 1) % self.config.plot_step == 0
            batch, outputs = self.train_step(batches)
            self._after_update(updates, (batch, outputs) if plotting else None)
            del batch, outputs  # not alive, with all that they hold, during the next forward pass
            if self._finished():
                break
        self.keep_avg_train.read()
        self.c_logger.end_epoch()
        self.callbacks("on_train_epoch_end", self)
        self.dashboard_logger.train_epoch_stats(self.total_steps_done, self.keep_avg_train.means)
        return len(loader)

    def train_step(self, batches: list[Any]) -> tuple[Batch, dict[str, Any]]:
        """One update of every optimizer's weights from the batches of one accumulation window.

        Each optimizer in turn sees all the batches, so that accumulating is the same as one larger batch: the second
        optimizer's losses are computed with what the first one has updated.

        Returns:
            The last batch, as the model saw it, and its outputs (of optimizer ``i`` named ``NAME_i``, if several).
        """
        self.callbacks("on_train_step_start", self)
        self._rates = {f"current_lr{self._suffix(i)}": o.param_groups[0]["lr"] for i, o in enumerate(self.optimizer)}
        batches = [self.format_batch(batch) for batch in batches]
        samples = [count_samples(batch) for batch in batches]
        step, outputs = self.total_steps_done + 1, {}
        for idx, optimizer in enumerate(self.optimizer):
            suffix, any_loss = self._suffix(idx), False
            # of several optimizers' weights, only this one's need gradients now
            parameters = optimizers.parameters_of(optimizer) if suffix else None
            for batch, n in zip(batches, samples):
                with self.precision.autocast():
                    found, losses = self._model_step("train_step", batch, idx)
                if losses is None:
                    continue
                any_loss = True
                self.callbacks("before_backward_pass", losses, self.optimizer)
                # the share of the window's samples: their mean is what is minimised
                self.precision.backward(losses["loss"], n / sum(samples), parameters)
                self.keep_avg_train.add(step, self._named(losses, idx), n)
                outputs.update({f"{name}{suffix}": value for name, value in (found or {}).items()})
            if any_loss:
                norm = self._update(idx)
                scaled = self.precision.scaler.is_enabled()
                self.keep_avg_train.add(step, {f"grad_norm{suffix}": norm}, sum(samples), must_be_finite=not scaled)
        self.precision.update()
        self.total_steps_done += 1
        self.batches_done += len(batches)
        self.callbacks("on_train_step_end", self)
        return batches[-1], outputs

    def _update(self, idx: int) -> torch.Tensor:
        """Unscale, measure and clip the gradients, step the optimizer and its scheduler; returns the true norm."""
        optimizer = self.optimizer[idx]
        self.precision.unscale(optimizer)
        self.callbacks("before_gradient_clipping")
        norm = optimizers.gradient_norm(optimizer, self._max_norms[idx])
        if self.precision.step(optimizer):
            self.stepped_optimizers.add(idx)
            if not self.config.scheduler_after_epoch:
                optimizers.step_schedulers(self.scheduler, {idx})
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _after_update(self, updates: int, shown: tuple[Batch, dict[str, Any]] | None) -> None:
        """What is due after an update: print, plot, save, evaluate. Only here does the host wait for the device."""
        config, step, average = self.config, self.total_steps_done, self.keep_avg_train
        self.c_logger.advance()
        printing = step % config.print_step == 0 or step == 1
        if printing or shown is not None:
            average.read()
            times, left = self._clock.read(), self._clock.time_left(self._updates_left(updates))
            rates = {name: float(rate) for name, rate in self._rates.items()}
            values = {**average.last, **rates, **self.precision.stats()}
        if printing:
            self.c_logger.print_train_step(step, values, average.means, times, left)
        if shown is not None:
            self.dashboard_logger.train_step_stats(step, {**values, **times})
            self._show("train_log", *shown)
        if config.save_checkpoints and step % config.save_step == 0:
            self.save_checkpoint()
        if config.run_eval and config.run_eval_steps and step % config.run_eval_steps == 0:
            self._evaluate_and_keep_best()

    # ---- evaluate ----

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float] | None:
        """Mean losses over the evaluation samples, each sample counted once; None when Ctrl-C came in between.

        The generators are freshly seeded, so that evaluations draw the same numbers, and are put back after it.
        """
        self.open_run()
        start, self.keep_avg_eval, shown = time.perf_counter(), Averages("evaluation batch"), None
        self.model.eval()
        with forked_rng(self.config.training_seed):
            # with overfit_batch: the one batch of the training
            loader = self.get_loader(is_eval=not self.args.overfit_batch)
            for i, batch in enumerate(itertools.islice(loader, 1 if self.args.overfit_batch else None), start=1):
                if self._signals.received is not None:
                    break
                batch, outputs = self.format_batch(batch), {}
                for idx in range(len(self.optimizer)):
                    with self.precision.autocast():
                        found, losses = self._model_step("eval_step", batch, idx)
                    if losses is not None:
                        self.keep_avg_eval.add(i, self._named(losses, idx), count_samples(batch))
                        outputs.update({f"{k}{self._suffix(idx)}": v for k, v in (found or {}).items()})
                if self.config.print_eval:
                    self.keep_avg_eval.read()
                    self.c_logger.print_eval(f"batch {i}", self.keep_avg_eval.last)
                # the first batch holds the same samples every time: what is shown of it can be compared
                shown = shown or (batch, outputs)
        is_whole = self._signals.received is None and shown is not None
        if is_whole:
            self.keep_avg_eval.read()
            step, means = self.total_steps_done, self.keep_avg_eval.means
            self.c_logger.print_eval(f"step {step}", means, time.perf_counter() - start)
            self.dashboard_logger.eval_stats(step, means)
            self._show("eval_log", *shown)
        self.model.train()
        return self.keep_avg_eval.means if is_whole else None

    def _evaluate_and_keep_best(self) -> None:
        if self.last_eval_step != self.total_steps_done and (means := self.evaluate()) is not None:
            self.last_eval_step = self.total_steps_done
            self._keep_best(means)

    def _keep_best(self, means: Mapping[str, float]) -> None:
        """Save best_model.pth when the target loss is lower than ever before."""
        loss = target_loss(means, self.config.target_loss, len(self.optimizer))
        if loss >= self.best_loss or self.total_steps_done <= self.config.save_best_after:
            return
        self.best_loss = loss
        self.c_logger.print(f"best model so far: {self.config.target_loss or 'loss'} {loss:.5g}")
        if self.config.save_checkpoints:
            checkpoints.save_best(self)

    @torch.inference_mode()
    def test(self) -> None:
        """Call the model's test_run and test_log, if it has them."""
        if not overrides(self.model, "test_run"):
            return
        self.model.eval()
        with forked_rng(self.config.training_seed):
            outputs = self.model.test_run(self)
            if overrides(self.model, "test_log"):
                self.model.test_log(outputs, self.dashboard_logger, self.total_steps_done)
        self.dashboard_logger.flush()
        self.model.train()
        self._clock.restart()

    def _show(self, hook: str, batch: Batch, outputs: dict[str, Any]) -> None:
        if overrides(self.model, hook):
            with torch.no_grad(), forked_rng(self.config.training_seed):
                getattr(self.model, hook)(batch, outputs, self.dashboard_logger, self.total_steps_done)
        self.dashboard_logger.flush()
        self._clock.restart()

    # ---- batches ----

    def get_loader(self, is_eval: bool) -> DataLoader:
        """The training or evaluation loader: the one handed over, else the model's, built once."""
        name, samples = ("eval_loader", self.eval_samples) if is_eval else ("train_loader", self.train_samples)
        if getattr(self, name) is None:
            setattr(self, name, self.model.get_data_loader(self.config, is_eval=is_eval, samples=samples, verbose=True))
        if len(getattr(self, name)) == 0:
            raise ValueError(f"the {name} has no batch: check its samples, and drop_last with its batch size")
        return getattr(self, name)

    def _windows(self, loader: DataLoader) -> Iterator[list[Any]]:
        """The rest of this epoch's batches, in lists of grad_accum_steps."""
        if self.args.overfit_batch:
            batches = itertools.repeat(next(iter(loader)), len(loader) - self.batches_done)
        else:
            batches = rest_of_epoch(loader, self.epochs_done, self.batches_done)
        while window := list(itertools.islice(batches, self.args.grad_accum_steps)):
            yield window

    def format_batch(self, batch: Any) -> Batch:
        """The loader's batch through format_batch, onto the device, through format_batch_on_device."""
        batch = to_device(self.model.format_batch(batch), self.device)
        return self.model.format_batch_on_device(batch)

    def _model_step(self, method: str, batch: Batch, idx: int) -> tuple[Outputs, Losses]:
        arguments = (idx,) if len(self.optimizer) > 1 else ()
        outputs, losses = getattr(self.model, method)(batch, self.criterion[idx], *arguments)
        check_losses(self.model, method, losses)
        return outputs, losses

    def _named(self, losses: dict[str, Any], idx: int) -> dict[str, torch.Tensor]:
        return named(losses, idx if len(self.optimizer) > 1 else None, self._loss_owners)

    def _suffix(self, idx: int) -> str:
        return f"_{idx}" if len(self.optimizer) > 1 else ""

    def _updates_left(self, updates: int) -> int:
        done = math.ceil(self.batches_done / self.args.grad_accum_steps)
        left = (self.config.epochs - self.epochs_done) * updates - done
        return left if self.config.max_steps is None else min(left, self.config.max_steps - self.total_steps_done)

    # ---- the run's folder ----

    def open_run(self) -> None:
        """Make the run's folder (or go on in continue_path's), open its logs, and restore what is asked for."""
        if self._open:
            return
        self._open, first, source = True, self.output_path is None, self.args.restore_path
        if first and self.args.continue_path:
            self.output_path = Path(self.args.continue_path)
            source = checkpoints.newest_checkpoint(self.output_path)
        elif first:
            self.output_path = new_run_folder(self._output_root, self.config.run_name)
        self.c_logger.open(self.output_path / "trainer_0_log.txt")
        self.dashboard_logger = self._given_dashboard or new_dashboard(self.config, self.output_path)
        if not first:
            return
        checkpoints.write_file(self.output_path / "config.json", lambda f: f.write(self.config.to_json().encode()))
        self.dashboard_logger.add_config(self.config)
        self.c_logger.print_start(self.output_path, self.model, self.device, self.config)
        self.callbacks("on_init_start", self)
        if source:
            checkpoints.restore(self, source, whole=bool(self.args.continue_path))
        self.callbacks("on_init_end", self)

    def close_run(self) -> None:
        """Say how to go on; flush and close the logs."""
        if self._open:
            self.c_logger.print_end(self.output_path, can_continue=checkpoints.exist_in(self.output_path))
            self.dashboard_logger.finish()
            self.c_logger.close()
            self._open = False

    def save_checkpoint(self) -> None:
        """Save checkpoint_<step>.pth and delete the oldest beyond save_n_checkpoints."""
        self.c_logger.print(f"saved {checkpoints.save_step(self)}")
        self._clock.restart()

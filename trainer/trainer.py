"""The Trainer: fit, train_step, evaluate. Read it from top to bottom."""

import functools
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from trainer import optimizers
from trainer.averages import Averages, scalars
from trainer.batches import Batches
from trainer.callbacks import Callbacks
from trainer.command_line import parse_command_line
from trainer.config import TrainerArgs, TrainerConfig
from trainer.coqui_names import CoquiNames
from trainer.device import pick_device
from trainer.distributed import Agreement, Ranks, rank_seed
from trainer.drift import DriftCheck
from trainer.early_stopping import EarlyStopping
from trainer.ema import EMA
from trainer.fsdp import shard
from trainer.loggers.base import DashboardLogger
from trainer.loggers.console import ConsoleLogger, StepClock
from trainer.manual import ManualOptimization
from trainer.model import Batch, Losses, Outputs, TrainerModel, call_step, eval_passes, overrides, own_tensors
from trainer.nan_guard import NanGuard
from trainer.precision import Precision
from trainer.reducer import build_reducers
from trainer.run import Run, check_types
from trainer.saving import Saver
from trainer.seeding import naming_indeterminate, set_backend_flags
from trainer.signals import StopSignals
from trainer.sync_batchnorm import BatchNormSync


class Trainer(Run, Batches, CoquiNames):
    """Trains a TrainerModel. The constructor only assembles; the first use opens the run's folder.

    Args:
        args: how this start goes: continue_path, small_run and so on.
        config: the model's config.
        output_path: where the run's folder is made; the config's by default.
        c_logger: a console logger to use instead of the Trainer's.
        dashboard_logger: a dashboard to use instead of the one that the config names.
        model: the model, built after ``seed_everything(config.training_seed)`` if the run is to be repeatable.
        train_samples: handed to the model's ``get_data_loader``; eval_samples likewise.
        train_loader: a loader to use instead; eval_loader likewise.
        parse_command_line_args: apply ``sys.argv`` to args and config; False when the script has done so.
        callbacks: functions, or lists of them, by callback name.
        gpu: see TrainerArgs.gpu, which comes first.
    """

    def __init__(
        self,
        args: TrainerArgs,
        config: TrainerConfig,
        output_path: str | Path | None = None,
        *,
        c_logger: ConsoleLogger | None = None,
        dashboard_logger: DashboardLogger | None = None,
        model: TrainerModel,
        train_samples: list | None = None,
        eval_samples: list | None = None,
        train_loader: DataLoader | None = None,
        eval_loader: DataLoader | None = None,
        parse_command_line_args: bool = True,
        callbacks: Mapping[str, Callable | list[Callable]] | None = None,
        gpu: int | None = None,
    ) -> None:
        c_logger = c_logger or ConsoleLogger()  # which shows what is logged from here on
        check_types(args, config, model)
        if parse_command_line_args:
            parse_command_line(config, args=args, leave_others=True)
        args.check()
        config.check()
        super().__init__(output_path or config.output_path, c_logger, dashboard_logger)
        self.args, self.config = args, config
        self.ranks = Ranks.from_environment(config, args)
        self._seed = rank_seed(config.training_seed, self.ranks.rank)
        several = self.ranks.world_size > 1
        local_rank = self.ranks.local_rank if several else None
        self.device = pick_device(config.device, gpu if args.gpu is None else args.gpu, local_rank)
        set_backend_flags(config, self.device)
        self.shards = shard(model, config, self.ranks, self.device)
        self.model = model if self.shards else model.to(self.device)
        self.take_data(train_samples, eval_samples, train_loader, eval_loader)
        self.optimizer = optimizers.build_optimizers(model, config, self.device)
        self.scheduler = optimizers.build_schedulers(model, config, self.optimizer)
        self.scheduler_units = optimizers.scheduler_units(config, self.scheduler)
        self.criterion = optimizers.build_criteria(model, self.optimizer, self.device)
        overlap = config.overlap_gradients
        self.reducers = build_reducers(self.shards, model, self.optimizer, self.ranks, self.device, overlap)
        self.batch_norms = BatchNormSync(model) if config.sync_batchnorm and several else None
        self.drift = DriftCheck(model, self.ranks, config.drift_check_steps)
        self._max_norms = optimizers.build_max_norms(config, self.optimizer)
        self.precision = Precision(config, self.device)
        self.guard = NanGuard(config, model, self.precision, self.device, in_step=several)
        self.manual = ManualOptimization(self) if overrides(model, "optimize") else None
        self.ema = None if config.ema_decay is None else EMA(model, config.ema_decay)
        patience = config.early_stopping_patience
        self.early_stopping = EarlyStopping(patience, config.early_stopping_min_delta) if patience else None
        self.saver = Saver(self)
        self.callbacks = Callbacks(model, [*self.criterion, *self.optimizer], callbacks)
        self._clock, self._signals = StepClock(), StopSignals()
        self._agreed: int | None = None  # the signal that any rank has heard of

        self.total_steps_done = 0  # updates
        self.epochs_done, self.batches_done = 0, 0  # batches of the epoch under way; all, while it is evaluated
        self.best_loss = {"train_loss": math.inf, "eval_loss": math.inf if config.run_eval else None}
        self.best_models: dict[int, float] = {}  # with save_n_best, their losses by step
        gather = self.ranks.gather if several else None
        policy = "raise" if config.nan_policy == "raise" else "leave out"
        self._averages = functools.partial(Averages, not_finite=policy, gather=gather, owners={})
        self.keep_avg_train, self.keep_avg_eval = self._averages(), self._averages()
        self.stepped_optimizers: set[int] = set()  # optimizers that made an update in this epoch
        self.own_schedulers: set[int] = set()  # those that the model's own optimize steps
        self.last_eval_step = -1  # the update that was evaluated last

    # ---- fit ----

    def fit(self) -> None:
        """Train, evaluate and test, epoch after epoch, until the config's epochs or max_steps are done.

        Raises:
            SystemExit: Ctrl-C, SIGTERM or SIGUSR1 came (exit code 130, 143 or 138), and the run is saved.
            FloatingPointError: a loss or a gradient is not finite (see nan_policy).
        """
        self._agreed = None
        self.keep_avg_train.drop_unread()
        try:
            with self.ranks.roll_call.naming_absent(), naming_indeterminate():
                self._start()
            if self._signal is not None:
                self.callbacks("on_keyboard_interrupt", self)
                raise SystemExit(128 + self._signal)
        except Exception as error:
            self.c_logger.keep_traceback(error)
            raise
        finally:
            self._signals.received = self._agreed = None
            self.close_run()

    def _start(self) -> None:
        set_backend_flags(self.config, self.device)  # another Trainer may have been built since
        self.open_run()
        self.build_loaders()
        with self._signals:
            if (self.args.skip_train_epoch or self.args.start_with_eval) and self.config.run_eval:
                self.evaluate()
            if self.args.skip_train_epoch:
                if self._signal is None:
                    self.test()
            elif self._is_done() and not self._end_is_left() and self._signal is None:
                self.c_logger.print("nothing left to train: raise epochs, or max_steps")
            else:
                self._fit()
            self.saver.wait()  # as long as a second signal ends it at once

    def _fit(self) -> None:
        if self._signal is None:
            self.fit_epoch()  # or only what its last update has left: see _start
        while not self._finished():
            self.fit_epoch()
        if self._signal is not None:
            self.c_logger.warn(f"stopped by {signal.Signals(self._signal).name}")
        if self.config.save_checkpoints and (self._signal is None or self.config.save_on_interrupt):
            self.saver.save_now()

    @property
    def _signal(self) -> int | None:
        """The signal to stop that this process, or the ranks together, have heard of."""
        return self._signals.received if self.ranks.world_size == 1 else self._agreed

    def _finished(self) -> bool:
        return self._is_done() or self._signal is not None

    def fit_epoch(self) -> None:
        """One epoch, or what is left of it: train, evaluate, keep the best model, test."""
        self.tell("on_epoch_start")
        batches = self.train_epoch()
        if self._signal is not None:
            return
        is_whole = self.batches_done == batches
        if self.config.run_eval and self._evaluation_is_due():
            is_extra = not (is_whole and self._epoch_is_due())
            self._evaluate_and_keep_best(is_extra)
        elif not self.config.run_eval and self.last_eval_step != self.total_steps_done:
            self.last_eval_step = self.total_steps_done
            self.keep_best("train_loss", self.keep_avg_train.means, is_extra=not is_whole)
        if self._signal is not None:
            return
        if self._test_is_due():
            self.test()
        if is_whole:  # also if a signal came during the test, which would otherwise be logged again
            self.tell("on_epoch_end")
            stepped = self.stepped_optimizers - self.own_schedulers
            optimizers.step_schedulers(self.scheduler, self.scheduler_units, "epoch", stepped)
            self.log_epoch()  # not before: what is saved before the epoch is over logs it when it goes on
            self.epochs_done += 1
            self.batches_done = 0
            self.stepped_optimizers.clear()

    def train_epoch(self) -> int:
        """Train on the batches of this epoch that are not done yet; returns how many batches the epoch has."""
        loader, k = self.get_loader(is_eval=False), self.args.grad_accum_steps
        n = self.epoch_length(loader)
        done = math.ceil(self.batches_done / k)
        updates = done + self.updates_in(n - self.batches_done)
        if self.batches_done == 0:
            self.keep_avg_train = self._averages()
        self.c_logger.start_epoch(self.epochs_done, self.config.epochs, updates, done)
        self.model.train()
        self.tell("on_train_epoch_start")
        if self.batches_done:
            self.evaluate_if_step_is_due()  # saved, or stopped, before this was done
        self.precision.begin()
        self.reducers.begin()
        if self.manual is None:  # what an update that failed has left, or what belonged to no optimizer
            self.model.zero_grad(set_to_none=True)
        self._clock.restart()
        is_over = self._is_done()  # goes on after its last update, or the evaluation above has stopped it early
        for batches in self._clock.wait_for(() if is_over else self.windows(loader)):
            batch, outputs = self.train_step(batches)
            self.after_update(updates, batch, outputs)
            self.callbacks("on_train_step_end", self)  # what it saves goes on behind the update, which is logged
            del batch, outputs  # not alive, with all that they hold, during the next forward pass
            if self._finished():
                break
        else:
            n = n if is_over else self.batches_done  # what the loader gave: its len() may be an estimate
        self.guard.finish()
        self.keep_avg_train.read()
        if not self.keep_avg_train.means and self._signal is None:
            self.c_logger.warn(f"{type(self.model).__name__} returned no loss for any batch of the epoch")
        self.c_logger.end_epoch()
        self.tell("on_train_epoch_end")
        return n

    def train_step(self, batches: list[Any]) -> tuple[Batch, dict[str, Any] | None]:
        """One update of every optimizer's weights from the batches of one accumulation window.

        Returns:
            The last batch, as the model saw it, and its outputs (of optimizer ``i`` named ``NAME_i``, if several); None
            if the model has skipped all batches.
        """
        self.callbacks("on_train_step_start", self)
        self._rates = {f"current_lr{self._suffix(i)}": o.param_groups[0]["lr"] for i, o in enumerate(self.optimizer)}
        self.guard.begin(self.total_steps_done + 1, batches)
        self._has_updated = False
        formatted, samples = zip(*map(self.prepare, batches))
        agreement = self.ranks.agree(sum(samples), self._signals.received, self.saver.minutes_are_over())
        optimize = self._optimize if self.manual is None else self.manual.run
        outputs = optimize(formatted, samples, agreement)
        self._agreed, self.saver.is_due = agreement.signal, agreement.save
        self.precision.update()
        self.ranks.broadcast_buffers(self.model)
        if self.ema is not None and self._has_updated:
            self.ema.update()
        self.total_steps_done += 1
        self.batches_done += len(batches)
        return formatted[-1], outputs

    def _optimize(self, batches: list[Batch], samples: list[int], agreement: Agreement) -> dict[str, Any] | None:
        """Each optimizer in turn sees all batches of the window, so that accumulating is the same as one larger batch:
        the second optimizer's losses are computed with what the first one has updated.
        """
        outputs: dict[str, Any] | None = None
        several, kept = len(batches) > 1, [{} for _ in batches]
        for idx, optimizer in enumerate(self.optimizer):
            suffix, any_loss = self._suffix(idx), False
            # of several optimizers' weights, only this one's need gradients now
            parameters = optimizers.parameters_of(optimizer) if suffix else None
            for i, (batch, n, tensors) in enumerate(zip(batches, samples, kept), start=1):
                step = functools.partial(self._forward, batch, idx, tensors if several else None)
                with self.over_ranks(n):
                    found, losses = self.reducers.enter(idx, step, is_last=i == len(batches))
                    if not losses:
                        continue
                    inputs = self.reducers.inputs(idx, parameters)
                    if inputs is None or any(p.requires_grad for p in inputs):
                        # the share of the window's samples: their mean, over the ranks too, is what is minimised
                        weight = n / agreement.samples * self.reducers.scale
                        self.precision.backward(losses["loss"], weight, inputs)
                any_loss = True
                self.guard.saw(losses["loss"])
                self.keep_avg_train.add(self.total_steps_done + 1, scalars(losses), n, idx=self._index(idx))
                outputs = {**(outputs or {}), **{f"{name}{suffix}": value for name, value in (found or {}).items()}}
            if self.update(idx, any_loss):
                optimizers.step_schedulers(self.scheduler, self.scheduler_units, "step", {idx})
            optimizer.zero_grad(set_to_none=True)
        return outputs

    def _forward(self, batch: Batch, idx: int, tensors: dict[str, Any] | None) -> tuple[Outputs, Losses]:
        """The model's train_step for an optimizer; with the tensors that earlier passes over this batch have left."""
        with self.precision.autocast(), nullcontext() if tensors is None else own_tensors(self.model, tensors):
            outputs, losses = call_step(self.model, "train_step", batch, self.criterion[idx], self._index(idx))
        if losses and self.callbacks.hears("before_backward_pass"):
            with nullcontext() if tensors is None else optimizers.gradients_apart(self.optimizer[idx]):
                self.callbacks("before_backward_pass", losses, self.optimizer)
        return outputs, losses

    def update(self, idx: int, has_loss: bool = True) -> bool:
        """With an optimizer's gradients: unscale, measure, check, clip, and step; False if it was not stepped."""
        optimizer, losses = self.optimizer[idx], self.guard.sum_of_losses()
        if self.manual is None:
            losses, has_loss = self.reducers.summed(idx, losses, has_loss)
        else:
            has_loss = self.ranks.sum_gradients(optimizers.parameters_of(optimizer), losses, has_loss)
        if not has_loss:
            return False  # skipped by the model, on all ranks
        self.precision.unscale(optimizer)
        self.callbacks("before_gradient_clipping")
        norm = optimizers.gradient_norm(optimizer)
        name = f"grad_norm{self._suffix(idx)}"
        self.keep_avg_train.add(self.total_steps_done + 1, {name: norm}, 1, must_be_finite=False)
        if not self.guard.allows(idx, optimizer, losses, norm):
            return False
        optimizers.clip_gradients(optimizer, self._max_norms[idx], norm)
        optimizer.step()
        self._has_updated = True
        self.stepped_optimizers.add(idx)
        return True

    # ---- evaluate ----

    def evaluate(self) -> dict[str, float] | None:
        """Mean losses over the evaluation samples, each sample counted once; None when Ctrl-C came in between."""
        self.open_run()
        self.keep_avg_train.read()  # its names come before those of the evaluation, saved in between or not
        start, shown = time.perf_counter(), None
        # of an evaluation with a NaN, the mean is NaN: the model is not to be taken for the best
        keep = {} if self.config.nan_policy == "raise" else {"not_finite": "keep"}
        self.keep_avg_eval = self._averages("evaluation batch", **keep)
        with self._evaluating():
            self.callbacks("on_eval_epoch_start", self)
            loader = self.get_loader(is_eval=not self.args.overfit_batch)
            passes = eval_passes(self.model, self.criterion)
            for i, batch in enumerate(self.evaluation_batches(loader), start=1):
                batch, outputs = self.eval_step(batch, i, passes)
                # the first batch holds the same samples every time: what is shown of it can be compared
                if shown is None and outputs is not None:
                    shown = batch, outputs
            if self._signal is not None:
                return None
            self.keep_avg_eval.read()
            step, means = self.total_steps_done, self.keep_avg_eval.means
            self.c_logger.print_eval(f"step {step}", means, time.perf_counter() - start)
            self.dashboard_logger.eval_stats(step, means)
            if shown is not None:
                self.show("eval_log", *shown)
            self.callbacks("on_eval_epoch_end", self)
        return means

    def eval_step(self, batch: Any, number: int, passes: list) -> tuple[Batch, dict[str, Any] | None]:
        """Losses of an evaluation batch, by all of eval_passes; returns the batch and the outputs, as train_step."""
        self.callbacks("on_eval_step_start", self)
        (batch, samples), outputs = self.prepare(batch), None
        for idx, criterion in passes:
            with self.precision.autocast():
                found, losses = call_step(
                    self.model, "eval_step", batch, criterion, idx, needs_loss=self.manual is None
                )
            if losses:
                self.keep_avg_eval.add(number, scalars(losses), samples, idx=idx)
                found = {k if idx is None else f"{k}_{idx}": v for k, v in (found or {}).items()}
                outputs = {**(outputs or {}), **found}
        if self.config.print_eval:
            self.keep_avg_eval.read()
            self.c_logger.print_eval(f"batch {number}", self.keep_avg_eval.last)
        self.callbacks("on_eval_step_end", self)
        return batch, outputs

    def _evaluate_and_keep_best(self, is_extra: bool = False) -> None:
        if self.last_eval_step != self.total_steps_done and (means := self.evaluate()) is not None:
            self.last_eval_step = self.total_steps_done
            self.keep_best("eval_loss", means, is_extra)

    # ---- small things ----

    def _index(self, idx: int) -> int | None:
        """The optimizer_idx of a step: None when there is one optimizer."""
        return idx if len(self.optimizer) > 1 else None

    def _suffix(self, idx: int) -> str:
        return f"_{idx}" if len(self.optimizer) > 1 else ""

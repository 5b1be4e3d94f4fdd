"""What a Trainer is besides its loop: the run's folder, its logs and its checkpoints."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer import checkpoint as checkpoints
from trainer import restarts
from trainer.averages import target_loss
from trainer.config import TrainerArgs, TrainerConfig
from trainer.loggers.base import DashboardLogger, config_text
from trainer.loggers.tensorboard import new_dashboard
from trainer.model import Batch, TrainerModel, overrides
from trainer.optimizers import describe, step_schedulers
from trainer.provenance import new_run_folder
from trainer.seeding import capture_rng_state, forked_rng, seed_unless_done
from trainer.storage import write_file

if TYPE_CHECKING:
    from trainer.loggers.console import ConsoleLogger


class Run:
    """The run's folder and logs, opened by the first use and closed by the end of ``fit``; a base class of Trainer."""

    def __init__(self, root: str | Path, c_logger: "ConsoleLogger", dashboard: DashboardLogger | None) -> None:
        self._root = str(root)
        self.c_logger = c_logger
        self._given_dashboard, self._dashboard = dashboard, dashboard
        self._folder: Path | None = None
        self._is_open = self._goes_on = self.is_evaluating = False
        self._log_sizes: dict[str, int | None] = {}  # of the log files, by rank, in the checkpoint that is continued
        self.last_test_step = -1  # the update after which the model was tested last
        self.own_rng: dict[str, Any] | None = None  # the training's, where a callback has others
        self._told: set[str] = set()

    @property
    def output_path(self) -> Path:
        """The run's folder; asked for before the training, it is made, and the run begins."""
        if self._folder is None:
            self.open_run()
        return self._folder

    @property
    def dashboard_logger(self) -> DashboardLogger:
        """What writes the dashboard; asked for before the training, the run begins."""
        if self._dashboard is None:
            self.open_run()
        return self._dashboard

    @dashboard_logger.setter
    def dashboard_logger(self, dashboard: DashboardLogger) -> None:
        self._given_dashboard = self._dashboard = dashboard

    def open_run(self) -> None:
        """Make the run's folder (or go on in continue_path's), open its logs, and restore what is asked for."""
        if self._is_open:
            return
        self._is_open, first = True, self._folder is None
        try:
            if first:
                self.ranks.open(self.device)
                found = self.ranks.broadcast(self._new_folder() if self.ranks.is_main else None)
                self._folder, self._goes_on = found
                restarts.remember(self._folder, writes=self.ranks.local_rank == 0)
            self._open_logs()
            if first:
                self._begin()
        except BaseException as error:
            self.c_logger.keep_traceback(error)
            self.close_run(can_continue=False)  # what it would start is what has just failed
            if first:  # the next use begins anew
                self._folder, self._dashboard = None, self._given_dashboard
            raise

    def _open_logs(self) -> None:
        self.c_logger.open(self._folder / f"trainer_{self.ranks.rank}_log.txt", on_console=self.ranks.is_main)
        if not self.ranks.is_main:
            self._dashboard = DashboardLogger()  # only the first rank writes
        elif self._given_dashboard is None:
            self._dashboard = new_dashboard(self.config, self._folder, self._folder.name)

    def _new_folder(self) -> tuple[Path, bool]:
        """The run's folder, and whether there is something to go on from."""
        if self.args.continue_path:
            return Path(self.args.continue_path), True
        if (folder := restarts.earlier_folder()) is not None:
            return folder, checkpoints.exist_in(folder)
        return new_run_folder(self._root, self.config.run_name), False

    def _begin(self) -> None:
        """Say what is going to be trained, restore what is asked for, and write the config."""
        args, config = self.args, self.config
        self.guard.folder = self._folder
        self.guard.suffix = f"_rank{self.ranks.rank}" if self.ranks.rank else ""
        self.c_logger.print_start(self._folder, self.model, self.device, config)
        if self.ranks.world_size > 1:
            n, size = self.ranks.world_size, config.batch_size * args.grad_accum_steps
            self.c_logger.print(f"{n} ranks of {size} samples each: {n * size} samples in an update")
        for line in describe(self.scheduler, self.scheduler_units):
            self.c_logger.print(line)
        if args.use_accelerate:
            self.c_logger.warn("use_accelerate: the Trainer's own loop does what Accelerate is for; going on with it")
        seed_unless_done(config.training_seed)
        self.ranks.seed(config.training_seed)  # each of the other ranks draws its own
        self.callbacks("on_init_start", self)  # which may change the config: a model adds its speakers, say
        if self.ranks.is_main:
            checkpoints.delete_leftovers(self, self._folder)
        if self._goes_on:
            checkpoints.continue_newest(self, self._folder)
        elif args.restore_path:
            checkpoints.restore(self, args.restore_path)
        if not self._goes_on and self.c_logger.rewind(0, step=0):
            self.dashboard_logger.rewind({}, step=0)  # restarted by the launcher, from no checkpoint
        self.ranks.broadcast_model(self.model)
        if self.ema is not None and not self._goes_on:
            self.ema.reset()  # the other ranks may have drawn other weights than rank 0
        if self.ranks.is_main:
            # after the restoring: an override that does not fit a continued run must not spoil its config
            self.write_config()
            if not self._goes_on:
                self.dashboard_logger.add_config(config)
        self.tell("on_init_end")

    def tell(self, name: str) -> None:
        """Call what is registered under a name that a run calls again when it goes on in the middle of an epoch.

        What it draws depends on the epoch alone, and the training draws the same with it and without.
        """
        if self.callbacks.hears(name):
            self.own_rng = capture_rng_state()  # should it save a checkpoint
            try:
                with forked_rng((self._seed + self.epochs_done) % 2**32):
                    self.callbacks(name, self)
            finally:
                self.own_rng = None

    def log_positions(self) -> dict[str, Any]:
        """How far the logs are written, for a checkpoint; all ranks must call it together."""
        sizes = {str(rank): size for rank, size in enumerate(self.ranks.gather(self.c_logger.position()))}
        dashboard = self.dashboard_logger
        # logs of ranks that this start does not have stay as they are
        return {
            "console": {**self._log_sizes, **sizes},
            "dashboards": {type(dashboard).__name__: dashboard.position()},
        }

    def rewind_logs(self, state: Mapping[str, Any]) -> None:
        """Drop from the logs what came after a checkpoint that this run goes on from: it will be logged again.

        Checkpoints of older formats do not say how far the logs were written: all stays.
        """
        if (positions := state.get("logs")) is not None:
            self._log_sizes = dict(positions["console"])
            self.c_logger.rewind(self._log_sizes.get(str(self.ranks.rank)), state["step"])
            dashboard = self.dashboard_logger
            dashboard.rewind(positions["dashboards"].get(type(dashboard).__name__), state["step"])
        if state.get("config") != self.config.to_dict():
            self.dashboard_logger.add_text("config", config_text(self.config), state["step"])

    def write_config(self) -> None:
        """Write config.json."""
        text = self.config.to_json().encode()
        write_file(self._folder / "config.json", lambda file: file.write(text))

    def close_run(self, can_continue: bool = True) -> None:
        """Wait for the last checkpoint; say how to go on, if it can; flush and close the logs."""
        if self._is_open:
            self._is_open = False
            if self._folder is None:  # it could not even be made
                return
            try:
                self.saver.wait()
            finally:  # a NaN that the thread has found must not leave the logs open
                self.end_workers()
                self.c_logger.print_end(self._folder, can_continue=can_continue and checkpoints.exist_in(self._folder))
                if self._dashboard is not None:
                    self._dashboard.finish()
                self.c_logger.close()

    def save_checkpoint(self) -> None:
        """Save checkpoint_<step>.pth, and delete what save_n_checkpoints and save_max_age do not keep.

        Raises:
            OSError: it could not be written.
            RuntimeError: an evaluation is under way, which holds averaged weights and other random states.
        """
        self.saver.save_now()

    def save_best_model(self) -> None:
        """Save best_model.pth; raises as save_checkpoint does."""
        self.saver.save_now(best=True)

    def keep_best(self, name: str, means: Mapping[str, float], is_extra: bool) -> None:
        """Save best_model.pth when the target loss is lower than ever before; tell those who count evaluations.

        Args:
            name: ``eval_loss`` or ``train_loss``, whichever is judged.
            means: of all losses.
            is_extra: the training was stopped inside an epoch; continued, it would not evaluate here. Schedulers and
                early stopping do not count it.

        Raises:
            ValueError: there is no loss to judge by, and a scheduler, early stopping or save_n_best needs one.
        """
        if not means:  # the model has skipped all batches
            return
        config = self.config
        loss = target_loss(means, config.target_loss, len(self.optimizer))
        if loss is None:  # a model with its own optimize names its losses as it likes
            needed = self.early_stopping is not None or "evaluation" in self.scheduler_units
            if needed or config.save_n_best is not None:
                raise ValueError(f"target_loss=None: name the loss to judge by; there are {', '.join(means)}")
            self.c_logger.print(f"best model: the newest, since no target_loss is named among {', '.join(means)}")
        if not is_extra:
            stepped = self.stepped_optimizers - self.own_schedulers
            step_schedulers(self.scheduler, self.scheduler_units, "evaluation", stepped, loss)
            if self.early_stopping is not None:
                self.early_stopping.update(loss)
                if self.early_stopping.should_stop:
                    self.c_logger.print(f"stopped early: {self.early_stopping.message}")
        if self.total_steps_done <= config.save_best_after:
            return
        self.saver.forget_lost_best()
        before = dict(self.best_loss)
        is_best, beaten = loss is None or loss < self.best_loss[name], []
        if is_best and loss is not None:
            self.best_loss[name] = loss
            self.c_logger.print(f"best model so far: {config.target_loss or 'loss'} {loss:.5g}")
        if config.save_n_best is not None and loss is not None:
            beaten = checkpoints.rank_model(self.best_models, self.total_steps_done, loss, config.save_n_best)
        if config.save_checkpoints and (is_best or self.total_steps_done in self.best_models):
            self.saver.save_best(is_best, beaten, before)

    # ---- what is due, and what is shown ----

    def _is_done(self) -> bool:
        """Whether no update is left: by epochs, by max_steps, or since the training was stopped early."""
        steps = math.inf if self.config.max_steps is None else self.config.max_steps
        done = self.epochs_done >= self.config.epochs or self.total_steps_done >= steps
        return done or (self.early_stopping is not None and self.early_stopping.should_stop)

    def _end_is_left(self) -> bool:
        """Whether the run was stopped after an update, before all was done that follows if that is the last one."""
        if self.batches_done == 0:  # the epoch before is over
            return False
        is_whole = self.batches_done == self.epoch_length(self.train_loader)
        return is_whole or self.last_eval_step != self.total_steps_done or self._test_is_due()

    def _evaluation_is_due(self) -> bool:
        return self._epoch_is_due() or self._finished()

    def _epoch_is_due(self) -> bool:
        epoch = self.epochs_done + 1
        return epoch % self.config.run_eval_epochs == 0 or epoch == self.config.epochs

    def _test_is_due(self) -> bool:
        has_begun = self.epochs_done >= self.config.test_delay_epochs
        return has_begun and self._evaluation_is_due() and self.last_test_step != self.total_steps_done

    def after_update(self, updates: float, batch: Batch, outputs: dict[str, Any] | None) -> None:
        """What is due after an update: print, plot, save, evaluate. Only here does the host wait for the device."""
        config, step, average = self.config, self.total_steps_done, self.keep_avg_train
        self.c_logger.advance()
        printing = step % config.print_step == 0 or step == 1
        plotting = step % config.plot_step == 0  # on all ranks, also on one that has skipped its batch
        if printing or plotting:
            average.read()
            times, left = self._clock.read(), self._clock.time_left(self._updates_left(updates))
            rates = {name: float(rate) for name, rate in self._rates.items()}
            # losses first: a model's own optimize hands them over after its steps
            last = dict(sorted(average.last.items(), key=lambda entry: entry[0].startswith("grad_norm")))
            values = {**last, **rates, **self.precision.stats(), **self.guard.stats()}
        if printing:
            self.c_logger.print_train_step(step, values, average.means, times, left)
        if plotting:
            self.dashboard_logger.train_step_stats(step, {**values, **times})
            if outputs is not None:
                self.show("train_log", batch, outputs)
            self._clock.restart()
        self.drift.after_update(step)
        if self.saver.after_update():
            self._clock.restart()
        self.evaluate_if_step_is_due()

    def evaluate_if_step_is_due(self) -> None:
        """What run_eval_steps asks for."""
        every = self.config.run_eval and self.config.run_eval_steps
        if every and self.total_steps_done % every == 0:
            self._evaluate_and_keep_best()

    def _updates_left(self, updates: float) -> float:
        done = math.ceil(self.batches_done / self.args.grad_accum_steps)
        left = (self.config.epochs - self.epochs_done) * updates - done
        return left if self.config.max_steps is None else min(left, self.config.max_steps - self.total_steps_done)

    @contextlib.contextmanager
    def _evaluating(self, without_gradients: Callable = torch.inference_mode) -> Iterator[None]:
        """Eval mode, averaged weights, freshly seeded generators; all is put back as it was.

        Evaluations then draw the same numbers every time, and the training does not depend on them.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.swapped()
        self.is_evaluating = True
        try:
            with averaged, without_gradients(), forked_rng(self._seed):
                yield
        finally:
            for module, training in modes:
                module.training = training
            self.is_evaluating = False
            self._clock.restart()

    def log_epoch(self) -> None:
        """Write the means of a training epoch that is over."""
        self.dashboard_logger.train_epoch_stats(self.total_steps_done, self.keep_avg_train.means)
        if self.config.model_param_stats:
            with self.gathered():
                self.dashboard_logger.model_weights(self.model, self.total_steps_done)

    def test(self) -> None:
        """Call the model's test_run and test_log, if it has them."""
        self.last_test_step = self.total_steps_done
        if not overrides(self.model, "test_run") or not (self.ranks.is_main or self.shards):
            return
        # what is made in inference mode cannot be used in training
        with self._evaluating(torch.no_grad), self.gathered():
            if self.ranks.is_main:
                outputs = self.model.test_run(self)
                if overrides(self.model, "test_log"):
                    self.model.test_log(outputs, self.dashboard_logger, self.total_steps_done)
        self.dashboard_logger.flush()

    def gathered(self) -> contextlib.AbstractContextManager:
        """Inside the block rank 0 has the whole model; all ranks must enter."""
        return contextlib.nullcontext() if self.shards is None else self.shards.gathered()

    def show(self, hook: str, batch: Any, outputs: dict[str, Any]) -> None:
        """Call the model's train_log or eval_log, if it has it."""
        if overrides(self.model, hook) and (self.ranks.is_main or self.shards):
            try:
                with torch.no_grad(), forked_rng(self._seed), self.gathered():
                    if not self.ranks.is_main:
                        return
                    outputs = {name: _in_full_precision(value) for name, value in outputs.items()}
                    getattr(self.model, hook)(batch, outputs, self.dashboard_logger, self.total_steps_done)
            except NotImplementedError as error:
                # models of Coqui TTS inherit hooks that call what only some of them define
                self.warn_once(f"{type(self.model).__name__}.{hook} shows nothing: {error!r}")
        self.dashboard_logger.flush()

    def warn_once(self, text: str) -> None:
        """One line that stands out, the first time."""
        if text not in self._told:
            self._told.add(text)
            self.c_logger.warn(text)


def check_types(args: Any, config: Any, model: Any) -> None:
    """Raise a TypeError unless a Trainer's arguments are what they have to be."""
    for name, value, base in (("args", args, TrainerArgs), ("config", config, TrainerConfig)):
        if not isinstance(value, base):
            raise TypeError(f"{name} is a {type(value).__name__}: give a {base.__name__}, or a class derived from it")
    if not isinstance(model, TrainerModel):
        raise TypeError(f"model is a {type(model).__name__}: derive its class from TrainerModel")


def _in_full_precision(value: Any) -> Any:
    """An output of a step under autocast, as NumPy and plots can read it."""
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value

"""The console: a line for every print_step, a live progress bar where there is a terminal, and the run's log file."""

import datetime
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import nn

from trainer.config import TrainerConfig

logger = logging.getLogger("trainer")
# one console for lines and bar: rich then prints lines above the bar
console = Console(soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {self.format(record)}" if warning else self.format(record)
        console.print(text, style="yellow" if warning else None, markup=False, emoji=False, highlight=False)


class _FileFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def set_up_logging() -> None:
    """Show the ``trainer`` logger's messages on the console, unless the program has set up logging by itself."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(_ConsoleHandler())


def format_values(values: Mapping[str, float]) -> str:
    """``loss 1.234  lr 0.0002``"""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def format_duration(seconds: float) -> str:
    """``0:12:31``, or ``3 days, 4:05:00``."""
    return str(datetime.timedelta(seconds=round(seconds)))


class ConsoleLogger:
    """Tells a training's progress in lines (console and log file) and, on a terminal, in a bar below them."""

    def __init__(self) -> None:
        set_up_logging()
        self._file: logging.Handler | None = None
        self._progress: Progress | None = None
        self._on_console = True

    def open(self, log_file: Path, on_console: bool = True) -> None:
        """Also write every line to this file (appended when it is there), or only there."""
        self._on_console = on_console
        if not on_console:
            for handler in [h for h in logger.handlers if isinstance(h, _ConsoleHandler)]:
                logger.removeHandler(handler)
        self._file = logging.FileHandler(log_file, encoding="utf8")
        self._file.setFormatter(_FileFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(self._file)

    def close(self) -> None:
        """End the bar and the log file."""
        self.end_epoch()
        if self._file is not None:
            logger.removeHandler(self._file)
            self._file.close()
            self._file = None

    def print(self, text: str) -> None:
        """One line."""
        logger.info(text)

    def keep_traceback(self, error: BaseException) -> None:
        """Write what ends the training into the log file; the console shows it by itself."""
        if self._file is not None:
            trace = (type(error), error, error.__traceback__)
            self._file.emit(logger.makeRecord("trainer", logging.ERROR, "", 0, "the training ends here", (), trace))

    def warn(self, text: str) -> None:
        """One line that stands out."""
        logger.warning(text)

    def print_start(self, folder: Path, model: nn.Module, device: torch.device, config: TrainerConfig) -> None:
        """What is going to be trained, and where."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        precision = config.precision if config.mixed_precision else "fp32"
        self.print(f"run folder: {folder}")
        self.print(f"{type(model).__name__}: {parameters:,} parameters, {device}, {precision}")

    def print_end(self, folder: Path, can_continue: bool) -> None:
        """Where the results are, and how to go on."""
        self.print(f"run folder: {folder}")
        self.print(f"look at it:  tensorboard --logdir {shlex.quote(str(folder))}")
        if can_continue:
            launcher = os.environ.get("TRAINER_LAUNCHER", "python")  # with as many ranks as before
            self.print(f"continue it: {launcher} {shlex.join([sys.argv[0], '--continue_path', str(folder)])}")

    def start_epoch(self, epoch: int, epochs: int, updates: int, done: int) -> None:
        """An epoch of ``updates`` updates begins, ``done`` of which were made before the run was continued."""
        self.print(f"epoch {epoch + 1}/{epochs}: {updates} updates" + (f", {done} of them done before" if done else ""))
        if console.is_terminal and self._on_console:
            columns = (
                TextColumn("epoch {task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task(f"{epoch + 1}/{epochs}", total=updates, completed=done, state="")
            self._progress.start()

    def end_epoch(self) -> None:
        """The epoch's bar goes away; its lines stay."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def advance(self) -> None:
        """One more update is done."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def print_train_step(
        self, step: int, last: Mapping[str, float], means: Mapping[str, float], times: Mapping[str, float], left: float
    ) -> None:
        """A line with the losses of this update, the epoch's mean, the times [s], and the time left [s]."""
        name = next(iter(last), "")
        shown_mean = {f"avg_{name}": means[name]} if name in means else {}
        seconds = "  ".join(f"{name} {value:.3f} s" for name, value in times.items())
        self.print(f"step {step}: {format_values({**last, **shown_mean})}  {seconds}  left {format_duration(left)}")
        if self._progress is not None:
            # short: a terminal of 80 columns has to hold it
            loss = format_values(dict(list(last.items())[:1]))
            seconds = "+".join(f"{value:.3f}" for value in times.values())
            state = f"{loss}  {seconds} s  left {format_duration(left)}"
            self._progress.update(self._task, state=state)

    def print_eval(self, where: str, values: Mapping[str, float], seconds: float | None = None) -> None:
        """A line with the losses of an evaluation, or of one of its batches."""
        took = "" if seconds is None else f"  ({seconds:.1f} s)"
        self.print(f"eval at {where}: {format_values(values)}{took}")


class StepClock:
    """Measures the wall time of updates, apart from the time spent waiting for the loader."""

    def __init__(self) -> None:
        self._seconds = self._updates = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval; what happened since the last reading (an evaluation, say) is not counted."""
        self._start = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def wait_for(self, batches: Iterable) -> Iterator:
        """Iterate, counting the time until each item comes as loader time."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            self._steps += 1
            yield item

    def read(self) -> dict[str, float]:
        """Seconds per update since the interval began: ``step_time`` without, ``loader_time`` the wait for data."""
        total = time.perf_counter() - self._start
        self._seconds += total
        self._updates += self._steps
        steps = max(1, self._steps)
        times = {"step_time": (total - self._waited) / steps, "loader_time": self._waited / steps}
        self.restart()
        return times

    def time_left(self, updates: int) -> float:
        """Seconds that so many updates will take, going by all that were read."""
        return updates * self._seconds / max(1.0, self._updates)

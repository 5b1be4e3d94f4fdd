"""The console: a line for every print_step, a live progress bar where there is a terminal, and the run's log file."""

import contextlib
import datetime
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import nn

from trainer.config import TrainerConfig
from trainer.provenance import as_a_shell_calls

logger = logging.getLogger("trainer")
# arguments that choose how a run starts, or that the launcher sets; each takes one value
_OF_ONE_START = ("continue_path", "restore_path", "best_path", "use_ddp", "rank", "group_id")
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


class _LogFile(logging.FileHandler):
    """Tells once that lines cannot be written, since the disk is full say; python prints a traceback for each."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            logger.warning(f"{self.baseFilename}: could not be written ({error.strerror or error}); lines may be lost")


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
    """``0:12:31``, or ``3 days, 4:05:00``; ``unknown`` for infinity."""
    return "unknown" if seconds == math.inf else str(datetime.timedelta(seconds=round(seconds)))


def _now() -> str:
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"


class ConsoleLogger:
    """Tells a training's progress in lines (console and log file) and, on a terminal, in a bar below them."""

    def __init__(self) -> None:
        set_up_logging()
        self._file: _LogFile | None = None
        self._size: int | None = None  # of a file that was closed
        self._earlier = 0  # bytes that earlier starts of the run have written into the file
        self._progress: Progress | None = None
        self._on_console = True

    def open(self, log_file: Path, on_console: bool = True) -> None:
        """Also write every line to this file (appended when it is there), or only there."""
        self._on_console = on_console
        if not on_console:
            for handler in [h for h in logger.handlers if isinstance(h, _ConsoleHandler)]:
                logger.removeHandler(handler)
        self._earlier = log_file.stat().st_size if log_file.is_file() else 0
        self._file = _LogFile(log_file, encoding="utf8")
        self._file.setFormatter(_FileFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(self._file)

    def close(self) -> None:
        """End the bar and the log file."""
        self.end_epoch()
        if self._file is not None:
            logger.removeHandler(self._file)
            self._size = self.position()
            with contextlib.suppress(OSError):  # which has been told of
                self._file.close()
            self._file = None

    def position(self) -> int | None:
        """Size [bytes] of the log file, for a checkpoint; None where there was none."""
        if self._file is None:
            return self._size
        with self._file.lock:  # another thread may be writing a line
            with contextlib.suppress(OSError):  # the disk is full, which has been told of
                self._file.flush()
            return os.fstat(self._file.stream.fileno()).st_size

    def rewind(self, position: int | None, step: int) -> bool:
        """Move what was logged after a checkpoint into ``<log file>_redone.txt``: the run will do, and log, it again.

        What this start has written stays. A kill at any point of it loses no line of the earlier starts.

        Args:
            position: what ``position()`` returned for the checkpoint; None leaves all as it is.
            step: updates that the checkpoint holds.

        Returns:
            Whether there was anything to move.
        """
        if self._file is None or position is None:
            return False
        if position > self._earlier:
            self.warn(f"{self._file.baseFilename}: {position - self._earlier} bytes of what was logged before are gone")
        if position >= self._earlier:
            return False
        path = Path(self._file.baseFilename)
        redone = path.with_name(f"{path.stem}_redone{path.suffix}")
        with self._file.lock:
            self._file.flush()
            with path.open("rb") as file:
                file.seek(position)
                logged = file.read()
            with redone.open("ab") as file:
                file.write(f"logged after step {step}, which the run went on from {_now()}:\n".encode())
                file.write(logged[: self._earlier - position])
            self._file.stream.truncate(position)
            self._file.stream.buffer.write(logged[self._earlier - position :])
            self._file.stream.buffer.flush()
        self._earlier = position
        self.print(f"what was logged after step {step} is in {redone.name} now")
        return True

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
        self.print(f"look at it:  {as_a_shell_calls('tensorboard')} --logdir {shlex.quote(str(folder))}")
        if can_continue:
            launcher = os.environ.get("TRAINER_LAUNCHER", as_a_shell_calls("python"))  # with as many ranks as before
            command = [sys.argv[0], "--continue_path", str(folder), *arguments_to_repeat(sys.argv[1:])]
            self.print(f"continue it: {launcher} {shlex.join(command)}")

    def start_epoch(self, epoch: int, epochs: int, updates: float, done: int) -> None:
        """An epoch of ``updates`` updates begins, ``done`` of which were made before the run was continued.

        Infinity for ``updates``: nobody knows how many there will be.
        """
        total = None if updates == math.inf else updates
        count = "until its data ends" if total is None else f"{updates} updates"
        self.print(f"epoch {epoch + 1}/{epochs}: {count}" + (f", {done} of them done before" if done else ""))
        if console.is_terminal and self._on_console:
            columns = (
                TextColumn("epoch {task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task(f"{epoch + 1}/{epochs}", total=total, completed=done, state="")
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


def arguments_to_repeat(argv: Sequence[str]) -> list[str]:
    """Those of a script's arguments that a run's config.json does not hold, and that continuing it needs.

    The script's own ones are among them, and ``--grad_accum_steps``.

    Args:
        argv: without the script.
    """
    kept: list[str] = []
    skip, values = False, 0.0  # how many values of a flag that is left out may follow
    for argument in argv:
        if re.match("--?[A-Za-z]", argument):
            name, has_value, _ = argument.lstrip("-").partition("=")
            is_field = name.startswith("coqpit.")
            skip = is_field or name in _OF_ONE_START
            values = 0 if has_value else math.inf if is_field else 1
        elif skip:
            skip, values = values > 0, values - 1
        if not skip:
            kept.append(argument)
    return kept


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

    def time_left(self, updates: float) -> float:
        """Seconds that so many updates will take, going by all that were read."""
        return updates * self._seconds / max(1.0, self._updates)

"""Ctrl-C, SIGTERM and SIGUSR1 end a training between two updates, not in the middle of one.

The first signal is only noted: the update is finished and saved. The second one ends the process at once. The same
signal once more within half a second is not a second one: a launcher passes on what has also been sent to all of its
processes.

DataLoader workers hear of none of it, or the update could not be finished; the training process ends them.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any

# SIGUSR1 is how SLURM warns before a job's time is up; Windows has none
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO = 0.5  # seconds in which the same signal is no second one


class StopSignals:
    """While active, the first of STOPPING is only noted in ``received``; the second ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at, self._process = 0.0, os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received, self._process = None, os.getpid()
        # python delivers signals to the main thread only, and lets only it set handlers
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:  # a background job, or nohup, has asked for that
                    self._before[number] = signal.signal(number, self._note)
        return self

    def heard(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: the handler was set outside of python, which cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._process:  # a process that was forked from here: its parent decides
            if number == signal.SIGTERM:  # by which multiprocessing ends its processes
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        elif self.received is None:
            self.received, self._received_at = number, now
        elif number != self.received or now - self._received_at > ECHO:
            _exit_at_once(number)


def _exit_at_once(number: int) -> None:
    """End this process and those that multiprocessing has started; wait for no thread, and print no traceback."""
    try:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
        for process in multiprocessing.active_children():
            process.kill()
        cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it
        line = f"{signal.Signals(number).name}: a second signal; exiting at once, without another checkpoint\n"
        os.write(2, (cursor + line).encode())  # sys.stderr may be in the middle of a write
    finally:
        os._exit(128 + number)


# ---- DataLoader workers ----


def start_worker(worker: int, then: Callable[[int], None] | None = None) -> None:
    """The worker_init_fn of DataLoaders: only the training process ends the worker.

    A terminal sends Ctrl-C to the whole process group, and SLURM signals all processes of a step. What the worker
    starts inherits its deafness.

    Args:
        worker: number of the worker.
        then: the loader's own worker_init_fn.
    """
    others = [number for number in STOPPING if number != signal.SIGTERM]
    for number in others:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere SIGTERM ends the worker, whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, others)
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    if then is not None:
        then(worker)


def _end_with_parent() -> None:
    """Exit when the process that has started this one sends SIGTERM, as a DataLoader does with a worker that is busy.

    To ignore the first SIGTERM and obey the second would not do: at its exit, python sends one and waits without end.
    """
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


@contextlib.contextmanager
def starting_workers(method: str | None) -> Iterator[None]:
    """Workers that are started in the block hear no signal before they have come to ``start_worker``.

    Args:
        method: multiprocessing's start method; None if there are no workers to start.
    """
    if method is None or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # child processes inherit it
    try:
        if method != "fork":
            resource_tracker.ensure_running()  # a child process too, and it unblocks signals when it starts
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(Exception):
    """A signal came while a batch was waited for, which is not needed any more."""


def stop_waiting(loader: Any, batches: Iterator, heard: Callable[[], bool]) -> None:
    """Let a DataLoader's iterator raise Stopped within a second of a signal, instead of waiting for its workers.

    Args:
        loader: which begins with new workers after that.
        batches: ``iter(loader)``; where this process reads by itself, nothing is changed.
        heard: whether there was a signal.
    """
    if not hasattr(batches, "_try_get_data"):
        return
    # no cycle of references: the workers end when the iterator is dropped
    kind, own, owner = type(batches), weakref.ref(batches), weakref.ref(loader)

    def try_get_data(timeout: float = 1.0) -> tuple[bool, Any]:
        iterator, end = own(), time.monotonic() + timeout
        while not heard():  # every second, however long the loader's own timeout is
            left = end - time.monotonic()
            found = kind._try_get_data(iterator, min(1.0, max(0.0, left)))
            if found[0] or left <= 1:
                return found
        for worker in iterator._workers:
            worker.terminate()  # or the DataLoader waits for those that are busy, five seconds for each
        vars(owner()).update(_iterator=None)
        raise Stopped

    batches._try_get_data = try_get_data  # type: ignore[attr-defined]

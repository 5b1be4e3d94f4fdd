"""Signals: the first is noted, the second ends the process; workers hear none."""

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests.trainer.launching import runs
from trainer.data.loader import build_loader, rest_of_epoch, shard
from trainer.signals import ECHO, STOPPING, Stopped, StopSignals, start_worker, stop_waiting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _keep_handlers():
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_which_they_are():
    assert STOPPING == (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_is_noted(number):
    signals = StopSignals()
    with signals:
        assert (signals.received, signals.heard()) == (None, False)
        os.kill(os.getpid(), number)
        assert (signals.received, signals.heard()) == (number, True)
    assert signals.received == number


@pytest.mark.parametrize("number", STOPPING)
def test_the_handlers_of_before_come_back(number):
    heard = []
    signal.signal(number, lambda *_: heard.append(number))
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        assert (signals.received, heard) == (number, [])
    os.kill(os.getpid(), number)
    assert heard == [number]


def test_handlers_come_back_after_an_exception():
    before = [signal.getsignal(number) for number in STOPPING]
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_it_can_be_used_again():
    signals = StopSignals()
    for number in STOPPING:
        with signals:
            assert signals.received is None
            os.kill(os.getpid(), number)
            assert signals.received == number


def test_a_handler_that_python_did_not_set(monkeypatch):
    """signal.signal says None for it, and does not take None."""
    signals = StopSignals()
    with signals:
        signals._before[signal.SIGTERM] = None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_ignored_stays_ignored():
    """As Ctrl-C is by the background jobs of a shell script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_of_the_main_thread_nothing_is_set():
    before, seen = [signal.getsignal(number) for number in STOPPING], []

    def work():
        with StopSignals() as signals:
            seen.extend(signal.getsignal(number) for number in STOPPING)
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [*before, None]


SECOND = """
import os, signal, threading, time
from trainer.signals import StopSignals
def twice(first, second, seconds):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.Signals[first])
        time.sleep(seconds)
        os.kill(os.getpid(), signal.Signals[second])
        print(signals.received, flush=True)
        threading.Thread(target=time.sleep, args=(60,)).start()  # as one that writes a checkpoint
        signal.raise_signal(signal.SIGUSR1)
twice(*CASE)
"""
LINE = "{}: a second signal; exiting at once, without another checkpoint\n"


@pytest.mark.parametrize(
    ("case", "number", "shown"),
    [
        (("SIGINT", "SIGINT", ECHO + 0.1), signal.SIGINT, ""),
        (("SIGINT", "SIGTERM", 0), signal.SIGTERM, ""),
        (("SIGTERM", "SIGTERM", 0), signal.SIGUSR1, "15\n"),  # an echo, and then another
    ],
)
def test_the_second_ends_the_process(case, number, shown):
    code = SECOND.replace("CASE", repr(case))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (128 + number, shown)
    assert result.stderr == LINE.format(number.name)


BOTH_AT_ONCE = """
import signal
from trainer.signals import StopSignals
with StopSignals():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
"""


def test_two_signals_at_once():
    done = subprocess.run([sys.executable, "-c", BOTH_AT_ONCE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, LINE.format("SIGTERM"))


FORKED = """
import multiprocessing, os, signal, time
from trainer.signals import StopSignals
context = multiprocessing.get_context("fork")
with StopSignals() as signals:
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
        os.kill(child.pid, number)
        time.sleep(0.6)
    print(child.is_alive(), signals.received)
    child.terminate()
    child.join()
    print(child.exitcode)
"""


def test_a_process_that_is_forked_meanwhile_leaves_it_to_its_parent():
    """It does not end at the second Ctrl-C, and does at multiprocessing's SIGTERM."""
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"True None\n{-signal.SIGTERM}\n", "")


class Slow:
    """Its samples are the numbers of the reading processes; the fourth takes a minute."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            time.sleep(60)
        return os.getpid()


def send(number, pid):
    """From another process: neither the worker's parent nor itself."""
    subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)


@pytest.mark.parametrize("made_by", ["build_loader", "shard"])
def test_a_worker_obeys_its_parent_alone(made_by):
    if made_by == "build_loader":
        loader = build_loader(Slow(), 1, collate_fn=list, seed=0, shuffle=False, num_workers=1)
    else:
        loader = shard(DataLoader(Slow(), collate_fn=list, num_workers=1), 0, 1, 0)
    batches = rest_of_epoch(loader, 0, 0)
    [pid] = next(batches)
    for number in (*STOPPING, *STOPPING):
        send(number, pid)
    assert [next(batches), next(batches)] == [[pid], [pid]]
    [worker] = multiprocessing.active_children()
    worker.terminate()  # in the middle of the slow one
    worker.join(5)
    assert worker.exitcode == 0
    assert not runs(pid)
    del batches


def test_the_loaders_own_start_of_a_worker_comes_after():
    begun = []
    init = functools.partial(begun.append)
    loader = DataLoader(Slow(), num_workers=1, worker_init_fn=init)
    split = shard(loader, 0, 1, 0)
    assert split.worker_init_fn.func is start_worker
    assert split.worker_init_fn.keywords == {"then": init}
    assert loader.worker_init_fn is init
    assert shard(split, 0, 1, 0) is split
    pickle.loads(pickle.dumps(shard(DataLoader(Slow(), num_workers=1, worker_init_fn=print), 0, 1, 0).worker_init_fn))


@pytest.mark.parametrize(("persistent", "timeout"), [(False, 0), (True, 0), (False, 100)])
def test_a_batch_is_not_waited_for_after_a_signal(persistent, timeout):
    settings = {"collate_fn": list, "num_workers": 1, "persistent_workers": persistent, "timeout": timeout}
    loader, heard = shard(DataLoader(Slow(), **settings), 0, 1, 0), []
    batches = iter(loader)
    stop_waiting(loader, batches, lambda: bool(heard))
    [pid] = [next(batches) for _ in range(3)][-1]
    threading.Timer(0.3, heard.append, [signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        next(batches)
    gone = weakref.ref(batches)
    del batches
    assert gone() is None  # kept alive by nothing, and so are its workers
    assert time.monotonic() - start < 4
    assert not runs(pid)
    assert next(iter(loader)) != [pid]  # it can be read again

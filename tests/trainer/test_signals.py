"""Signals: the first is noted, the second acts as before."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer.signals import StopSignals

ROOT = Path(__file__).resolve().parents[2]
BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _keep_handlers():
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_is_noted_and_the_second_raises():
    signals = StopSignals()
    with signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGINT


@pytest.mark.parametrize("number", BOTH)
def test_the_handlers_of_before_come_back(number):
    heard = []
    signal.signal(number, lambda *_: heard.append(number))
    with StopSignals():
        pass
    os.kill(os.getpid(), number)
    assert heard == [number]
    with StopSignals() as signals:
        os.kill(os.getpid(), number)
        assert (signals.received, heard) == (number, [number])
        os.kill(os.getpid(), number)
        assert heard == [number, number]


def test_handlers_come_back_after_an_exception():
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert [signal.getsignal(number) for number in BOTH] == before


def test_it_can_be_used_again():
    signals = StopSignals()
    for number in BOTH:
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


def test_outside_of_the_main_thread_nothing_is_set():
    before, seen = [signal.getsignal(number) for number in BOTH], []

    def work():
        with StopSignals() as signals:
            seen.extend(signal.getsignal(number) for number in BOTH)
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [*before, None]


def test_second_sigterm_ends_the_process():
    code = (
        "import os, signal\nfrom trainer.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('first', signals.received, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('not reached')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, f"first {int(signal.SIGTERM)}\n")


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
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")

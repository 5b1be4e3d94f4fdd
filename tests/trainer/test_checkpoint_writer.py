"""Saving in a thread: the copy is what torch.save would have written, errors arrive once, and nothing is cut off."""

import collections
import hashlib
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer.checkpoint_writer import CheckpointWriter, HostCopies

WAIT = 20  # seconds until a test gives up


def file_of(state) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def training_state() -> dict:
    """Of a model with tied weights, of Adam, and of the random numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    rng = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng, "losses": [1.5], "none": None}


class Held:
    """A ``write`` that begins with waiting until it may go on."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.go, self.error, self.files = threading.Event(), error, []

    def __call__(self, state) -> None:
        assert self.go.wait(WAIT)
        if self.error is not None:
            raise self.error
        self.files.append(file_of(state))


# ---- the copy ----

KINDS = {
    "a training's state": training_state,
    "a view of a large tensor": lambda: torch.arange(1000.0)[3:5],
    "two views": lambda: [base := torch.arange(12.0), base.view(3, 4).t(), base[2:]],
    "not contiguous": lambda: torch.arange(12.0).view(3, 4).t()[1:, ::2],
    "no dimension": lambda: torch.tensor(3),
    "empty": lambda: [torch.empty(0, 3), torch.empty(2, 0, dtype=torch.int8)],
    "bfloat16": lambda: torch.randn(3).bfloat16(),
    "float16 and bool": lambda: (torch.randn(3).half(), torch.tensor([True, False])),
    "float8": lambda: [a := torch.randn(3).to(torch.float8_e4m3fn), a[1:], torch.randn(2).to(torch.float8_e5m2)],
    "uint16": lambda: torch.arange(3).to(torch.uint16),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "needs a gradient": lambda: torch.ones(2, requires_grad=True),
    "result of a computation": lambda: torch.ones(2, requires_grad=True) * 2,
    "parameters": lambda: [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)],
    "on no device": lambda: torch.ones(2, device="meta"),
    "a storage": lambda: torch.arange(3.0).untyped_storage(),
    "the same twice": lambda: [a := torch.ones(2), a, {"a": a}],
    "containers": lambda: collections.OrderedDict(a=[1, (2.5, None, "x")], b={3, 4}, c=torch.Size([1]), d=1.5),
}


@pytest.mark.filterwarnings("ignore:.*CSR.*:UserWarning")  # a beta of torch's
@pytest.mark.parametrize("kind", KINDS)
def test_file_of_the_copy_is_byte_for_byte_that_of_the_state(kind):
    torch.manual_seed(0)
    state = KINDS[kind]()
    before, copies = file_of(state), HostCopies()
    assert file_of(copies.copy(state)) == before
    assert file_of(copies.copy(state)) == before  # into the same memory
    assert file_of(state) == before


def test_types_and_metadata_stay():
    state = training_state()
    state["parameter"] = nn.Parameter(torch.ones(2), requires_grad=False)
    copy = HostCopies().copy(state)
    assert type(copy["model"]) is collections.OrderedDict
    assert copy["model"]._metadata == state["model"]._metadata != {}
    assert type(copy["parameter"]) is nn.Parameter
    assert not copy["parameter"].requires_grad
    assert copy["rng"]["python"] == random.getstate()


def test_shared_memory_is_copied_once_and_shared_in_file():
    flat = torch.arange(10_000.0)
    state = {"first": flat[:5000], "second": flat[5000:], "tied": flat[:5000].view(50, 100)}
    copy = HostCopies().copy(state)
    assert copy["first"].untyped_storage().data_ptr() == copy["second"].untyped_storage().data_ptr()
    assert copy["first"].untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
    file = file_of(copy)
    assert 40_000 <= len(file) < 45_000
    loaded = torch.load(io.BytesIO(file), weights_only=True)
    loaded["tied"][0, 0] = -1
    assert loaded["first"][0] == -1


def test_next_copy_goes_into_the_memory_of_the_last():
    copies, state = HostCopies(), {"a": torch.zeros(1000), "b": torch.ones(1000), "c": torch.ones(7)}
    first = copies.copy(state)
    addresses = {tensor.data_ptr() for tensor in first.values()}
    assert len(addresses) == 3
    second = copies.copy({name: tensor + 1 for name, tensor in state.items()})
    assert {tensor.data_ptr() for tensor in second.values()} == addresses
    assert [tensor[0].item() for tensor in second.values()] == [1, 2, 2]


def test_copy_of_a_state_that_has_grown_and_shrunk():
    copies = HostCopies()
    for sizes in ([3, 3], [3, 5, 3, 3], [5], [3, 3, 3]):
        state = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
        for tensor, copied in zip(state, copies.copy(state), strict=True):
            assert torch.equal(tensor, copied)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copy_from_a_gpu_is_pinned_and_complete():
    copies = HostCopies()
    for value in range(3):
        flat = torch.full((10_000_000,), float(value), device="cuda")
        copy = copies.copy({"all": flat, "part": flat[5:7], "host": torch.ones(3)})
        flat.add_(100)  # must not reach the copy
        assert copy["all"].device.type == "cpu"
        assert [copy[name].is_pinned() for name in ("all", "host")] == [True, False]
        assert torch.equal(copy["all"], torch.full((10_000_000,), float(value)))
        assert copy["part"].data_ptr() == copy["all"].data_ptr() + 5 * 4


# ---- the thread ----


def test_training_goes_on_while_the_thread_writes_what_was():
    state, write, writer = training_state(), Held(), CheckpointWriter()
    expected = file_of(state)
    writer.submit(state, write)
    with torch.no_grad():
        for tensor in state["model"].values():
            tensor.add_(1)
    state["losses"].append(2.5)
    state["more"] = 1
    write.go.set()
    writer.wait()
    assert write.files == [expected]


def test_next_save_waits_for_the_last():
    slow, quick, writer = Held(), Held(), CheckpointWriter()
    quick.go.set()
    writer.submit([1], slow)
    threading.Timer(0.1, slow.go.set).start()
    start = time.monotonic()
    writer.submit([2], quick)
    assert time.monotonic() - start >= 0.09
    assert slow.files == [file_of([1])]
    writer.wait()
    assert quick.files == [file_of([2])]


def test_done_is_called_once_in_the_trainings_thread_after_the_write():
    calls, write, writer = [], Held(), CheckpointWriter()
    writer.submit([1], write, lambda: calls.append((threading.current_thread(), len(write.files))))
    writer.poll()
    assert calls == []
    write.go.set()
    deadline = time.monotonic() + WAIT
    while not calls and time.monotonic() < deadline:
        writer.poll()
    assert calls == [(threading.main_thread(), 1)]
    writer.poll()
    writer.wait()
    assert len(calls) == 1


@pytest.mark.parametrize("heard_by", ["poll", "wait", "submit"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FloatingPointError("weight"), SystemExit(1)])
def test_error_is_raised_once_and_the_next_save_works(heard_by, error):
    calls, failing, sound, writer = [], Held(error), Held(), CheckpointWriter()
    writer.submit([1], failing, lambda: calls.append(1))
    failing.go.set()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(WAIT)
    with pytest.raises(type(error)) as caught:
        writer.submit([2], sound) if heard_by == "submit" else getattr(writer, heard_by)()
    assert caught.value is error
    writer.poll()
    writer.wait()
    sound.go.set()
    writer.submit([3], sound)
    writer.wait()
    assert sound.files == [file_of([3])]
    assert calls == []


def test_state_that_cannot_be_written_is_an_error_at_once():
    write, writer = Held(), CheckpointWriter()
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        writer.submit({"model": lambda: None}, write)
    writer.wait()
    assert write.files == []


def test_without_a_thread_the_state_itself_is_written_before_submit_returns():
    seen, state, writer = [], {"a": torch.ones(2)}, CheckpointWriter(in_thread=False)
    writer.submit(state, lambda s: seen.append((s, threading.current_thread())), lambda: seen.append("done"))
    assert seen[0][0] is state
    assert seen[0][1] is threading.main_thread()
    assert seen[1:] == ["done"]

    def fail(state) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        writer.submit(state, fail, lambda: seen.append("done"))
    writer.wait()
    assert seen[1:] == ["done"]


def test_interrupted_wait_can_be_taken_up_again():
    write, writer = Held(), CheckpointWriter()
    writer.submit([1], write)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        writer.wait()
    write.go.set()
    writer.wait()
    assert write.files == [file_of([1])]


def test_exit_waits_for_the_thread(tmp_path):
    path = tmp_path / "written"
    script = f"""
import pathlib, time
from trainer.checkpoint_writer import CheckpointWriter

def write(state):
    time.sleep(0.5)
    pathlib.Path({str(path)!r}).write_text(state["text"])

CheckpointWriter().submit({{"text": "all"}}, write)
raise SystemExit(3)
"""
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60)
    assert found.returncode == 3
    assert path.read_text() == "all"


def test_workers_are_forked_while_the_thread_writes(tmp_path):
    stop, rounds, writer = threading.Event(), [], CheckpointWriter()

    def write(state) -> None:
        while not stop.is_set():
            with open(tmp_path / "file", "wb") as file:
                torch.save(state, file)
            assert all(tensor.sum().isfinite() for tensor in state)
            rounds.append(hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest())

    writer.submit([torch.ones(50_000) for _ in range(20)], write)
    try:
        for _ in range(8):
            loader = DataLoader(torch.arange(6), num_workers=2, multiprocessing_context="fork", timeout=WAIT)
            assert [int(value) for value in loader] == list(range(6))
    finally:
        stop.set()
    writer.wait()
    assert len(rounds) > 8
    assert len(set(rounds)) == 1

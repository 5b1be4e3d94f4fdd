"""Checkpoints are written while the training goes on: a copy in host memory, and a thread that writes the copy."""

import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch


class CheckpointWriter:
    """Writes one checkpoint at a time; the training waits for the copy only, or for a write that is not done yet.

    Python ends after the thread has. Whoever submits must call ``wait`` at the end, or an error may not be heard of.
    Killed at any instant, a process leaves what ``write`` left so far.

    The training may fork meanwhile, as DataLoaders do for their workers. What forks holds the GIL, so the thread is
    then waiting for it, or inside a system call, a hash or a copy, which hold no lock that a worker needs (malloc
    resets its own). ``write`` should import nothing, though: loading a library holds a lock without the GIL.

    Args:
        in_thread: False writes before ``submit`` returns, without a copy.
    """

    def __init__(self, in_thread: bool = True) -> None:
        self._copies = HostCopies() if in_thread else None
        # rather than the thread: Ctrl-C in Thread.join takes a thread for finished that is not, before Python 3.13
        self._finished: threading.Event | None = None
        self._error: BaseException | None = None
        self._done: Callable[[], None] | None = None

    def submit(self, state: Any, write: Callable[[Any], None], done: Callable[[], None] | None = None) -> None:
        """Copy a state to host memory, and let the thread write it; before, wait for the last write.

        Args:
            state: of dicts, lists, tensors and plain values: what torch.save can write.
            write: is called in the thread with the copy, which is its own until it returns.
            done: is called in the training's thread, by the next ``poll``, ``wait`` or ``submit`` after ``write`` has
                returned; not after an error.

        Raises:
            Exception: what the last write failed with, if that was not raised yet; this state is not written then.
            pickle.PicklingError: the state holds what cannot be written (TypeError and AttributeError likewise).
        """
        self.wait()
        if self._copies is None:
            write(state)
            if done is not None:
                done()
            return
        copy, finished = self._copies.copy(state), threading.Event()
        threading.Thread(target=self._run, args=(write, copy, finished), name="checkpoint").start()
        self._finished, self._done = finished, done

    def poll(self) -> None:
        """Raise what the write has failed with, or call its ``done``, once it is over; costs next to nothing."""
        if self._finished is not None and self._finished.is_set():
            self.wait()

    def wait(self) -> None:
        """Wait until all is written, and do what ``poll`` does."""
        if self._finished is None:
            return
        self._finished.wait()
        error, done = self._error, self._done
        self._finished = self._error = self._done = None
        if error is not None:
            raise error
        if done is not None:
            done()

    def _run(self, write: Callable[[Any], None], copy: Any, finished: threading.Event) -> None:
        try:
            write(copy)
        except BaseException as error:  # noqa: BLE001  handed on by poll or wait
            self._error = error
        finished.set()


class HostCopies:
    """Copies states to host memory, into the buffers of the copy before, which thereby ends.

    A process must first be given the pages of fresh memory, which takes longer than to copy. So the memory is kept
    between copies: as much as the state takes, and as writing it takes at its height anyway.

    What a copy is, follows from how torch.save works: it pickles everything but the storages of the tensors. So does
    this, and unpickles it with copies of the storages. Whatever torch.save can write can be copied, then; tensors that
    share memory share it in the copy, and the file becomes no other.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}

    def copy(self, state: Any) -> Any:
        """A copy of a state, on the CPU, pinned if it comes from CUDA devices; waits for these once."""
        pickled = io.BytesIO()
        pickler = _Pickler(pickled, pickle.HIGHEST_PROTOCOL)
        pickler.dump(state)
        used: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        copies, devices = [], set()
        for _, storage in pickler.storages.values():
            on_cuda = storage.device.type == "cuda"
            key = storage.nbytes(), on_cuda
            spare = self._buffers.get(key)
            buffer = spare.pop() if spare else _new_buffer(*key)
            used.setdefault(key, []).append(buffer)
            copies.append(buffer.copy_(storage, non_blocking=on_cuda))
            if on_cuda:
                devices.add(storage.device)
        self._buffers = used
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        pickled.seek(0)
        return _Unpickler(pickled, copies).load()


def _new_buffer(size: int, pinned: bool) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()


class _Pickler(pickle.Pickler):
    """Pickles all but the storages, which it numbers and keeps alive, so that no address comes twice."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype | None] | None:
        is_typed = isinstance(value, torch.storage.TypedStorage)
        if not (is_typed or isinstance(value, torch.UntypedStorage)):
            return None
        storage = value._untyped_storage if is_typed else value
        number, _ = self.storages.setdefault(storage._cdata, (len(self.storages), storage))
        return number, value.dtype if is_typed else None


class _Unpickler(pickle.Unpickler):
    """Reads what _Pickler has written, with other storages."""

    def __init__(self, file: io.BytesIO, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return _rebuild_newer if name == "_rebuild_tensor_v3" else found

    def persistent_load(self, pid: tuple[int, torch.dtype | None]) -> Any:
        number, dtype = pid
        storage = self._storages[number]
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _rebuild_newer(storage: torch.UntypedStorage, *rest: Any) -> torch.Tensor:
    """A tensor of a type that no typed storage has (float8, uint16); torch.load hands over its bytes as a typed one."""
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.uint8, _internal=True)
    return torch._utils._rebuild_tensor_v3(typed, *rest)

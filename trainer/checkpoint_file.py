"""The file of a checkpoint: written whole or not at all, with its SHA-256 inside, and read without running anything.

It is a file of ``torch.save``, a zip archive, with the SHA-256 of all other bytes as the archive's comment: it cannot
get lost or outlive the file, and torch reads the file as any other.
"""

import collections
import copy
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from trainer.storage import as_path, is_local, open_file, write_file

FORMAT_VERSION = 3
_SUMMED_SINCE = 3  # format from which on a file without a sum is damaged
_LABEL = b"sha256:"
_SUM_LENGTH = len(_LABEL) + 64
_END_LENGTH = 22  # of a zip archive's last record, whose last two bytes are the length of the comment after it
_CHUNK = 2**20


class DamagedError(ValueError):
    """A file cannot be read as a checkpoint, or is not as it was written."""


# ---- writing ----


class _Summed:
    """A file that is written to another one, and gets its SHA-256 at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum, self._end = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(data)
        except OSError as error:
            self.error = error
            raise

    def _write(self, data: Any) -> int:
        self._sum.update(data)
        size = memoryview(data).nbytes
        if size < _END_LENGTH:
            held = self._end + bytes(data)
            self._file.write(held[:-_END_LENGTH])
        else:  # gigabytes pass without a copy
            self._file.write(self._end)
            view = memoryview(data).cast("B")
            self._file.write(view[:-_END_LENGTH])
            held = bytes(view[-_END_LENGTH:])
        self._end = held[-_END_LENGTH:]
        return size

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Write the archive's last bytes, with the sum as its comment."""
        self._file.write(self._end[:-2] + _SUM_LENGTH.to_bytes(2, "little"))
        self._file.write(_LABEL + self._sum.hexdigest().encode())


def save_checkpoint(state: dict[str, Any], path: str | Path) -> None:
    """Save a state dict durably under its format's version, to a path or any URL that fsspec writes to.

    Raises:
        OSError: it could not be written; what was there before still is.
    """

    def write(file: BinaryIO) -> None:
        summed = _Summed(file)
        try:
            torch.save(_plain({"format": FORMAT_VERSION, **state}), summed)
        except RuntimeError as error:  # torch's writer hides what has happened to the file
            raise summed.error or error from None
        summed.finish()

    write_file(as_path(path), write)


def _plain(value: Any) -> Any:
    """The same with Python's numbers for NumPy's, which weights_only refuses: ``np.cos`` in a scheduler gives them."""
    if isinstance(value, np.number | np.bool_):
        return value.item()
    if type(value) in (dict, collections.OrderedDict):
        parts = [(_plain(key), _plain(item)) for key, item in value.items()]
        if all(key is k and item is i for (key, item), (k, i) in zip(parts, value.items())):
            return value
        changed = copy.copy(value)  # with the attributes of a model's state
        changed.clear()
        changed.update(parts)
        return changed
    if type(value) in (list, tuple):
        parts = [_plain(item) for item in value]
        return value if all(part is item for part, item in zip(parts, value)) else type(value)(parts)
    return value


# ---- reading ----


def check_sum(file: BinaryIO, name: str | Path) -> bool:
    """Compare a file with the SHA-256 that it carries; False if it carries none.

    Raises:
        DamagedError: they differ, or the file is empty.
    """
    size = file.seek(0, 2)
    if size == 0:
        raise DamagedError(f"{name}: damaged: it is empty")
    file.seek(max(0, size - _SUM_LENGTH - 2))
    length, comment = file.read(2), file.read()
    file.seek(0)
    if length != _SUM_LENGTH.to_bytes(2, "little") or not comment.startswith(_LABEL):
        if file.read(4) == b"PK\3\4" and not zipfile.is_zipfile(file):
            raise DamagedError(f"{name}: damaged: its end is missing (it has {size:,} bytes)")
        file.seek(0)
        return False
    found, left = hashlib.sha256(), size - _SUM_LENGTH - 2
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        found.update(chunk)
        left -= len(chunk)
    found.update(b"\0\0")  # the length of the comment, before there was one
    file.seek(0)
    if comment[len(_LABEL) :] != found.hexdigest().encode():
        raise DamagedError(f"{name}: damaged: its bytes have changed since it was written (SHA-256 differs)")
    return True


def load_checkpoint(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint to the CPU, from a path or any URL that fsspec reads; never executes code in it.

    A state dict alone (``.safetensors`` as well) becomes the ``model`` of a checkpoint that holds nothing else.

    Args:
        path: the file.
        mapped: leave the tensors of a local file on disk until somebody looks at them, and its SHA-256 unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a ``.safetensors`` file, and the package is not installed.
        ValueError: the file is damaged, would execute code, is no checkpoint, or of a newer format.
    """
    path, is_summed = as_path(path), True
    # files of torch before 1.6 are no zip archives and cannot be mapped
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif mapped and is_local(path) and zipfile.is_zipfile(path):
        state = _read_state(path, path, mmap=True)
    else:
        with open_file(path) as file:
            is_summed = check_sum(file, path)
            state = _read_state(file, path)
    if isinstance(state, Mapping) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        state = {"model": state}
    if not isinstance(state, dict) or not isinstance(state.get("model"), Mapping):
        raise ValueError(f"{path}: holds no model; give a checkpoint that the Trainer wrote")
    version = state.get("format", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{path}: has format {state['format']}, this Trainer reads up to {FORMAT_VERSION}; upgrade it")
    if isinstance(version, int) and version >= _SUMMED_SINCE and not is_summed:
        raise DamagedError(
            f"{path}: damaged: its SHA-256 is missing. (If you changed the checkpoint, write it with "
            "trainer.checkpoint.save_checkpoint, not with torch.save.)"
        )
    return state


def load_sound(path: str | Path) -> tuple[dict[str, Any], bool]:
    """A checkpoint that was compared with its SHA-256, its tensors still on disk; and whether it carries one.

    Raises as load_checkpoint does.
    """
    with open_file(path) as file:
        is_summed = check_sum(file, path)
    return load_checkpoint(path, mapped=is_summed), is_summed


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A model's state dict from a file: ``.safetensors``, or ``.pth`` and the like (of a checkpoint its ``model``).

    Raises as load_checkpoint does.
    """
    return load_checkpoint(path)["model"]


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(f"{path}: pip install safetensors to read it") from error
    try:
        with open_file(path) as file:
            return load(file.read())
    except SafetensorError as error:
        raise DamagedError(f"{path}: damaged, or no safetensors file ({error})") from error


def _read_state(file: BinaryIO | Path, path: Path, **options: Any) -> Any:
    """What torch.load reads, with one error for all the ways in which it fails."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{path}: {_unreadable(str(error))}") from error
    # torch lets whatever its readers stumble over through: of zip files, of pickles cut off in the middle
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        AssertionError,
    ) as error:
        raise DamagedError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error})") from error


def _unreadable(error: str) -> str:
    """Why torch refused to unpickle a file, and what to do."""
    reason = "holds more than tensors and plain values, which could execute code"
    if (found := re.search(r"GLOBAL ([\w.]+)", error)) is None:
        return f"{reason}, or is damaged ({error.splitlines()[0]})"
    return (
        f"{reason}: {found[1]}. If you trust it, convert it once where that can be imported: "
        "python -c \"import torch; s = torch.load('OLD.pth', 'cpu', weights_only=False); "
        "torch.save({k: v.to_dict() if hasattr(v, 'to_dict') else v for k, v in s.items()}, 'NEW.pth')\""
    )

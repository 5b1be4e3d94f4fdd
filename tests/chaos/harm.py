"""What goes wrong in a training's process: it is killed at a chosen low-level event, or its disk takes nothing more.

It watches what python calls the operating system for, not the functions of the code under test.
"""

import builtins
import errno
import io
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = ("write", "fsync", "replace", "sync folder", "unlink")
PHASES = ("before", "halfway", "after")


@dataclass(frozen=True)
class Harm:
    """What is to happen to a process.

    Attributes:
        kind: ``none``, ``kill`` (SIGKILL at an event), ``full`` (no space left from an event on), or ``read-only`` (the
            folder).
        event: one of EVENTS, of a checkpoint or of its temporary file.
        number: which one, from 1.
        phase: one of PHASES; halfway is in the middle of a write.
    """

    kind: str = "none"
    event: str = ""
    number: int = 0
    phase: str = ""


class WatchedFile:
    """A file that is open for writing; of what it is handed, half may be on the disk when the process ends."""

    def __init__(self, file: Any, path: str, watch: "Watch") -> None:
        self._file, self._path, self._watch = file, path, watch

    def write(self, data: Any) -> int:
        part = memoryview(data).cast("B")

        def write_half() -> None:
            self._file.write(part[: len(part) // 2])
            self._file.flush()

        return self._watch.happens("write", self._path, lambda: self._file.write(data), write_half)

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Watch:
    """Stands between python and the operating system, once installed; there is no way back, so: in a process forked.

    Args:
        folder: below it a read-only disk takes nothing.
        harm: what is to happen.
        ledger: a file descriptor; what has happened is appended to it, and is there when the process is killed.
    """

    def __init__(self, folder: Path, harm: Harm, ledger: int) -> None:
        self.folder, self.harm, self.ledger = os.path.realpath(folder), harm, ledger
        self.counts: Counter[str] = Counter()
        self.trace: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}  # of open file descriptors
        self._is_full = False
        self._write = os.write

    def note(self, word: str, value: Any) -> None:
        """Append to the ledger."""
        self._write(self.ledger, f"{word} {value}\n".encode())

    def save_trace(self, path: Path) -> None:
        """All events, in their order."""
        path.write_text(json.dumps(self.trace))

    def happens(self, event: str, path: str, act: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
        """Let an event happen, or a part of it."""
        name = os.path.basename(path)
        if event != "sync folder" and not re.search(r"\.pth(\..*\.tmp)?$", name):
            return act()
        self.counts[event] += 1
        self.trace.append((event, name))
        is_hit = (event, self.counts[event]) == (self.harm.event, self.harm.number)
        if is_hit and self.harm.phase == "halfway" and half is not None:
            half()
        if is_hit and self.harm.phase != "after":
            self._strike()
        if self._is_full and event == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        # a kill may come between an event and its note: what is noted as saved is there, what is gone is noted
        if event == "unlink" and name.endswith(".pth"):
            self.note("deleted", name)
        result = act()
        if event == "replace" and name.endswith(".pth"):
            self.note("saved", name)
        if is_hit:
            self._strike()
        return result

    def _strike(self) -> None:
        if self.harm.kind == "full":
            self._is_full = True
        elif self.harm.kind == "kill":
            self.note("killed", f"{self.harm.phase} {self.harm.event} {self.harm.number}")
            os.kill(os.getpid(), signal.SIGKILL)

    def _check_writable(self, path: Any) -> None:
        if self.harm.kind == "read-only" and os.path.realpath(os.fsdecode(path)).startswith(self.folder + os.sep):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))

    def install(self) -> None:
        """Watch this process from now on."""
        self._watch_files()
        self._watch_names()

    def _watch_files(self) -> None:
        open_file, open_descriptor, fsync = io.open, os.open, os.fsync

        def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            writes = isinstance(file, str | bytes | os.PathLike) and any(letter in mode for letter in "wax+")
            if not writes:
                return open_file(file, mode, *args, **options)
            self._check_writable(file)
            opened, path = open_file(file, mode, *args, **options), os.fsdecode(file)
            self._paths[opened.fileno()] = path
            return WatchedFile(opened, path, self) if "b" in mode and ".pth" in path else opened

        def watched_os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._check_writable(path)
            descriptor = open_descriptor(path, flags, *args, **options)
            self._paths[descriptor] = os.fsdecode(path)
            return descriptor

        def watched_fsync(file: Any) -> None:
            path = self._paths.get(file if isinstance(file, int) else file.fileno(), "")
            event = "sync folder" if os.path.isdir(path) else "fsync"
            self.happens(event, path, lambda: fsync(file))

        def watched_write(descriptor: int, data: Any) -> int:
            act, path = lambda: self._write(descriptor, data), self._paths.get(descriptor, "")
            return self.happens("write", path, act, lambda: self._write(descriptor, data[: len(data) // 2]))

        builtins.open = io.open = watched_open  # type: ignore[assignment]
        os.open, os.fsync, os.write = watched_os_open, watched_fsync, watched_write  # type: ignore[assignment]

    def _watch_names(self) -> None:
        def watched(event: str, function: Callable, which: int) -> Callable:
            def call(*args: Any, **options: Any) -> Any:
                self._check_writable(args[0])
                return self.happens(event, os.fsdecode(args[which]), lambda: function(*args, **options))

            return call

        os.replace, os.rename = watched("replace", os.replace, 1), watched("replace", os.rename, 1)
        os.unlink, os.remove = watched("unlink", os.unlink, 0), watched("unlink", os.remove, 0)


def unsafe(trace: list[tuple[str, str]]) -> list[str]:
    """What a power cut could have destroyed: renamed before its content, or deleted before its successor, was durable.

    Args:
        trace: the events of a process.
    """
    problems, written, renamed, newest = [], False, set(), -1
    for event, name in trace:
        if event == "write":
            written = True
        elif event == "fsync":
            written = False
        elif event == "replace":
            if written:
                problems.append(f"{name} was renamed before it was synced")
            renamed.add(name)
            newest = max(newest, _number(name))
        elif event == "sync folder":
            renamed.clear()
        elif event == "unlink" and not name.startswith(".") and renamed:
            problems.append(f"{name} was deleted before the entry of {', '.join(sorted(renamed))} was durable")
        if event == "unlink" and _number(name) >= newest and _number(name) >= 0:
            problems.append(f"{name} was deleted before there was a newer one")
    return problems


def _number(name: str) -> int:
    match = re.fullmatch(r"checkpoint_(\d+)\.pth", name)
    return int(match[1]) if match else -1

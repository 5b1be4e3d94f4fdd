"""One way to write a file so that it is there whole or not at all, on a disk and in the stores that fsspec reaches.

A path is pathlib's; a URL (``s3://``, ``gs://``, ``memory://``) becomes a UPath, which has the same methods. What may
go wrong in a store for a moment is tried again by the functions here, but not by the methods.
"""

import contextlib
import datetime
import errno
import io
import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from upath import UPath

WAITS = (1.0, 4.0)  # seconds before the second and the third attempt
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
# errors that another attempt does not change
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# a store's errors come without a number
_NUMBERS = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES}
_REMEDIES = {
    errno.ENOSPC: "free some space in {}",
    errno.EDQUOT: "free some space in {}, or have the quota raised",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EACCES: "make {} accessible for this user",
    errno.EPERM: "make {} accessible for this user",
    errno.EROFS: "make {} writable, or take another folder",
    errno.ENOENT: "see that {} exists",
    errno.ENOTDIR: "{} must be a folder",
}
_T = TypeVar("_T")
logger = logging.getLogger("trainer")


class StorageError(OSError):
    """A store has failed in a way for which the system has no number."""


@dataclass(frozen=True)
class FileEntry:
    """A file in a folder.

    Args:
        path: of the file.
        size: in bytes.
        modified: when it was written, in seconds since 1970; None where the store does not know.
    """

    path: Path
    size: int
    modified: float | None


def as_path(path: str | Path) -> Path:
    """A Path as it is, a URL as a UPath, any other string as a Path; ``~`` is not expanded."""
    if not isinstance(path, str):
        return path
    protocol, separator, rest = path.partition("://")
    if not separator:
        return Path(path)
    if protocol in ("file", "local"):
        return Path(rest)
    # Listings are not cached: another process may have written. fsspec hands options for sftp to the ssh client.
    options = {} if protocol in ("sftp", "ssh") else {"use_listings_cache": False}
    return UPath(path, **options)


def is_local(path: Path) -> bool:
    """Whether a path lies in the system's files rather than in a store."""
    return isinstance(path, Path)


# ---- writing ----


def write_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is there whole or not at all; whatever fails, the file that was there before stays.

    On a disk it is written beside its place, synced, then renamed over it. For a store it is collected in memory and
    uploaded when it is complete; its size there is compared afterwards. fsspec's transactions would need no memory, but
    are a switch on a file system that all threads share: what other threads write meanwhile would be held back.

    Args:
        path: the file; its folder must exist, but for object stores, which have none.
        write: writes the content to the binary file that it gets; called once.

    Raises:
        OSError: it could not be written; names the path, the reason and what to do.
    """
    path = as_path(path)
    if is_local(path):
        _write_to_disk(path, write)
        return
    buffer = io.BytesIO()
    write(buffer)
    content = buffer.getvalue()
    _tried(path, "written", lambda: _upload(path, content))


def _write_to_disk(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to hear of; remove_leftovers finds the file
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explained(error, path, "written") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: its entry in the folder is written apart from the file. Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call either
            raise
    finally:
        os.close(descriptor)


def _upload(path: UPath, content: bytes) -> None:
    # s3fs aborts an upload in several parts that fails; nothing of it can be seen before its last request
    path.fs.pipe_file(path.path, content)
    if (size := path.fs.info(path.path)["size"]) != len(content):
        raise StorageError(f"the store holds {size} bytes of {len(content)}")


# ---- reading, listing, deleting ----


def open_file(path: str | Path) -> BinaryIO:
    """A file, for reading; of a store, all of it in memory.

    Raises:
        OSError: it cannot be read; FileNotFoundError if there is none.
    """
    path = as_path(path)
    if is_local(path):
        return open(path, "rb")
    return io.BytesIO(_tried(path, "read", lambda: path.fs.cat_file(path.path)))


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder. fsspec's own answer is no where a store cannot be reached.

    Raises:
        OSError: the store cannot be reached.
    """
    path = as_path(path)
    if is_local(path):
        return path.exists()

    def ask() -> bool:
        try:
            path.fs.info(path.path)
        except FileNotFoundError:  # a store has no other way to say it
            return False
        return True

    return _tried(path, "looked for", ask)


def list_files(folder: str | Path) -> list[FileEntry]:
    """The files of a folder, not those of its subfolders, sorted by name; none if there is no such folder.

    Raises:
        OSError: it cannot be listed.
    """
    folder = as_path(folder)
    found = _list_disk(folder) if is_local(folder) else _tried(folder, "listed", lambda: _list_store(folder))
    return sorted(found, key=lambda entry: entry.path.name)


def _list_disk(folder: Path) -> list[FileEntry]:
    found = []
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # renamed or deleted just now
            stat = path.stat()
            if path.is_file():
                found.append(FileEntry(path, stat.st_size, stat.st_mtime))
    return found


def _list_store(folder: UPath) -> list[FileEntry]:
    try:
        entries = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:  # a store has no empty folders
        return []
    files = [entry for entry in entries if entry["type"] == "file"]
    return [FileEntry(folder / entry["name"].rpartition("/")[2], entry["size"], _time_of(entry)) for entry in files]


def _time_of(entry: dict[str, Any]) -> float | None:
    """When an object was written, under one of the names that stores have for it."""
    times = [entry[name] for name in ("LastModified", "last_modified", "mtime", "created") if name in entry]
    first = times[0] if times else None
    return first.timestamp() if isinstance(first, datetime.datetime) else first


def remove(path: str | Path) -> None:
    """Delete a file; one that is not there is fine.

    Raises:
        OSError: it could not be deleted.
    """
    path = as_path(path)
    if is_local(path):
        path.unlink(missing_ok=True)
        return

    def delete() -> None:
        with contextlib.suppress(FileNotFoundError):
            path.fs.rm_file(path.path)

    _tried(path, "deleted", delete)


def remove_leftovers(folder: str | Path) -> list[str]:
    """Delete what killed processes left of the files that they were writing, and return the names.

    These are temporary files, and on S3 uploads that were not completed, which nobody sees but the bill. It must be
    called before this process, or another one, writes to the folder.

    Raises:
        OSError: a temporary file could not be deleted.
    """
    folder = as_path(folder)
    if is_local(folder):
        found = [entry.path for entry in list_files(folder) if _LEFTOVER.fullmatch(entry.path.name)]
        for path in found:
            path.unlink(missing_ok=True)
        return [path.name for path in found]
    if folder.protocol not in ("s3", "s3a"):
        return []
    try:
        return _tried(folder, "searched for unfinished uploads", lambda: _abort_uploads(folder))
    except OSError as error:  # many who may write to a bucket may not ask for this
        logger.warning("%s", error)
        return []


def _abort_uploads(folder: UPath) -> list[str]:
    bucket, prefix, _ = folder.fs.split_path(folder.path)
    found = folder.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/")
    names = []
    for upload in found.get("Uploads", []):
        folder.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        names.append(upload["Key"].removeprefix(prefix).lstrip("/"))
    return names


# ---- errors ----


def _tried(path: UPath, done: str, action: Callable[[], _T]) -> _T:
    """What an action in a store returns; it is tried again after errors that may pass, which are told of.

    Args:
        path: what it is about.
        done: what is done to it, for messages: "written".
        action: only calls the store, so that an error of a class of its own is one of the store's library.
    """
    for attempt in itertools.count():
        try:
            return action()
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__ == "builtins":
                raise  # a mistake, or a package that is missing
            if isinstance(error, _LASTING) or attempt == len(WAITS):
                raise _explained(error, path, done) from error
            wait = WAITS[attempt]
            logger.warning(
                "%s: could not be %s (%s); trying again in %g s, attempt %d of %d",
                *(path, done, _reason(error), wait, attempt + 2, len(WAITS) + 1),
            )
            time.sleep(wait)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _explained(error: Exception, path: Path, done: str) -> OSError:
    """An error of the same kind that names the path, the reason and the remedy."""
    number = getattr(error, "errno", None) or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), None)
    default = "see that {} can be written to" if is_local(path) else "see that {} can be reached with your credentials"
    remedy = _REMEDIES.get(number, default).format(path.parent)
    message = f"{path}: could not be {done} ({_reason(error)}): {remedy}"
    return StorageError(message) if number is None else OSError(number, message)

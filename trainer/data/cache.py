"""Decoded waveforms of a whole data set in one memory-mapped file, made once.

A file holds a header, the waveforms one after the other (int16 when every source is 16-bit mono at the right rate,
float32 otherwise), and an index with a checksum for each clip. Its name is a hash of all that determines the content,
so that a changed source leads to another file; a file that is damaged or was made by something else is built again.

Shape letter: S audio samples.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trainer.data import cache_folder
from trainer.data.audio import (
    FULL_SCALE_16,
    AudioError,
    AudioInfo,
    decode_audio,
    decode_pcm16,
    inspect_audio,
    temporary_beside,
)

try:
    import fcntl
except ImportError:  # Windows: two processes then build the same file twice, which is slower and still right
    fcntl = None

logger = logging.getLogger("trainer")

FORMAT_VERSION = 1  # part of every key: raise it when the layout or the decoding changes
_HEADER = struct.Struct("<16s32s8sqq32s")  # magic, key, dtype, clips, start of the index, SHA-256 of the index
_MAGIC = b"onefile waveform"
_DATA_START = 128
_ALIGN = 8  # bytes: float32 views need 4, the index 8
_CLIP = np.dtype(
    [
        ("start", "<i8"),  # byte at which the waveform begins
        ("frames", "<i8"),  # its length in samples
        ("crc", "<i8"),
        ("channels", "<i8"),  # of the source, as the next two
        ("sample_rate", "<i8"),  # Hz
        ("clipped", "<i8"),  # 1 when it went beyond [-1, 1]
    ]
)
_CHUNK = 32  # clips decoded before they are written: bounds the memory


class AudioProblems(ValueError):
    """Some of a set's audio files cannot be used; the caller words the report.

    Attributes:
        problems: what is wrong, by path.
        frames: length in samples of the files that are sound, by path.
    """

    def __init__(self, problems: dict[str, str], frames: dict[str, int]):
        super().__init__(f"{len(problems)} unusable audio files, the first: {next(iter(problems.values()))}")
        self.problems = problems
        self.frames = frames


class AudioCache:
    """The waveforms of a set of audio files, read from one memory-mapped file; cheap to send to a loader's worker.

    Args:
        file: the cache file.
        paths: the sources, in the order of the index.
        sample_rate: of the waveforms, in Hz.
        dtype: "int16" or "float32".
        clips: the index, a record for each source with the fields `start`, `frames`, `crc` and, of the source,
            `channels`, `sample_rate`, `clipped`.
    """

    def __init__(self, file: Path, paths: list[str], sample_rate: int, dtype: str, clips: np.ndarray):
        self.file = file
        self.paths = paths
        self.sample_rate = sample_rate
        self.dtype = dtype
        self.clips = clips
        self._checked = np.zeros(len(clips), dtype=bool)
        self._bytes: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bytes": None}  # a worker maps the file itself

    def read(self, clip: int) -> np.ndarray:
        """One waveform.

        Args:
            clip: its position in `paths`.

        Returns:
            float32 [S], within [-1, 1], the caller's own copy.

        Raises:
            AudioError: the cache is damaged at this clip and its source cannot be read any more either.
        """
        if self._bytes is None:
            self._bytes = np.asarray(np.memmap(self.file, mode="r"))
        start, frames, crc = (int(self.clips[name][clip]) for name in ("start", "frames", "crc"))
        raw = self._bytes[start : start + frames * np.dtype(self.dtype).itemsize]
        if not self._checked[clip]:  # once in each process: reading the whole file at the start would take minutes
            if zlib.crc32(raw) != crc:
                return self._read_source(clip)
            self._checked[clip] = True
        wave_S = raw.view(self.dtype).astype(np.float32)
        if self.dtype == "int16":
            wave_S *= 1.0 / FULL_SCALE_16
        return wave_S

    def _read_source(self, clip: int) -> np.ndarray:
        path = self.paths[clip]
        logger.warning("%s is damaged at %s, decoded anew: delete the cache to have it rebuilt", self.file, path)
        return decode_audio(path, inspect_audio(path), self.sample_rate)[0]


@contextlib.contextmanager
def exclusive(file: Path) -> Iterator[bool]:
    """Holds a lock on `file` against other processes, after waiting for it.

    Args:
        file: made when missing, left in place.

    Yields:
        Whether the lock is held; False where the system or the file system has no locks.
    """
    with open(file, "ab") as handle:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
            held = fcntl is not None
        except OSError:  # some network file systems; every build has its own temporary file
            held = False
        yield held


def open_cache(paths: Iterable[str], sample_rate: int, folder: Path | None = None) -> AudioCache:
    """Opens the cache of these files, built first where there is none; a second start only stats the sources.

    Args:
        paths: audio files, absolute paths in any order; repetitions do no harm.
        sample_rate: of the waveforms, in Hz.
        folder: where cache files live; None for the user's cache folder.

    Returns:
        The cache; its `paths` are sorted, each once.

    Raises:
        AudioProblems: some files are missing or unusable (all of them were looked at); no cache is written.
        OSError: the cache cannot be read or written (permissions, disk full); nothing half-made is left.
    """
    paths = sorted(set(paths))
    folder = cache_folder() / "audio" if folder is None else Path(folder)
    key = _key(paths, sample_rate)
    file = folder / f"{key.hex()[:40]}.waveforms"
    try:
        cache = _load(file, key, paths, sample_rate)
        if cache is not None:
            return cache
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(file.with_suffix(".lock")) as held:
            if held:  # nobody else is at work on this file, so a temporary one was left by a killed process
                for stale in folder.glob(f"{file.name}.*.tmp"):
                    stale.unlink()
            # Another process may have built it while this one waited.
            return _load(file, key, paths, sample_rate) or _build(file, key, paths, sample_rate)
    except OSError as error:
        room = f", {shutil.disk_usage(folder).free / 1e9:.1f} GB free" if folder.is_dir() else ""
        raise OSError(
            error.errno,
            f"the audio cache {file} cannot be used ({error.strerror or error}{room}): make room, or choose "
            "another folder by cache_dir or the variable XDG_CACHE_HOME",
        ) from error


def _key(paths: list[str], sample_rate: int) -> bytes:
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, sample_rate]).encode())
    for path in paths:
        try:
            stat = os.stat(path)
            entry = [path, stat.st_size, stat.st_mtime_ns]
        except OSError:  # no cache has this key; building reports the file
            entry = [path]
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.digest()


def _load(file: Path, key: bytes, paths: list[str], sample_rate: int) -> AudioCache | None:
    """The cache in `file`; None when there is none or it is not what it should be."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            header = opened.read(_HEADER.size).ljust(_HEADER.size, b"\0")
            magic, held_key, dtype, count, index_start, checksum = _HEADER.unpack(header)
            if (magic, held_key, count, index_start + count * _CLIP.itemsize) == (_MAGIC, key, len(paths), size):
                opened.seek(index_start)
                index = opened.read()
                if hashlib.sha256(dtype + index).digest() == checksum:
                    clips = np.frombuffer(index, _CLIP)
                    return AudioCache(file, paths, sample_rate, dtype.rstrip(b"\0").decode(), clips)
    except FileNotFoundError:
        return None
    logger.warning("%s is damaged or no audio cache of this program: it is built again", file)
    return None


def _build(file: Path, key: bytes, paths: list[str], sample_rate: int) -> AudioCache:
    began = time.perf_counter()
    logger.info("decoding %d audio files into %s", len(paths), file)
    temporary = temporary_beside(file)
    try:
        with open(temporary, "xb") as out, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            infos = list(pool.map(_attempt, [(inspect_audio, (path,)) for path in paths]))
            dtype, clips = _write_clips(out, pool, paths, infos, sample_rate)
            _write_index(out, key, dtype, clips)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    seconds, size = time.perf_counter() - began, file.stat().st_size
    logger.info("decoded %d audio files in %.1f s: %.0f MB of %s", len(paths), seconds, size / 1e6, dtype)
    return AudioCache(file, paths, sample_rate, dtype, clips)


def _attempt(call: tuple) -> object:
    """Runs `function(*args)` of a (function, args) pair; an AudioError is returned, so that all can be shown."""
    function, args = call
    try:
        return function(*args)
    except AudioError as error:
        return error


def _decode(path: str, info: AudioInfo | AudioError, sample_rate: int, dtype: str) -> tuple[np.ndarray, float]:
    if isinstance(info, AudioError):
        raise info
    if dtype == "int16":
        return decode_pcm16(path, info), 0.0
    return decode_audio(path, info, sample_rate)


def _write_clips(
    out: BinaryIO, pool: ThreadPoolExecutor, paths: list[str], infos: list, sample_rate: int
) -> tuple[str, np.ndarray]:
    """Decodes and writes all clips in their order; returns the sample format and the index."""
    exact = all(isinstance(info, AudioInfo) and info.exact(sample_rate) for info in infos)
    dtype = "int16" if exact else "float32"
    clips = np.zeros(len(paths), _CLIP)
    problems = {}
    out.write(bytes(_DATA_START))
    for first in range(0, len(paths), _CHUNK):
        jobs = [
            (_decode, (path, info, sample_rate, dtype))
            for path, info in zip(paths[first : first + _CHUNK], infos[first : first + _CHUNK])
        ]
        for number, decoded in enumerate(pool.map(_attempt, jobs), start=first):
            if isinstance(decoded, AudioError):
                problems[paths[number]] = str(decoded)
                continue
            wave_S, peak = decoded
            raw = wave_S.astype(dtype, copy=False).tobytes()
            info = infos[number]
            clips[number] = (
                out.tell(), len(wave_S), zlib.crc32(raw), info.channels, info.sample_rate, peak > 1.0
            )  # fmt: skip
            out.write(raw + bytes(-len(raw) % _ALIGN))
    if problems:
        frames = dict(zip(paths, clips["frames"].tolist()))
        raise AudioProblems(problems, {path: count for path, count in frames.items() if path not in problems})
    return dtype, clips


def _write_index(out: BinaryIO, key: bytes, dtype: str, clips: np.ndarray) -> None:
    index, index_start = clips.tobytes(), out.tell()
    name = dtype.encode().ljust(8, b"\0")
    out.write(index)
    out.seek(0)
    checksum = hashlib.sha256(name + index).digest()
    out.write(_HEADER.pack(_MAGIC, key, name, len(clips), index_start, checksum))

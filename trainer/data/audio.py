"""Audio files: looked at, read as mono float32 at one rate, and written as 16-bit PCM.

Shape letters: S audio samples, C channels.
"""

import logging
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

logger = logging.getLogger("trainer")

FULL_SCALE_16 = 32768.0  # libsndfile reads the 16-bit value v as v / 32768
MAX_PEAK = 10.0  # a float file beyond this holds integers that nobody divided, not a loud recording


class AudioError(ValueError):
    """An audio file that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says."""

    frames: int  # samples per channel
    sample_rate: int  # Hz
    channels: int
    pcm16: bool  # the samples are 16-bit integers

    def exact(self, sample_rate: int) -> bool:
        """Whether int16 holds this file at `sample_rate` (Hz) without any change."""
        return self.pcm16 and self.channels == 1 and self.sample_rate == sample_rate


def _soundfile():
    try:
        import soundfile
    except ImportError as error:
        raise ImportError('audio files need soundfile: pip install "onefile-trainer[speech]"') from error
    return soundfile


def _check_riff(path: str, file: BinaryIO, size: int) -> None:
    """libsndfile reads a cut wav without a word, so what its header promises is compared with the file."""
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RIFX") or head[8:12] != b"WAVE":
        return
    order = "<" if head[:4] == b"RIFF" else ">"
    promised = struct.unpack(order + "I", head[4:8])[0] + 8
    while len(chunk := file.read(8)) == 8:
        length = struct.unpack(order + "I", chunk[4:])[0]
        if chunk[:4] == b"data":
            promised = max(promised - 1, file.tell() + length)  # - 1: some writers count a pad byte they leave out
            break
        file.seek(length + length % 2, os.SEEK_CUR)
    if promised > size:
        raise AudioError(
            f"{path}: truncated wav, its header promises {promised} bytes and the file has {size}: copy it "
            "again, or write it anew if it came through a pipe"
        )


def _check_ogg(path: str, file: BinaryIO, size: int) -> None:
    """A cut ogg reads as a shorter one: its last page has to be whole and to carry the end-of-stream flag."""
    if file.read(4) != b"OggS":
        return
    file.seek(max(0, size - 2 * 65307))  # a page has at most 65,307 bytes (RFC 3533, section 6)
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    table = page[27 : 27 + page[26]] if len(page) > 26 else b""
    whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(table)
    if not whole or not page[5] & 4:
        raise AudioError(f"{path}: truncated ogg, the end of the stream is missing: copy or encode it again")


def inspect_audio(path: str | Path) -> AudioInfo:
    """Reads the header of a wav, flac or ogg file and checks that the file is not cut short.

    Args:
        path: the file.

    Returns:
        Length, rate, channels and sample format as the header gives them.

    Raises:
        AudioError: the file is missing, empty, truncated, without samples or not audio.
    """
    path = os.fspath(path)
    soundfile = _soundfile()
    try:
        size = os.path.getsize(path)
        if size == 0:
            raise AudioError(f"{path}: the file is empty (0 bytes): copy it again")
        with open(path, "rb") as file:
            _check_riff(path, file, size)
            file.seek(0)
            _check_ogg(path, file, size)
        info = soundfile.info(path)
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from error
    except soundfile.SoundFileError as error:
        raise AudioError(f"{path}: not a readable audio file: {error}") from error
    if info.frames == 0:
        raise AudioError(f"{path}: holds no audio samples")
    return AudioInfo(info.frames, info.samplerate, info.channels, info.subtype == "PCM_16")


def decode_pcm16(path: str | Path, info: AudioInfo) -> np.ndarray:
    """Reads a 16-bit mono file as it is.

    Args:
        path: the file.
        info: what `inspect_audio` said of it; `info.exact` has to hold for its rate.

    Returns:
        int16 [S].

    Raises:
        AudioError: the file cannot be decoded to its end.
    """
    return _read(os.fspath(path), info, "int16")[:, 0]


def decode_audio(path: str | Path, info: AudioInfo, sample_rate: int) -> tuple[np.ndarray, float]:
    """Reads a file, mixes its channels down and resamples it, without any message about doing so.

    Args:
        path: the file.
        info: what `inspect_audio` said of it.
        sample_rate: of the result, in Hz.

    Returns:
        The waveform, float32 [S] clipped to [-1, 1], and the source's highest absolute value.

    Raises:
        AudioError: the file cannot be decoded to its end, or holds NaN, infinite or unscaled values.
    """
    path = os.fspath(path)
    wave_SC = _read(path, info, "float32")
    peak = float(np.abs(wave_SC).max())  # NaN and infinity come through max
    if not np.isfinite(peak):
        bad = int(np.count_nonzero(~np.isfinite(wave_SC)))
        raise AudioError(f"{path}: {bad} of {wave_SC.size} values are NaN or infinite: make the file again")
    if peak > MAX_PEAK:
        raise AudioError(f"{path}: values up to {peak:g} where [-1, 1] is expected: scale the file (16-bit: / 32768)")
    wave_S = wave_SC[:, 0] if info.channels == 1 else wave_SC.mean(axis=1)
    if info.sample_rate != sample_rate:
        wave_S = _resample(wave_S, info.sample_rate, sample_rate)
    return np.clip(wave_S, -1.0, 1.0), peak


def _read(path: str, info: AudioInfo, dtype: str) -> np.ndarray:
    soundfile = _soundfile()
    try:
        wave_SC = soundfile.read(path, dtype=dtype, always_2d=True)[0]
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(f"{path}: cannot be decoded: {error}: copy or encode it again") from error
    if len(wave_SC) != info.frames:
        raise AudioError(f"{path}: the header promises {info.frames} samples, {len(wave_SC)} could be decoded")
    return wave_SC


def _resample(wave_S: np.ndarray, source: int, target: int) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise ImportError('resampling needs soxr: pip install "onefile-trainer[speech]"') from error
    return soxr.resample(wave_S, source, target)


def read_audio(path: str | Path, sample_rate: int) -> np.ndarray:
    """Reads one audio file as mono at the wanted rate; stereo is mixed down with a warning.

    Args:
        path: a wav, flac or ogg file.
        sample_rate: of the result, in Hz; other rates are resampled (soxr, high quality).

    Returns:
        float32 [S], within [-1, 1].

    Raises:
        AudioError: (a ValueError) the file is missing, damaged, cut short or holds NaN.
        ValueError: the rate is not a positive number.
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate}: a positive number of Hz is needed, 22050 for LJSpeech")
    info = inspect_audio(path)
    if info.channels > 1:
        logger.warning("%s has %d channels, mixed down to one", path, info.channels)
    return decode_audio(path, info, sample_rate)[0]


def write_audio(path: str | Path, waveform, sample_rate: int) -> None:
    """Writes a mono waveform as a 16-bit PCM wav; the file appears whole or not at all.

    Args:
        path: the file; its folder is made when missing, an older file is replaced.
        waveform: [S] numbers (numpy array, CPU tensor without gradient, list); clipped to [-1, 1].
        sample_rate: in Hz.

    Raises:
        ValueError: the waveform is not one-dimensional, or holds NaN or infinite values.
        OSError: the file cannot be written.
    """
    path = Path(path)
    wave_S = np.asarray(waveform, dtype=np.float64)
    if wave_S.ndim != 1:
        raise ValueError(f"{path}: waveform of shape {wave_S.shape}, one dimension [S] is needed")
    if not np.isfinite(wave_S).all():
        raise ValueError(f"{path}: the waveform holds NaN or infinite values, nothing is written")
    # The inverse of reading: what came from a 16-bit file goes back bit for bit.
    pcm_S = np.clip(np.rint(wave_S * FULL_SCALE_16), -FULL_SCALE_16, FULL_SCALE_16 - 1).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            _soundfile().write(file, pcm_S, sample_rate, subtype="PCM_16", format="WAV")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, for a file that is renamed to `path` once it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

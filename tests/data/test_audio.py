"""Audio files: what is read and written is held against Python's own wave module and against formulas."""

import logging
import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from trainer.data.audio import AudioError, inspect_audio, read_audio, write_audio

RATE = 22050


def sine(seconds: float, rate: int = RATE, hertz: float = 440.0, peak: float = 0.5) -> np.ndarray:
    return peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write_pcm(path: Path, pcm: np.ndarray, rate: int = RATE) -> Path:
    """A 16-bit wav by the standard library; pcm is int16 [S] or [S, C]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if pcm.ndim == 1 else pcm.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.astype("<i2").tobytes())
    return path


def noise16(samples: int = 5000, seed: int = 0) -> np.ndarray:
    pcm = np.random.default_rng(seed).integers(-32768, 32768, samples).astype(np.int16)
    pcm[:2] = -32768, 32767
    return pcm


def test_16_bit_wav_is_read_exactly(tmp_path):
    pcm = noise16()
    read = read_audio(write_pcm(tmp_path / "a.wav", pcm), RATE)
    assert read.dtype == np.float32
    assert read.shape == (5000,)
    np.testing.assert_array_equal(read, pcm.astype(np.float64) / 32768)


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    # A step of the format, half a one where libsndfile rounds; vorbis is lossy.
    [("flac", "PCM_16", 1 / 65536), ("wav", "PCM_24", 1 / 2**23), ("wav", "FLOAT", 1e-7), ("ogg", "VORBIS", 0.02)],
)
def test_formats(tmp_path, suffix, subtype, tolerance):
    path = tmp_path / f"a.{suffix}"
    tone = sine(1.0)
    soundfile.write(path, tone, RATE, subtype=subtype)
    read = read_audio(str(path), RATE)
    assert read.shape == tone.shape
    np.testing.assert_allclose(read[500:-500], tone[500:-500], rtol=0, atol=tolerance * 1.01)


def test_stereo_is_mixed_down_with_a_warning(tmp_path, caplog):
    pcm = np.stack([noise16(seed=1), noise16(seed=2)], axis=1)
    path = write_pcm(tmp_path / "two.wav", pcm)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        read = read_audio(path, RATE)
    np.testing.assert_allclose(read, pcm.astype(np.float64).mean(axis=1) / 32768, rtol=0, atol=1e-7)
    assert [record.getMessage() for record in caplog.records] == [f"{path} has 2 channels, mixed down to one"]


@pytest.mark.parametrize("rate", [44100, 48000, 16000])
def test_other_rates_are_resampled(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, sine(1.0, rate), rate, subtype="FLOAT")
    read = read_audio(path, RATE)
    assert read.dtype == np.float32
    assert abs(len(read) - RATE) <= 1
    # The edges ring; inside, the tone is the one that the formula gives at the new rate.
    np.testing.assert_allclose(read[2000:-2000], sine(1.0)[2000 : len(read) - 2000], rtol=0, atol=2e-4)


def test_values_stay_within_full_scale(tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, sine(0.2, peak=1.5), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, RATE), np.clip(sine(0.2, peak=1.5), -1, 1), rtol=0, atol=1e-6)


def test_inspect(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros((700, 2)), 16000)
    info = inspect_audio(tmp_path / "a.flac")
    assert (info.frames, info.sample_rate, info.channels, info.pcm16) == (700, 16000, 2, True)
    assert not info.exact(16000)
    info = inspect_audio(write_pcm(tmp_path / "b.wav", noise16()))
    assert (info.exact(RATE), info.exact(16000)) == (True, False)


def truncated_wav(path):
    path.write_bytes(write_pcm(path, noise16()).read_bytes()[:-1000])


def cut_in_trailer(path):
    path.write_bytes(write_pcm(path, noise16()).read_bytes())
    body = path.read_bytes() + b"LIST" + struct.pack("<I", 100) + bytes(40)
    path.write_bytes(body[:4] + struct.pack("<I", len(body) + 60 - 8) + body[8:])


def streamed_wav(path):
    body = bytearray(write_pcm(path, noise16()).read_bytes())
    body[4:8] = body[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(body)


def truncated_flac(path):
    soundfile.write(path, noise16() / 32768, RATE, format="FLAC")
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_ogg(path):
    soundfile.write(path, 0.1 * np.random.default_rng(0).normal(size=9 * RATE), RATE, format="OGG")
    body = path.read_bytes()
    path.write_bytes(body[: len(body) * 9 // 10])
    assert 0 < soundfile.info(path).frames < 9 * RATE  # libsndfile alone takes it


def ogg_cut_in_last_page(path):
    soundfile.write(path, 0.1 * np.random.default_rng(0).normal(size=9 * RATE), RATE, format="OGG")
    path.write_bytes(path.read_bytes()[:-20])


def ogg_cut_between_pages(path):
    soundfile.write(path, 0.1 * np.random.default_rng(0).normal(size=9 * RATE), RATE, format="OGG")
    body = path.read_bytes()
    path.write_bytes(body[: body.rindex(b"OggS")])


def not_a_number(path):
    data = sine(0.5).astype(np.float32)
    data[77] = np.nan
    soundfile.write(path, data, RATE, subtype="FLOAT", format="WAV")


def infinite(path):
    data = sine(0.5)
    data[3] = np.inf
    soundfile.write(path, data, RATE, subtype="DOUBLE", format="WAV")


REFUSED = [
    (lambda path: None, "cannot be read: No such file"),
    (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    (lambda path: path.write_bytes(b""), "empty .0 bytes"),
    (lambda path: path.write_bytes(b"no audio at all" * 30), "not a readable audio file"),
    (lambda path: soundfile.write(path, np.zeros(0), RATE, format="WAV"), "holds no audio samples"),
    (truncated_wav, "truncated wav, its header promises 10044 bytes and the file has 9044"),
    (cut_in_trailer, "truncated wav"),
    (streamed_wav, "promises 4294967339 bytes .* came through a pipe"),
    (truncated_flac, "cannot be decoded"),
    (truncated_ogg, "truncated ogg"),
    (ogg_cut_in_last_page, "truncated ogg"),
    (ogg_cut_between_pages, "truncated ogg"),
    (not_a_number, "1 of 11025 values are NaN or infinite"),
    (infinite, "1 of 11025 values are NaN or infinite"),
    (lambda path: soundfile.write(path, sine(0.1) * 2000, RATE, subtype="FLOAT", format="WAV"), r"expected: scale"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_unusable_files_are_refused_by_name(tmp_path, make, message):
    path = tmp_path / "clip-7.wav"
    make(path)
    with pytest.raises(AudioError, match=rf"clip-7\.wav: .*{message}"):
        read_audio(path, RATE)


def test_a_file_shorter_than_its_info_is_refused(tmp_path, monkeypatch):
    path = write_pcm(tmp_path / "a.wav", noise16())
    monkeypatch.setattr(soundfile, "read", lambda *_, **__: (np.zeros((4000, 1), np.float32), RATE))
    with pytest.raises(AudioError, match="promises 5000 samples, 4000 could be decoded"):
        read_audio(path, RATE)


def test_wavs_that_are_odd_but_whole_are_read(tmp_path):
    path = write_pcm(tmp_path / "a.wav", noise16())
    body = path.read_bytes()
    extra = b"note" + struct.pack("<I", 3) + b"abc\0"  # an odd chunk with its pad byte, before the samples
    size = struct.pack("<I", len(body) + len(extra) - 8 + 1)  # counts a last pad byte that is not there
    path.write_bytes(body[:4] + size + body[8:12] + extra + body[12:])
    np.testing.assert_array_equal(read_audio(path, RATE), noise16() / 32768)


def test_big_endian_wav(tmp_path):
    head = struct.pack(
        ">4sI4s4sIHHIIHH4sI", b"RIFX", 10036, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", 10000
    )
    path = tmp_path / "big.wav"
    path.write_bytes(head + noise16().astype(">i2").tobytes())
    np.testing.assert_array_equal(read_audio(path, RATE), noise16() / 32768)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(AudioError, match="truncated wav"):
        read_audio(path, RATE)


def test_sample_rate_is_checked(tmp_path):
    with pytest.raises(ValueError, match="sample_rate=0: a positive number"):
        read_audio(tmp_path / "a.wav", 0)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package):
    path = write_pcm(tmp_path / "a.wav", noise16())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}: pip install "onefile-trainer\[speech\]"'):
        read_audio(path, 16000)


def test_write_goes_through_the_wave_module(tmp_path):
    path = tmp_path / "new" / "folder" / "a.wav"
    write_audio(path, np.array([0.0, 0.5, -0.25, 1.0, -1.0, 7.0, -7.0]), 16000)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        pcm = np.frombuffer(file.readframes(99), "<i2")
    assert pcm.tolist() == [0, 16384, -8192, 32767, -32768, 32767, -32768]
    assert [child.name for child in path.parent.iterdir()] == ["a.wav"]


def test_what_was_read_is_written_back_bit_for_bit(tmp_path):
    source = write_pcm(tmp_path / "a.wav", noise16())
    write_audio(str(tmp_path / "b.wav"), torch.from_numpy(read_audio(source, RATE)), RATE)
    assert (tmp_path / "b.wav").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("waveform", "message"), [(np.zeros((2, 5)), r"shape \(2, 5\)"), (np.array([0.0, np.nan]), "NaN or infinite")]
)
def test_write_refuses(tmp_path, waveform, message):
    with pytest.raises(ValueError, match=rf"a\.wav: .*{message}"):
        write_audio(tmp_path / "a.wav", waveform, RATE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_pcm(tmp_path / "a.wav", noise16())
    before = path.read_bytes()

    def half(file, *_, **__):
        file.write(b"RIFF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(soundfile, "write", half)
    with pytest.raises(OSError, match="No space left"):
        write_audio(path, np.zeros(10), RATE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

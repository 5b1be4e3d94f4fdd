"""The waveform cache: exact values, built once, rebuilt when damaged, safe with several processes or a full disk."""

import logging
import os
import pickle
import resource
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer.data import cache as cache_module
from trainer.data import cache_folder
from trainer.data.cache import AudioProblems, exclusive, open_cache

RATE = 22050
REPOSITORY = Path(__file__).parents[2]


def make_clip(path: Path, seed: int, samples: int = 3001, channels: int = 1) -> np.ndarray:
    pcm = np.random.default_rng(seed).integers(-20000, 20000, (samples, channels)).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm.tobytes())
    return pcm


@pytest.fixture
def clips(tmp_path):
    """Five 16-bit clips of odd lengths: path -> int16 values."""
    (tmp_path / "wavs").mkdir()
    paths = [tmp_path / "wavs" / f"{name}.wav" for name in "edcba"]
    return {str(path): make_clip(path, seed, 3001 + 17 * seed)[:, 0] for seed, path in enumerate(paths)}


def assert_holds(cache, clips):
    assert cache.paths == sorted(clips)
    for number, path in enumerate(cache.paths):
        wave_S = cache.read(number)
        assert wave_S.dtype == np.float32
        np.testing.assert_array_equal(wave_S, clips[path] / 32768)
        wave_S[:] = 7  # the caller's copy
    assert cache.clips["frames"].tolist() == [len(clips[path]) for path in cache.paths]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def never(*_, **__):
    raise AssertionError("an audio file was opened")


def test_16_bit_files_are_kept_as_they_are(clips, tmp_path):
    cache = open_cache(clips, RATE, tmp_path / "cache")
    assert cache.dtype == "int16"
    assert (cache.clips["start"] % 8 == 0).all()
    assert_holds(cache, clips)
    assert_holds(cache, clips)
    (name,) = files_in(tmp_path / "cache")
    assert (tmp_path / "cache" / name).stat().st_size < sum(2 * len(pcm) for pcm in clips.values()) + 1000


def test_one_other_file_makes_it_float32(clips, tmp_path):
    stereo = str(tmp_path / "wavs" / "z.wav")
    clips[stereo] = make_clip(Path(stereo), 9, channels=2).astype(np.float64).mean(axis=1)
    cache = open_cache(clips, RATE, tmp_path / "cache")
    assert cache.dtype == "float32"
    assert_holds(cache, clips)
    assert cache.clips["channels"].tolist() == [1, 1, 1, 1, 1, 2]


def test_resampled_and_clipped_sources_are_marked(tmp_path):
    loud, slow = tmp_path / "a.wav", tmp_path / "b.flac"
    soundfile.write(loud, np.full(900, 1.25), RATE, subtype="FLOAT")
    soundfile.write(slow, np.zeros(1000), RATE // 2)
    cache = open_cache([str(loud), str(slow)], RATE, tmp_path / "cache")
    assert cache.clips["clipped"].tolist() == [1, 0]
    assert cache.clips["sample_rate"].tolist() == [RATE, RATE // 2]
    np.testing.assert_array_equal(cache.read(0), np.ones(900))
    np.testing.assert_array_equal(cache.read(1), np.zeros(2000))


def test_a_second_start_opens_no_audio(clips, tmp_path, monkeypatch):
    open_cache(clips, RATE, tmp_path / "cache")
    for name in ("inspect_audio", "decode_audio", "decode_pcm16", "exclusive"):  # nor does it wait for a lock
        monkeypatch.setattr(cache_module, name, never)
    assert_holds(open_cache([*reversed(list(clips)), *clips], RATE, tmp_path / "cache"), clips)


def test_what_determines_the_content_is_in_the_name(clips, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    open_cache(clips, RATE, folder)
    open_cache(list(clips)[:3], RATE, folder)
    open_cache(clips, RATE // 2, folder)
    assert len(files_in(folder)) == 3
    first = next(iter(clips))
    os.utime(first, ns=(1, 1))  # another time
    open_cache(clips, RATE, folder)
    assert len(files_in(folder)) == 4
    clips[first] = make_clip(Path(first), 77, 3500)[:, 0]
    os.utime(first, ns=(1, 1))  # another size
    assert_holds(open_cache(clips, RATE, folder), clips)
    assert len(files_in(folder)) == 5
    monkeypatch.setattr(cache_module, "FORMAT_VERSION", 1000)
    open_cache(clips, RATE, folder)
    assert len(files_in(folder)) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: body[:50],
        lambda body: body[:-1],
        lambda body: body[: len(body) // 2],
        lambda body: b"somebody else's file" * 900,
        lambda body: b"X" + body[1:],
        lambda body: body[:20] + b"????" + body[24:],  # the key
        lambda body: body[:64] + b"\xff" * 8 + body[72:],  # where the index begins
        lambda body: body[:48] + b"int32" + body[53:],  # the sample format
        lambda body: body[:-40] + b"\x01" + body[-39:],  # the index
    ],
)
def test_a_damaged_file_is_built_again(clips, tmp_path, caplog, damage):
    folder = tmp_path / "cache"
    file = open_cache(clips, RATE, folder).file
    file.write_bytes(damage(file.read_bytes()))
    assert_holds(open_cache(clips, RATE, folder), clips)
    assert f"{file} is damaged or no audio cache" in caplog.text
    caplog.clear()
    assert_holds(open_cache(clips, RATE, folder), clips)
    assert not caplog.records


def test_a_damaged_waveform_is_decoded_anew(clips, tmp_path, caplog):
    cache = open_cache(clips, RATE, tmp_path / "cache")
    body = bytearray(cache.file.read_bytes())
    body[int(cache.clips["start"][2]) + 500] ^= 1
    cache.file.write_bytes(body)
    assert_holds(open_cache(clips, RATE, tmp_path / "cache"), clips)
    assert [record.args[1] for record in caplog.records if record.levelno == logging.WARNING] == [cache.paths[2]]


def test_all_unusable_files_are_reported_and_nothing_is_written(clips, tmp_path):
    paths = list(clips)
    Path(paths[0]).write_bytes(b"")
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:-100])
    missing = str(tmp_path / "wavs" / "missing.wav")
    with pytest.raises(AudioProblems, match="3 unusable audio files") as caught:
        open_cache([*paths, missing], RATE, tmp_path / "cache")
    assert {path: message.split(": ")[1].split(",")[0] for path, message in caught.value.problems.items()} == {
        paths[0]: "the file is empty (0 bytes)",
        paths[1]: "truncated wav",
        missing: "cannot be read",
    }
    assert caught.value.frames == {path: len(clips[path]) for path in paths[2:]}
    assert files_in(tmp_path / "cache") == []


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from pathlib import Path
from trainer.data.cache import open_cache
cache = open_cache(sys.argv[2:], 22050, Path(sys.argv[1]))
print("sum", sum(float(cache.read(i).sum()) for i in range(len(cache.paths))))
"""


def test_processes_at_the_same_time(clips, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), *clips]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    expected = sum(float(pcm.sum()) / 32768 for pcm in clips.values())
    for out, _ in outputs:
        assert float(out.split("sum ")[1]) == pytest.approx(expected, abs=1e-2)
    assert sum("decoded 5 audio files" in out for out, _ in outputs) == 1  # the others waited for it
    assert len(files_in(tmp_path / "cache")) == 1


def test_temporary_files_of_killed_processes_are_removed(clips, tmp_path):
    file = open_cache(clips, RATE, tmp_path / "cache").file
    file.unlink()
    stale = file.with_name(f"{file.name}.123-abc.tmp")
    other = file.with_name("another.waveforms.123-abc.tmp")
    stale.touch()
    other.touch()
    open_cache(clips, RATE, tmp_path / "cache")
    assert files_in(tmp_path / "cache") == sorted([file.name, other.name])


@pytest.mark.parametrize("failing", [None, OSError(37, "No locks available")])
def test_without_locks_it_still_works(clips, tmp_path, monkeypatch, failing):
    if failing is None:
        monkeypatch.setattr(cache_module, "fcntl", None)
    else:

        def flock(*_):
            raise failing

        monkeypatch.setattr(cache_module.fcntl, "flock", flock)
    with exclusive(tmp_path / "lock") as held:
        assert held is False
    assert_holds(open_cache(clips, RATE, tmp_path / "cache"), clips)
    assert_holds(open_cache(clips, RATE, tmp_path / "cache"), clips)


def test_a_full_disk_is_reported_and_leaves_nothing(clips, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the system then refuses to write more to a file
    try:
        with pytest.raises(OSError, match=r"the audio cache .*\.waveforms cannot be used .*GB free.*cache_dir"):
            open_cache(clips, RATE, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_in(tmp_path / "cache") == []
    assert_holds(open_cache(clips, RATE, tmp_path / "cache"), clips)


def test_a_folder_that_cannot_be_made(clips, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be used \(Not a directory\): make room, or choose another folder"):
        open_cache(clips, RATE, tmp_path / "file" / "cache")


def test_it_is_small_to_send_to_a_worker(clips, tmp_path):
    cache = open_cache(clips, RATE, tmp_path / "cache")
    cache.read(0)
    sent = pickle.dumps(cache)
    assert len(sent) < 3000  # the waveforms have 30,000 bytes
    assert_holds(pickle.loads(sent), clips)


def test_the_default_folder(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_cache(clips, RATE).file.parent == tmp_path / "xdg" / "onefile-trainer" / "audio"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "onefile-trainer"

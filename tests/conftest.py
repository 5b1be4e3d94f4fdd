"""Fixtures that several test folders share."""

import os
import signal
from pathlib import Path

# Before torch is imported: the tests' tensors are tiny, and two threads that wait for each other on a busy machine are
# ten times slower than one. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

# whoever starts the tests in the background, or under nohup, has these ignored, and child processes inherit it
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("TRAINER_SHARED_DATA", ROOT.parent / "shared" / "data"))


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in {SHARED_DATA} (set TRAINER_SHARED_DATA)")
    return path


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or written to the user's cache; child processes inherit this."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ljspeech_sample() -> Path:
    """24 real LJSpeech clips in LJSpeech's layout."""
    return _shared("ljspeech-sample")


@pytest.fixture(scope="session")
def ljspeech_phonemes() -> Path:
    """Text and reference IPA of 100 LJSpeech sentences."""
    return _shared("ljspeech-phonemes.tsv")


@pytest.fixture(scope="session")
def tiny_ljspeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight made-up clips of 1.0 to 2.4 seconds (harmonics whose pitch glides, over noise) in LJSpeech's layout."""
    import soundfile

    folder = tmp_path_factory.mktemp("tiny") / "LJSpeech-tiny"
    (folder / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["low", "notes", "glide", "up", "and", "then", "down", "again", "slowly", "here"]
    lines = []
    for i in range(8):
        name, seconds, rate = f"TINY-{i:04d}", 1.0 + 0.2 * i, 22050
        t = np.arange(int(seconds * rate)) / rate
        phase = 2 * np.pi * (110 + 10 * i) * (t + 0.05 * t**2)
        wave = sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.1 + rng.normal(0, 0.005, t.shape)
        soundfile.write(folder / "wavs" / f"{name}.wav", wave, rate, subtype="PCM_16")
        text = " ".join(words[: 2 + i]) + "."
        lines.append(f"{name}|{text}|{text}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    return folder

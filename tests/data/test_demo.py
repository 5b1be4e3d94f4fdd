"""The demo set: its layout, its clips, and that it is made of the same bytes every time."""

import filecmp
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from trainer.data import demo
from trainer.data.demo import DEMO_SENTENCES, make_demo_set
from trainer.data.phonemes import phonemes_available
from trainer.data.text import clean_english

needs_phonemes = pytest.mark.skipif(not phonemes_available(), reason="the extra 'phonemes' is not installed")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    if not phonemes_available():
        pytest.skip("the extra 'phonemes' is not installed")
    return make_demo_set(tmp_path_factory.mktemp("demo") / "first")


def read_clip(file):
    with wave.open(str(file), "rb") as clip:
        assert (clip.getframerate(), clip.getsampwidth(), clip.getnchannels()) == (22050, 2, 1)
        return np.frombuffer(clip.readframes(clip.getnframes()), dtype="<i2").astype(np.float64) / 32768


def test_the_sentences_are_many_and_short():
    assert len(DEMO_SENTENCES) >= 100
    assert len(set(DEMO_SENTENCES)) == len(DEMO_SENTENCES)
    assert all(4 <= len(sentence.split()) <= 20 for sentence in DEMO_SENTENCES)
    assert not any("|" in sentence for sentence in DEMO_SENTENCES)


def test_the_readings_written_by_hand_are_what_the_cleaner_makes():
    assert [demo._reading(sentence) for sentence in DEMO_SENTENCES] == [clean_english(s) for s in DEMO_SENTENCES]
    assert demo._reading("In 1906 the mill, of 2,300 feet, stood.") == (
        "In nineteen oh six the mill, of two thousand three hundred feet, stood."
    )


def test_the_layout_is_ljspeechs(demo_set):
    raw = (demo_set / "metadata.csv").read_bytes()
    assert b"\r" not in raw
    rows = [line.split("|") for line in raw.decode("utf-8").splitlines()]
    assert [row[0] for row in rows] == [f"DEMO-{i:04d}" for i in range(1, len(DEMO_SENTENCES) + 1)]
    assert [row[1] for row in rows] == list(DEMO_SENTENCES)
    assert not any(character.isdigit() for row in rows for character in row[2])
    assert sorted(file.stem for file in (demo_set / "wavs").iterdir()) == [row[0] for row in rows]
    assert sorted(file.name for file in demo_set.iterdir()) == ["metadata.csv", "wavs"]
    assert [file.name for file in demo_set.parent.iterdir()] == ["first"]  # nothing temporary is left


def test_clips_are_audible_unclipped_and_of_useful_length(demo_set):
    seconds = []
    for file in sorted((demo_set / "wavs").iterdir()):
        samples = read_clip(file)
        seconds.append(len(samples) / 22050)
        assert 1.0 <= seconds[-1] <= 10.0, file.name
        assert 0.2 <= np.abs(samples).max() <= 0.95, file.name
        assert 0.03 <= np.sqrt(np.mean(samples**2)) <= 0.2, file.name
    # 160 words a minute, with pauses: between 100 and 220 over the whole set
    words = sum(len(sentence.split()) for sentence in DEMO_SENTENCES)
    assert 100 <= words / (sum(seconds) / 60) <= 220


def test_two_builds_are_the_same_byte_for_byte(demo_set, tmp_path):
    again = make_demo_set(tmp_path / "elsewhere" / "with a longer name")
    names = ["metadata.csv", *(f"wavs/{file.name}" for file in (demo_set / "wavs").iterdir())]
    same, different, missing = filecmp.cmpfiles(demo_set, again, names, shallow=False)
    assert (sorted(same), different, missing) == (sorted(names), [], [])


def test_a_set_that_is_there_is_not_made_again(demo_set, monkeypatch):
    def refuse(*_args):
        raise AssertionError("espeak-ng was started")

    monkeypatch.setattr(demo, "run_espeak", refuse)
    assert make_demo_set(demo_set) == demo_set
    monkeypatch.setattr(demo, "phonemes_available", lambda: False)
    assert make_demo_set(str(demo_set)) == demo_set


@needs_phonemes
def test_the_cache_holds_one_set_and_repairs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = make_demo_set()
    assert made.parent == tmp_path / "onefile-trainer"
    assert made.name.startswith("demo-speech-")
    clip = made / "wavs" / "DEMO-0007.wav"
    before = clip.read_bytes()
    clip.unlink()
    assert make_demo_set() == made
    assert clip.read_bytes() == before
    monkeypatch.setattr(demo, "run_espeak", None)  # not called again
    assert make_demo_set() == made
    assert [folder.name for folder in made.parent.iterdir()] == [made.name]


@needs_phonemes
def test_another_version_of_espeak_gets_another_folder(monkeypatch):
    names = set()
    for version in ("0.2.4", "0.2.5"):
        monkeypatch.setattr(demo.importlib.metadata, "version", lambda name, version=version: version)
        names.add(demo._version())
    assert len(names) == 2


def test_an_empty_folder_is_filled_and_a_foreign_one_refused(demo_set, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert make_demo_set(empty) == empty
    assert filecmp.cmp(empty / "metadata.csv", demo_set / "metadata.csv", shallow=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="no complete demo set"):
        make_demo_set(foreign)
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_a_set_that_another_process_finished_first_is_taken(demo_set, tmp_path, monkeypatch):
    target = tmp_path / "set"
    speak = demo._speak_into

    def slow(folder):
        speak(folder)
        if not target.exists():  # the other process is done just now
            monkeypatch.setattr(demo, "_speak_into", speak)
            make_demo_set(target)

    monkeypatch.setattr(demo, "_speak_into", slow)
    assert make_demo_set(target) == target
    assert filecmp.cmp(target / "metadata.csv", demo_set / "metadata.csv", shallow=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_what_stops_the_publishing_is_not_hidden(demo_set, tmp_path, monkeypatch):
    def spoil(folder):
        folder.mkdir()
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "thesis.txt").write_text("appeared meanwhile")

    monkeypatch.setattr(demo, "_speak_into", spoil)
    with pytest.raises(OSError, match="set"):
        make_demo_set(tmp_path / "set")
    assert (tmp_path / "set" / "thesis.txt").read_text() == "appeared meanwhile"


@needs_phonemes
def test_two_processes_at_once_make_one_set(tmp_path):
    code = "from trainer.data.demo import make_demo_set; print(make_demo_set())"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=100)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(folders) == 1
    assert len(list((Path(folders.pop()) / "wavs").iterdir())) == len(DEMO_SENTENCES)


def test_without_the_extra_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "phonemes_available", lambda: False)
    for folder in (None, tmp_path / "new"):
        with pytest.raises(ImportError, match=r'pip install "onefile-trainer\[phonemes\]"'):
            make_demo_set(folder)

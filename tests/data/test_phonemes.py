"""The child process that makes phonemes and the cache on disk; odd input, damage, two processes at once."""

import io
import json
import logging
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest

from trainer.data import cache_folder, espeak, phonemes
from trainer.data.phonemes import PhonemeCache, phonemes_available, phonemize, run_espeak

needs_phonemes = pytest.mark.skipif(not phonemes_available(), reason="the extra 'phonemes' is not installed")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onefile-trainer" / "phonemes-1.sqlite"


@pytest.fixture
def no_child(monkeypatch):
    """Makes every start of the child an error."""

    def start():
        def refuse(*_args, **_options):
            raise AssertionError("a child process was started")

        monkeypatch.setattr(phonemes.subprocess, "run", refuse)

    return start


def fake_child(monkeypatch, returncode=0, stdout="", stderr=""):
    done = subprocess.CompletedProcess([], returncode, stdout, stderr)
    monkeypatch.setattr(phonemes.subprocess, "run", lambda *_args, **_options: done)


@needs_phonemes
def test_sentences_keep_their_order_and_punctuation():
    # espeak-ng's notation of words that every dictionary of American English reads the same way
    assert phonemize(["no light", "red; green!", "no light", "three"]) == [
        "nˈoʊ lˈaɪt",
        "ɹˈɛd; ɡɹˈiːn!",
        "nˈoʊ lˈaɪt",
        "θɹˈiː",
    ]


@needs_phonemes
def test_odd_input_shifts_nothing():
    odd = ["", "?!…", "'", "two\nlines", "a\x00b", "\ud800", "“ ' ” red", "-", "red " * 2000, "\u2028", "{red}", "red"]
    said = phonemize(odd)
    assert len(said) == len(odd)
    assert said[:3] == ["", "?!…", ""]
    assert said[3] == "tˈuː lˈaɪnz"
    assert said[4] == "ɐ bˈiː"  # not cut at the NUL
    assert said[5] == "?"  # a lone surrogate is no character: replaced as by str.encode
    assert said[6] == "“ ” ɹˈɛd"
    assert said[7] == ""
    assert said[8].count("ɹˈɛd") == 2000
    assert said[9] == ""
    assert said[10] == "ɹˈɛd"
    assert said[11] == "ɹˈɛd"


@needs_phonemes
def test_what_a_sentence_sounds_like_does_not_depend_on_its_neighbours(own_cache):
    texts = ["The read book.", "I read it; you lead.", "Lead pipes, live wires!", "A", "the apple", "Wind the clock"]
    together = phonemize(texts)
    own_cache.unlink()
    assert phonemize(texts[::-1])[::-1] == together


@needs_phonemes
def test_the_second_start_needs_no_child(no_child, own_cache):
    texts = [f"Sentence {word}." for word in ("one", "two", "three")] * 400
    first = phonemize(texts)
    no_child()
    assert phonemize(texts) == first
    assert phonemize(iter(texts[:1])) == first[:1]
    with pytest.raises(AssertionError, match="child process was started"):
        phonemize(["Something new."])
    assert [file.name for file in own_cache.parent.iterdir()] == [own_cache.name]


@needs_phonemes
def test_another_voice_or_version_is_not_answered_from_the_cache(own_cache, monkeypatch):
    assert phonemize(["dance hall"]) != phonemize(["dance hall"], voice="en-gb")
    with sqlite3.connect(own_cache) as connection:
        connection.execute("UPDATE phonemes SET ipa = 'stale' WHERE voice = 'en-us'")
    connection.close()
    assert phonemize(["dance hall"]) == ["stale"]
    monkeypatch.setattr(phonemes.importlib.metadata, "version", lambda name: "99")
    assert phonemize(["dance hall"]) == ["dˈæns hˈɔːl"]


def damage_by_text(file):
    file.write_bytes(b"this is no database" * 1000)


def damage_by_zeros(file):
    data = file.read_bytes()
    file.write_bytes(data[:4096] + bytes(len(data) - 4096))


def damage_by_cut(file):
    file.write_bytes(file.read_bytes()[:5000])


def damage_by_emptying(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_by_text, damage_by_zeros, damage_by_cut, damage_by_emptying])
def test_a_damaged_cache_is_set_aside_and_begun_anew(own_cache, damage, caplog):
    cache = PhonemeCache(own_cache, "engine 1", "en-us")
    known = {f"text {i}": f"ipa {i}" for i in range(3000)}
    cache.add(known)
    assert cache.read(known) == known
    damage(own_cache)
    with caplog.at_level(logging.WARNING, logger="trainer"):
        assert cache.read(["text 1", "text 2999"]) == {}
    if damage is not damage_by_emptying:  # SQLite takes an empty file for a new database
        assert "is damaged" in caplog.text
        assert own_cache.with_suffix(".damaged").exists()
    cache.add({"new": "njˈuː"})
    assert cache.read(["new", "text 1"]) == {"new": "njˈuː"}
    damage(own_cache)
    cache.add({"newer": "njˈuːɚ"})
    assert cache.read(["new", "newer"]) == {"newer": "njˈuːɚ"}


def test_a_cache_that_cannot_be_written_is_said_and_does_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = PhonemeCache(tmp_path / "file" / "phonemes.sqlite", "engine 1", "en-us")
    with caplog.at_level(logging.WARNING, logger="trainer"):
        cache.add({"a": "ˈeɪ"})
        assert cache.read(["a"]) == {}
    assert "cannot be cached" in caplog.text
    (tmp_path / "folder.sqlite").mkdir()
    caplog.clear()
    assert PhonemeCache(tmp_path / "folder.sqlite", "engine 1", "en-us").read(["a"]) == {}
    assert "cannot be cached" in caplog.text
    assert (tmp_path / "folder.sqlite").is_dir()  # nothing of others is moved away


@needs_phonemes
def test_two_processes_at_once_agree(tmp_path):
    words = ["red", "green", "blue", "black", "white"]
    code = (
        "import json, sys; from trainer.data.phonemes import phonemize;"
        f"words = {words!r}; texts = [a + ' ' + b + ' ' + c for a in words for b in words for c in words];"
        "print(json.dumps([phonemize(texts[i : i + 25]) for i in range(0, 125, 25)]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=100)[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert answers[0] == answers[1]
    assert sum(map(len, answers[0])) == 125
    with sqlite3.connect(cache_folder() / "phonemes-1.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM phonemes").fetchone() == (125,)
    connection.close()


@needs_phonemes
def test_a_failing_child_shows_its_error_output():
    with pytest.raises(RuntimeError, match=r"(?s)voice 'klingonish'.*status 1:.*Traceback.*klingonish"):
        phonemize(["red"], voice="klingonish")
    with pytest.raises(RuntimeError, match=r"(?s)task 'sing' is none of phonemize, speak"):
        run_espeak("sing", ["red"], "en-us")
    with pytest.raises(RuntimeError, match=r"(?s)status 1:.*espeak-ng refused voice 'klingonish'"):
        run_espeak("speak", [["/nowhere/a.wav", "red"]], "klingonish")


def test_a_child_that_leaves_requests_unanswered_is_an_error(monkeypatch):
    fake_child(monkeypatch, stdout='"ɹˈɛd"\n', stderr="half way")
    with pytest.raises(RuntimeError, match=r"(?s)gave 1 answers to 2 requests:.half way"):
        run_espeak("phonemize", ["red", "green"], "en-us")


def test_a_child_that_hangs_is_stopped(monkeypatch, tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(phonemes, "_CHILD", script)
    monkeypatch.setattr(phonemes, "_PATIENCE_S", 0.3)
    with pytest.raises(RuntimeError, match="was stopped after 0 s"):
        run_espeak("phonemize", ["red"], "en-us")


def test_without_the_extra_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(phonemes.importlib.util, "find_spec", lambda name: None if name == "phonemizer" else object())
    assert not phonemes_available()
    with pytest.raises(ImportError, match=r'pip install "onefile-trainer\[phonemes\]"'):
        phonemize(["red"])


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "onefile-trainer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "onefile-trainer"


def fake_phonemizer(monkeypatch, spoken):
    """Stand-ins for the GPL libraries, which must not be loaded into this process: upper case for phonemes."""

    class Backend:
        def __init__(self, voice, **options):
            assert (voice, options["with_stress"]) == ("en-us", True)

        def phonemize(self, texts, strip):
            spoken.extend(texts)
            return [text.upper().replace("'", "") for text in texts]

    wrapper = types.SimpleNamespace(set_library=lambda path: None, set_data_path=lambda path: None)
    paths = {"get_library_path": lambda: "library", "get_data_path": lambda: "data"}
    for name, content in {
        "espeakng_loader": paths,
        "phonemizer": {},
        "phonemizer.backend": {},
        "phonemizer.backend.espeak": {},
        "phonemizer.backend.espeak.espeak": {"EspeakBackend": Backend},
        "phonemizer.backend.espeak.wrapper": {"EspeakWrapper": wrapper},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_child_hands_espeak_the_pieces_between_punctuation(monkeypatch):
    spoken: list[str] = []
    fake_phonemizer(monkeypatch, spoken)
    make = espeak.make_phonemizer("en-us")
    assert make("“a b,” he said: “ ' ” — so…") == "“A B,” HE SAID: “ ” — SO…"
    assert spoken == ["a b", "he said", "'", "so"]


def test_the_child_answers_line_by_line(monkeypatch):
    fake_phonemizer(monkeypatch, [])
    answers = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO('"red"\n"gr\\u00fcn"\n'))
    espeak.main("phonemize", "en-us", answers)
    assert answers.getvalue() == '"RED"\n"GR\\u00dcN"\n'
    with pytest.raises(ValueError, match="task 'sing' is none of phonemize, speak"):
        espeak.main("sing", "en-us", answers)


def test_what_a_library_prints_is_no_answer(tmp_path, monkeypatch):
    """Chatter on the descriptor itself, as a C library's; and a library's module named like one of the trainer's."""
    (tmp_path / "espeakng_loader.py").write_text(
        "import os, loader\nos.write(1, b'chatter\\n')\nprint('more')\nraise OSError(loader.SAID)\n"
    )
    (tmp_path / "loader.py").write_text("SAID = 'the library of this name'\n")  # there is a trainer/data/loader.py
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, espeak.__file__, "speak", "en-us"], input="", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "chatter\n" in done.stderr
    assert "more\n" in done.stderr
    assert "OSError: the library of this name" in done.stderr

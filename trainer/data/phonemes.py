"""Phonemes from espeak-ng, made in a child process and kept on disk.

espeak-ng and phonemizer are under the GPL, version 3: the trainer never imports them. `trainer/data/espeak.py` does, in
a process of its own that lives as long as one call; what it answers is cached, so that a second start needs no child.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.data import cache_folder

logger = logging.getLogger("trainer")

_CHILD = Path(__file__).with_name("espeak.py")
_FORMAT = 1  # part of every key: raise it when espeak.py makes other phonemes of the same text
_QUERY_SIZE = 500  # below SQLite's smallest limit on the parameters of one query, 999
_PATIENCE_S = 120.0  # for the child to start; a sentence takes 0.2 ms


def phonemes_available() -> bool:
    """Tell whether the extra `phonemes` is installed, without importing any of it."""
    return all(importlib.util.find_spec(name) is not None for name in ("phonemizer", "espeakng_loader"))


def phonemize(texts: Iterable[str], voice: str = "en-us") -> list[str]:
    """Turn texts into IPA with stress marks and their punctuation.

    Args:
        texts: texts in words; numbers are better written out before.
        voice: espeak-ng's name of the language.

    Returns:
        One line of IPA for each text. White space is collapsed; a text without sound keeps its punctuation alone.

    Raises:
        ImportError: the extra `phonemes` is not installed.
        RuntimeError: the child process failed; the message has its error output.
    """
    if not phonemes_available():
        raise ImportError('phonemes need espeak-ng: pip install "onefile-trainer[phonemes]"')
    texts = [_sound_text(text) for text in texts]
    cache = PhonemeCache(cache_folder() / f"phonemes-{_FORMAT}.sqlite", _engine(), voice)
    known = cache.read(texts)
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    if missing:
        made = dict(zip(missing, run_espeak("phonemize", missing, voice), strict=True))
        cache.add(made)
        known |= made
    return [known[text] for text in texts]


def _sound_text(text: str) -> str:
    """Without NUL and lone surrogates, which neither SQLite nor espeak-ng takes, on one line."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split())


def _engine() -> str:
    """The versions that determine the phonemes."""
    names = ("phonemizer", "espeakng-loader")
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def run_espeak(task: str, requests: list[Any], voice: str) -> list[Any]:
    """Have one child process answer requests in their order; see `trainer/data/espeak.py`.

    Args:
        task: `phonemize` or `speak`.
        requests: what JSON can hold, one value each.
        voice: espeak-ng's name of the voice.

    Returns:
        The answers, one for each request.

    Raises:
        RuntimeError: the child failed, hung or left requests unanswered.
    """
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    patience_s = _PATIENCE_S + 0.05 * len(requests)
    try:
        child = subprocess.run(
            [sys.executable, str(_CHILD), task, voice],
            input=lines,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=patience_s,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"espeak-ng's process ({task}) was stopped after {patience_s:.0f} s without an end"
        ) from error
    if child.returncode != 0:
        raise RuntimeError(
            f"espeak-ng's process ({task}, voice {voice!r}) ended with status {child.returncode}:\n"
            f"{child.stderr.strip()}"
        )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    if len(answers) != len(requests):
        raise RuntimeError(
            f"espeak-ng's process ({task}) gave {len(answers)} answers to {len(requests)} requests:\n"
            f"{child.stderr.strip()}"
        )
    return answers


class PhonemeCache:
    """Phonemes by text in one SQLite file, which several processes may use at once.

    Every call opens and closes the file, so that nothing is shared over a fork, and is one transaction. A damaged file
    is set aside and begun anew; where no file can be kept, that is said and the phonemes are made at every start.

    Args:
        file: the cache file; its folder is made when needed.
        engine: the versions of what makes the phonemes; entries of others are left alone.
        voice: espeak-ng's name of the language.
    """

    def __init__(self, file: Path, engine: str, voice: str):
        self.file, self.engine, self.voice = Path(file), engine, voice

    def read(self, texts: Iterable[str]) -> dict[str, str]:
        """Look texts up; those that are not known are left out."""
        wanted = list(dict.fromkeys(texts))

        def select(connection: sqlite3.Connection) -> dict[str, str]:
            found: dict[str, str] = {}
            for start in range(0, len(wanted), _QUERY_SIZE):
                part = wanted[start : start + _QUERY_SIZE]
                marks = ", ".join("?" * len(part))
                query = f"SELECT text, ipa FROM phonemes WHERE engine = ? AND voice = ? AND text IN ({marks})"
                found.update(connection.execute(query, [self.engine, self.voice, *part]))
            return found

        return self._use(select) or {}

    def add(self, phonemes: dict[str, str]) -> None:
        """Keep the IPA of texts."""
        rows = [(self.engine, self.voice, text, ipa) for text, ipa in phonemes.items()]
        self._use(
            lambda connection: connection.executemany("INSERT OR REPLACE INTO phonemes VALUES (?, ?, ?, ?)", rows)
        )

    def _use(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run `work` in a transaction; None where the file cannot be used."""
        try:
            try:
                return self._transaction(work)
            except sqlite3.DatabaseError as error:
                # Its subclasses say "locked", "read-only": only the class itself says "damaged" or "no database".
                if type(error) is not sqlite3.DatabaseError:
                    raise
                self._set_aside(error)
                return self._transaction(work)
        except (sqlite3.Error, OSError) as error:
            logger.warning("phonemes cannot be cached in %s (%s): they are made again at each start", self.file, error)
            return None

    def _transaction(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.file, timeout=30.0)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS phonemes (engine TEXT, voice TEXT, text TEXT, ipa TEXT NOT NULL,"
                " PRIMARY KEY (engine, voice, text)) WITHOUT ROWID"
            )
            return work(connection)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        damaged = self.file.with_suffix(".damaged")
        logger.warning("the phoneme cache %s is damaged (%s): moved to %s", self.file, error, damaged.name)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(self.file, damaged)
        # A journal of the old file must not be rolled back into the new one.
        Path(f"{self.file}-journal").unlink(missing_ok=True)

"""The speech data set: samples are checked as a whole when they are read, and items are then cheap and safe.

Shape letters: T text tokens, S audio samples.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.data.cache import AudioCache, AudioProblems, open_cache

logger = logging.getLogger("trainer")

SHOWN_PROBLEMS = 10


class DataError(ValueError):
    """Data that cannot be trained on; the message names the samples and says what to do.

    Attributes:
        problems: every problem found, one line each; the message shows the first ten.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()):
        super().__init__(message)
        self.problems = list(problems)

    @classmethod
    def listing(cls, where: str, problems: Sequence[str], remedy: str) -> "DataError":
        """The error for a list of problems: the first ten, how many there are, and the remedy."""
        shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        rest = f"\n  ... and {more} more" if more > 0 else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls(f"{where}: {count}{shown}{rest}\n{remedy}", problems)

    def __reduce__(self):  # a loader's worker sends its errors to the main process
        return type(self), (self.args[0], self.problems)


@dataclass(frozen=True)
class SpeechSample:
    """One line of a speech data set."""

    name: str  # the id in the metadata, unique in the set
    path: str  # the audio file
    text: str  # what is said
    speaker: str = ""


class TextEncoder(Protocol):
    """What the data set needs of a tokenizer; id 0 is the blank or padding symbol."""

    def encode_all(self, texts: list[str]) -> list[list[int]]: ...


class SpeechDataset(Dataset):
    """Samples as tokens and waveforms; whatever would stop a training later is refused here, all at once.

    The audio is decoded once into one memory-mapped file (see `trainer.data.cache`). The cut-offs drop samples, and
    their counts are logged; a sample that is left and cannot be trained on is an error.

    Args:
        samples: the samples, with names that differ.
        tokenizer: gives each text its token ids (`encode_all`); not kept.
        sample_rate: of the waveforms, in Hz.
        hop_length: audio samples in one spectrogram frame; a clip needs a frame for each token.
        segment_size: audio samples of a training segment; no clip may be shorter.
        min_seconds: shorter clips are dropped.
        max_seconds: longer clips are dropped; None for no limit.
        max_tokens: samples with more tokens are dropped; None for no limit.
        speakers: the id of each speaker's name; None gives every sample id 0.
        cache_dir: where the decoded audio is kept; None for the user's cache folder.

    Attributes:
        samples: the samples that are left, in the order given.
        lengths: their audio samples, int64 [number of samples]: for bucketing.
        token_lengths: their tokens, int64 [number of samples].
        cut_report: how many samples were "too_short", "too_long" and "too_many_tokens"; each counts once.

    Raises:
        DataError: (a ValueError) no samples, a repeated name, an empty text, an unknown speaker, an unusable audio
            file, fewer frames than tokens, a clip shorter than a segment, or nothing left by the cut-offs.
        ValueError: a setting out of its range.
        OSError: the cache cannot be written.
    """

    def __init__(
        self,
        samples: Iterable[SpeechSample],
        tokenizer: TextEncoder,
        *,
        sample_rate: int,
        hop_length: int,
        segment_size: int,
        min_seconds: float = 0.0,
        max_seconds: float | None = None,
        max_tokens: int | None = None,
        speakers: dict[str, int] | None = None,
        cache_dir: Path | None = None,
    ):
        self.sample_rate = sample_rate
        cuts = _Cuts(min_seconds, math.inf if max_seconds is None else max_seconds, max_tokens)
        cuts.check(sample_rate, hop_length, segment_size)
        found = _read_all(list(samples), tokenizer, speakers, sample_rate, cache_dir)
        kept, self.cut_report = cuts.apply(found, sample_rate)
        problems = found.problems + found.impossible(kept, hop_length, segment_size)
        if problems:
            raise DataError.listing(
                f"speech data ({len(found.samples)} samples)",
                problems,
                "Mend these samples or take them out; min_seconds, max_seconds and max_tokens drop samples by length.",
            )
        self._keep(found, kept, speakers)
        _report(self, found, cuts)

    def _keep(self, found: "_Found", kept: np.ndarray, speakers: dict[str, int] | None) -> None:
        assert found.cache is not None  # without one there are problems
        self.samples = [found.samples[i] for i in kept]
        self._cache = found.cache
        position = {path: clip for clip, path in enumerate(found.cache.paths)}
        self._clips = np.array([position[found.paths[i]] for i in kept])
        self.lengths = found.frames[kept]
        self.token_lengths = found.token_counts[kept]
        # Flat arrays: thousands of small lists would be slow to send to a worker.
        self._tokens = np.concatenate([found.tokens[i] for i in kept]).astype(np.int32)
        self._token_ends = np.cumsum(self.token_lengths)
        self._speakers = [0 if speakers is None else speakers[sample.speaker] for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        """One sample: "name", "text", "tokens" (int64 [T]), "waveform" (float32 [S]), "speaker" (int)."""
        sample = self.samples[index]
        end = self._token_ends[index]
        tokens_T = self._tokens[end - self.token_lengths[index] : end].astype(np.int64)
        return {
            "name": sample.name,
            "text": sample.text,
            "tokens": torch.from_numpy(tokens_T),
            "waveform": torch.from_numpy(self._cache.read(self._clips[index])),
            "speaker": self._speakers[index],
        }


@dataclass
class _Found:
    """What is known of each sample before anything is dropped; -1 for a length that could not be found out."""

    samples: list[SpeechSample]
    paths: list[str]
    tokens: list[list[int]]
    token_counts: np.ndarray
    frames: np.ndarray
    cache: AudioCache | None
    problems: list[str]

    def impossible(self, kept: np.ndarray, hop_length: int, segment_size: int) -> list[str]:
        """Samples that no training step could take."""
        problems = []
        for i in kept:
            name, length, tokens = self.samples[i].name, int(self.frames[i]), int(self.token_counts[i])
            if 0 <= length < segment_size:
                problems.append(f"{name}: {length} audio samples, a training segment (segment_size) has {segment_size}")
            elif length >= 0 and tokens > length // hop_length:
                problems.append(f"{name}: {tokens} text tokens for only {length // hop_length} spectrogram frames")
        return problems


def _read_all(
    samples: list[SpeechSample],
    tokenizer: TextEncoder,
    speakers: dict[str, int] | None,
    sample_rate: int,
    cache_dir: Path | None,
) -> _Found:
    if not samples:
        raise DataError("speech data: there are no samples: look at the metadata and at how the set was split")
    problems = _check_names(samples, speakers)
    tokens = tokenizer.encode_all([sample.text for sample in samples])
    for sample, ids in zip(samples, tokens):
        if not any(ids):  # nothing but blanks, which is what an empty text becomes
            why = "the text is empty" if not sample.text.strip() else f"no known symbol in the text {sample.text!r}"
            problems.append(f"{sample.name}: {why}")
    paths = [os.path.abspath(sample.path) for sample in samples]
    try:
        cache = open_cache(paths, sample_rate, cache_dir)
        lengths = dict(zip(cache.paths, cache.clips["frames"].tolist()))
    except AudioProblems as error:
        cache, lengths = None, error.frames
        problems += [
            f"{sample.name}: {error.problems[path]}" for sample, path in zip(samples, paths) if path in error.problems
        ]
    frames = np.array([lengths.get(path, -1) for path in paths], dtype=np.int64)
    counts = np.array([len(ids) for ids in tokens], dtype=np.int64)
    return _Found(samples, paths, tokens, counts, frames, cache, problems)


def _check_names(samples: list[SpeechSample], speakers: dict[str, int] | None) -> list[str]:
    problems = []
    seen = set()
    for sample in samples:
        if sample.name in seen:
            problems.append(f"{sample.name}: the name occurs more than once")
        seen.add(sample.name)
        if speakers is not None and sample.speaker not in speakers:
            problems.append(f"{sample.name}: speaker {sample.speaker!r} is none of the {len(speakers)} speakers")
    return problems


@dataclass(frozen=True)
class _Cuts:
    """The cut-offs by length."""

    min_seconds: float
    max_seconds: float
    max_tokens: int | None

    def check(self, sample_rate: int, hop_length: int, segment_size: int) -> None:
        sizes = {"sample_rate": sample_rate, "hop_length": hop_length, "segment_size": segment_size}
        if self.max_tokens is not None:
            sizes["max_tokens"] = self.max_tokens
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"min_seconds={self.min_seconds} and max_seconds={self.max_seconds}: 0 <= min_seconds <= max_seconds "
                "is needed"
            )

    def apply(self, found: _Found, sample_rate: int) -> tuple[np.ndarray, dict[str, int]]:
        """The positions of the samples that stay, and how many went for which reason."""
        known = found.frames >= 0
        seconds = found.frames / sample_rate
        short = known & (seconds < self.min_seconds)
        long = known & (seconds > self.max_seconds)
        wordy = ~short & ~long & (found.token_counts > (math.inf if self.max_tokens is None else self.max_tokens))
        report = {"too_short": int(short.sum()), "too_long": int(long.sum()), "too_many_tokens": int(wordy.sum())}
        kept = np.flatnonzero(~(short | long | wordy))
        if len(kept) == 0:
            raise DataError(
                f"speech data: the cut-offs drop all {len(found.samples)} samples ({self.describe(report)}): clips "
                f"last {seconds.min():.2f} to {seconds.max():.2f} s and have {found.token_counts.min()} to "
                f"{found.token_counts.max()} tokens; change {self.remedy(report)}"
            )
        return kept, report

    def describe(self, report: dict[str, int]) -> str:
        """What was dropped by the cut-offs that are set."""
        cuts = []
        if self.min_seconds > 0:
            cuts.append(f"{report['too_short']} shorter than {self.min_seconds:g} s")
        if self.max_seconds < math.inf:
            cuts.append(f"{report['too_long']} longer than {self.max_seconds:g} s")
        if self.max_tokens is not None:
            cuts.append(f"{report['too_many_tokens']} with more than {self.max_tokens} tokens")
        return ", ".join(cuts) or "none"

    def remedy(self, report: dict[str, int]) -> str:
        settings = {
            "too_short": f"min_seconds={self.min_seconds:g}",
            "too_long": f"max_seconds={self.max_seconds:g}",
            "too_many_tokens": f"max_tokens={self.max_tokens}",
        }
        return " or ".join(settings[reason] for reason, count in report.items() if count)


def _report(dataset: SpeechDataset, found: _Found, cuts: _Cuts) -> None:
    """One line on what was kept, and a warning for each kind of file that is not taken as it is."""
    logger.info(
        "speech data: %d of %d samples kept, %.2f hours; dropped: %s",
        len(dataset),
        len(found.samples),
        dataset.lengths.sum() / dataset.sample_rate / 3600,
        cuts.describe(dataset.cut_report),
    )
    source = dataset._cache.clips[dataset._clips]
    for what, marked in (
        ("have several channels, mixed down to one", source["channels"] > 1),
        ("go beyond full scale and are clipped to [-1, 1]", source["clipped"] > 0),
    ):
        if marked.any():
            first = dataset.samples[int(np.argmax(marked))]
            logger.warning("%d of %d clips %s (the first: %s)", marked.sum(), len(dataset), what, first.path)
    if (resampled := source["sample_rate"] != dataset.sample_rate).any():
        logger.info("%d of %d clips were resampled to %d Hz", resampled.sum(), len(dataset), dataset.sample_rate)

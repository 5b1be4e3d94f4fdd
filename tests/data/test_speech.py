"""The speech data set: items, cut-offs, and that everything impossible is refused by name before training starts."""

import logging
import pickle
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data import cache as cache_module
from trainer.data.loader import build_loader
from trainer.data.speech import DataError, SpeechDataset, SpeechSample

RATE = 22050
SETTINGS = {"sample_rate": RATE, "hop_length": 256, "segment_size": 8192}


class Letters:
    """A tokenizer by the alphabet, with blanks as the VITS authors put them: n letters become 2n + 1 ids."""

    def encode_all(self, texts):
        letters = [[ord(letter) - 96 for letter in text if "a" <= letter <= "z"] for text in texts]
        return [[0, *(number for letter in ids for number in (letter, 0))] for ids in letters]


def make_wav(path: Path, seconds: float, channels: int = 1, seed: int = 0) -> np.ndarray:
    pcm = np.random.default_rng(seed).integers(-9000, 9000, (round(seconds * RATE), channels)).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm.tobytes())
    return pcm


def make_samples(folder: Path, *clips) -> list[SpeechSample]:
    """Samples s0, s1 ... of (seconds, text[, channels]) each."""
    samples = []
    for number, (seconds, text, *channels) in enumerate(clips):
        make_wav(folder / f"s{number}.wav", seconds, *channels, seed=number)
        samples.append(SpeechSample(f"s{number}", str(folder / f"s{number}.wav"), text))
    return samples


@pytest.fixture
def build(tmp_path):
    def build(samples, **settings):
        return SpeechDataset(samples, Letters(), **{**SETTINGS, "cache_dir": tmp_path / "cache", **settings})

    return build


def test_items(tmp_path, build):
    samples = make_samples(tmp_path, (0.5, "ab"), (0.4, "Hallo du"))
    dataset = build(samples)
    assert len(dataset) == 2
    assert dataset.samples == samples
    assert dataset.lengths.dtype == dataset.token_lengths.dtype == np.int64
    assert dataset.lengths.tolist() == [11025, 8820]
    assert dataset.token_lengths.tolist() == [5, 13]
    item = dataset[0]
    assert list(item) == ["name", "text", "tokens", "waveform", "speaker"]
    assert (item["name"], item["text"], item["speaker"]) == ("s0", "ab", 0)
    assert torch.equal(item["tokens"], torch.tensor([0, 1, 0, 2, 0]))
    expected = torch.from_numpy(make_wav(tmp_path / "again.wav", 0.5)[:, 0] / 32768).float()
    assert item["waveform"].dtype == torch.float32
    assert torch.equal(item["waveform"], expected)
    assert dataset[1]["tokens"].tolist() == [0, 1, 0, 12, 0, 12, 0, 15, 0, 4, 0, 21, 0]
    with pytest.raises(IndexError):
        dataset[2]


def test_the_tokens_of_an_item_are_its_own(tmp_path, build):
    dataset = build(make_samples(tmp_path, (0.5, "ab")))
    dataset[0]["tokens"].zero_()
    dataset[0]["waveform"].zero_()
    assert dataset[0]["tokens"].tolist() == [0, 1, 0, 2, 0]
    assert dataset[0]["waveform"].abs().max() > 0.1


def test_two_samples_of_one_clip(tmp_path, build):
    (sample,) = make_samples(tmp_path, (0.5, "ab"))
    dataset = build([sample, SpeechSample("other", sample.path, "b")])
    assert torch.equal(dataset[0]["waveform"], dataset[1]["waveform"])
    assert dataset[1]["tokens"].tolist() == [0, 2, 0]


def test_speakers(tmp_path, build):
    samples = make_samples(tmp_path, (0.5, "a"), (0.5, "b"))
    samples = [SpeechSample(s.name, s.path, s.text, speaker) for s, speaker in zip(samples, ["anna", "ben"])]
    assert [item["speaker"] for item in build(samples, speakers={"ben": 4, "anna": 2})] == [2, 4]
    with pytest.raises(DataError, match="s1: speaker 'ben' is none of the 1 speakers"):
        build(samples, speakers={"anna": 0})


def test_cut_offs_drop_and_report(tmp_path, build, caplog):
    samples = make_samples(
        tmp_path, (0.1, "a"), (1.5, "a"), (1.0, "abcdefgh"), (0.5, "abc"), (2.0, "abcdefgh"), (0.45, "c")
    )
    with caplog.at_level(logging.INFO, logger="trainer"):
        dataset = build(samples, min_seconds=0.4, max_seconds=1.2, max_tokens=7)
    assert [sample.name for sample in dataset.samples] == ["s3", "s5"]
    assert [dataset[i]["tokens"].tolist() for i in (0, 1)] == [[0, 1, 0, 2, 0, 3, 0], [0, 3, 0]]
    assert torch.equal(dataset[1]["waveform"] * 32768, torch.from_numpy(make_wav(tmp_path / "x", 0.45, seed=5)[:, 0]))
    assert dataset.cut_report == {"too_short": 1, "too_long": 2, "too_many_tokens": 1}
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("speech data")]
    assert lines == [
        "speech data: 2 of 6 samples kept, 0.00 hours; dropped: 1 shorter than 0.4 s, 2 longer than 1.2 s, "
        "1 with more than 7 tokens"
    ]


def test_the_limits_themselves_are_kept(tmp_path, build):
    samples = make_samples(tmp_path, (0.5, "abc"))
    assert len(build(samples, min_seconds=0.5, max_seconds=0.5, max_tokens=7)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_seconds": 9}, r"all 2 samples \(2 shorter than 9 s\): clips last 0.50 to 1.00 s.*change min_seconds=9$"),
        ({"max_seconds": 0.2}, r"2 longer than 0.2 s\): .*change max_seconds=0.2$"),
        ({"max_tokens": 2}, r"2 with more than 2 tokens.* 3 to 5 tokens; change max_tokens=2$"),
        ({"max_tokens": 4, "max_seconds": 0.7}, r"change max_seconds=0.7 or max_tokens=4$"),
    ],
)
def test_dropping_everything_says_which_cut_off_to_change(tmp_path, build, settings, message):
    with pytest.raises(DataError, match=message):
        build(make_samples(tmp_path, (1.0, "a"), (0.5, "ab")), **settings)


def test_no_samples(build):
    with pytest.raises(DataError, match="there are no samples"):
        build([])


SECONDS_44 = (44 * 256 + 255) / RATE  # 44 frames and all but a sample of one more


@pytest.mark.parametrize(
    ("seconds", "text", "message"),
    [
        (0.5, " \t", "s1: the text is empty$"),
        (0.5, "123!", "s1: no known symbol in the text '123!'$"),
        (SECONDS_44, "a" * 22, "s1: 45 text tokens for only 44 spectrogram frames$"),
        (0.3, "a", "s1: 6615 audio samples, a training segment .segment_size. has 8192$"),
    ],
)
def test_impossible_samples_are_refused(tmp_path, build, seconds, text, message):
    samples = make_samples(tmp_path, (0.5, "a" * 21), (seconds, text), (0.5, "b"))
    with pytest.raises(DataError) as caught:
        build(samples)
    (problem,) = caught.value.problems  # s0 has exactly as many tokens as frames
    assert re.search(message, problem)
    assert str(caught.value).startswith(f"speech data (3 samples): 1 problem\n  {problem}\n")
    assert len(build([samples[0], samples[2]])) == 2


def test_a_clip_as_long_as_a_segment_is_enough(tmp_path, build):
    samples = make_samples(tmp_path, (8192 / RATE, "a"), (8191 / RATE, "a"))
    with pytest.raises(DataError) as caught:
        build(samples)
    assert caught.value.problems == ["s1: 8191 audio samples, a training segment (segment_size) has 8192"]


def test_everything_is_reported_at_once(tmp_path, build):
    samples = make_samples(tmp_path, *[(0.5, "a")] * 3, *[(0.5, "")] * 9, (0.5, "a" * 40))
    Path(samples[0].path).write_bytes(Path(samples[0].path).read_bytes()[:-2000])
    Path(samples[1].path).unlink()
    samples.append(samples[2])
    with pytest.raises(DataError) as caught:
        build(samples)
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [
        "s2",
        *(f"s{i}" for i in range(3, 12)),
        "s0",
        "s1",
        "s12",
    ]
    assert problems[0] == "s2: the name occurs more than once"
    assert "s0.wav: truncated wav" in problems[10]
    assert "s1.wav: cannot be read: No such file" in problems[11]
    lines = str(caught.value).split("\n")
    assert lines[0] == "speech data (14 samples): 13 problems"
    assert lines[1:11] == [f"  {problem}" for problem in problems[:10]]
    assert lines[11] == "  ... and 3 more"
    assert lines[12].startswith("Mend these samples or take them out")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.problems) == (str(caught.value), problems)


def test_stereo_is_told_once(tmp_path, build, caplog):
    samples = make_samples(tmp_path, (0.5, "a"), (0.5, "a", 2), (0.5, "a", 2))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        dataset = build(samples)
        list(dataset)
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
            f"2 of 3 clips have several channels, mixed down to one (the first: {samples[1].path})"
        ]
    pcm = make_wav(tmp_path / "again.wav", 0.5, 2, seed=1).astype(np.float64)
    np.testing.assert_array_equal(dataset[1]["waveform"].numpy(), pcm.mean(axis=1) / 32768)


def test_resampling_is_told(tmp_path, build, caplog):
    with caplog.at_level(logging.INFO, logger="trainer"):
        dataset = build(make_samples(tmp_path, (0.5, "a"), (0.8, "b")), sample_rate=16000, segment_size=4096)
    assert dataset.lengths.tolist() == [8000, 12800]
    assert "2 of 2 clips were resampled to 16000 Hz" in caplog.text


def test_a_second_start_reads_no_audio(tmp_path, build, monkeypatch):
    samples = make_samples(tmp_path, (0.5, "a"), (0.6, "b"))
    first = [item["waveform"] for item in build(samples)]

    def never(*_):
        raise AssertionError("an audio file was opened")

    monkeypatch.setattr(cache_module, "inspect_audio", never)
    second = build(samples[::-1], min_seconds=0.1)  # neither order nor cut-offs belong to the cache
    assert torch.equal(second[1]["waveform"], first[0])
    assert torch.equal(second[0]["waveform"], first[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate": 0}, "sample_rate=0"),
        ({"hop_length": 0}, "hop_length=0"),
        ({"segment_size": -1}, "segment_size=-1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"min_seconds": -1.0}, "min_seconds=-1.0 and max_seconds=inf"),
        ({"min_seconds": 3.0, "max_seconds": 2.0}, "min_seconds=3.0 and max_seconds=2.0"),
        ({"min_seconds": float("nan")}, "min_seconds=nan"),
    ],
)
def test_settings_are_checked(tmp_path, build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(make_samples(tmp_path, (0.5, "a")), **settings)


def test_it_is_small_to_send_and_works_there(tmp_path, build):
    dataset = build(make_samples(tmp_path, *[(0.5 + 0.01 * i, "abc") for i in range(20)]))
    expected = [item["waveform"] for item in dataset]
    sent = pickle.dumps(dataset)
    assert len(sent) < 8000  # the waveforms have half a megabyte
    assert all(torch.equal(item["waveform"], wave_S) for item, wave_S in zip(pickle.loads(sent), expected))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_through_the_loader_with_workers(tmp_path, build):
    dataset = build(make_samples(tmp_path, *[(0.5 + 0.1 * i, "abc") for i in range(6)]))
    loader = build_loader(
        dataset, 2, collate_fn=list, seed=0, shuffle=True, lengths=dataset.lengths, num_workers=2
    )  # fmt: skip
    items = [item for batch in loader for item in batch]
    assert sorted(item["name"] for item in items) == ["s0", "s1", "s2", "s3", "s4", "s5"]
    for item in items:
        assert torch.equal(item["waveform"], dataset[int(item["name"][1:])]["waveform"])


def test_real_clips(ljspeech_sample, build):
    rows = [line.split("|") for line in (ljspeech_sample / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    dataset = build(
        SpeechSample(name, str(ljspeech_sample / "wavs" / f"{name}.wav"), text.lower()) for name, _, text in rows
    )
    assert len(dataset) == 24
    for item, length in zip(dataset, dataset.lengths):
        with wave.open(str(ljspeech_sample / "wavs" / f"{item['name']}.wav")) as file:
            pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert length == len(pcm)
        np.testing.assert_array_equal(item["waveform"].numpy(), pcm / 32768)

"""Folders in LJSpeech's layout: reading with every problem named, the fixed split, and finding the folder."""

from pathlib import Path

import pytest

from trainer.data import ljspeech
from trainer.data.ljspeech import find_ljspeech, locate_ljspeech, read_ljspeech, split_ljspeech
from trainer.data.speech import DataError, SpeechSample


def make_folder(folder: Path, metadata: str | bytes, clips: tuple[str, ...] = ("a.wav", "b.wav", "c.wav")) -> Path:
    (folder / "wavs" / "sub").mkdir(parents=True)
    for clip in clips:
        (folder / "wavs" / clip).touch()
    (folder / "metadata.csv").write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    return folder


def rows(folder: Path) -> list[tuple[str, str]]:
    return [(sample.name, sample.text) for sample in read_ljspeech(folder)]


def test_samples(tmp_path):
    make_folder(tmp_path, "b|Dr. B|Doctor B\na|one,  two \nc|it's 5|it's five\n")
    assert read_ljspeech(str(tmp_path)) == [
        SpeechSample("b", str(tmp_path / "wavs" / "b.wav"), "Doctor B"),
        SpeechSample("a", str(tmp_path / "wavs" / "a.wav"), "one,  two"),
        SpeechSample("c", str(tmp_path / "wavs" / "c.wav"), "it's five"),
    ]


@pytest.mark.parametrize(
    "metadata",
    [
        b"a|x|one\nb|x|two\n",
        b"\xef\xbb\xbfa|x|one\nb|x|two\n",  # byte order mark
        b"a|x|one\r\nb|x|two\r\n",
        b"a|x|one\nb|x|two",
        b"\na|x|one\n\n  \nb|x|two\n\n",
        b"a|one\nb|two\n",
        b"a|one|\nb|two| \n",  # a normalized text that is blank
    ],
)
def test_what_is_tolerated(tmp_path, metadata):
    assert rows(make_folder(tmp_path, metadata)) == [("a", "one"), ("b", "two")]


def test_quotes_and_odd_separators_are_text(tmp_path):
    # U+2028, U+0085 and the form feed end a line for str.splitlines, and a quote opens a field for the csv module.
    make_folder(tmp_path, 'a|"one|"one\nb|t\u2028w\x85o\x0c!|“two” "x\n')
    assert rows(tmp_path) == [("a", '"one'), ("b", '“two” "x')]


def test_kinds_of_clips(tmp_path):
    make_folder(tmp_path, "a|x\nb|x\nc|x\nsub/d|x\n", ("a.ogg", "b.flac", "c.wav", "c.flac", "sub/d.wav"))
    assert [Path(sample.path).relative_to(tmp_path / "wavs").as_posix() for sample in read_ljspeech(tmp_path)] == [
        "a.ogg",
        "b.flac",
        "c.wav",
        "sub/d.wav",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"b", "line 2: b: 1 columns, id|text or id|text|normalized text is needed"),
        (b"b\r", "line 2: b: 1 columns, id|text or id|text|normalized text is needed"),
        (b"b|x|y|z", "line 2: b: 4 columns, id|text or id|text|normalized text is needed"),
        (b"|x", "line 2: the id is empty"),
        (b"b| | ", "line 2: b: the text is empty"),
        (b"b|caf\xe9", "line 2: not UTF-8 (byte 6 is 0xe9): b'b|caf\\xe9'; save the file as UTF-8"),
        (b"a|again", "line 2: a: the id is on line 1 already"),
        (b"nowhere|x", "line 2: nowhere: no clip wavs/nowhere{.wav,.flac,.ogg}"),
        (b"nul\0|x", "line 2: nul\0: no clip wavs/nul\0{.wav,.flac,.ogg}"),
        (b"../b|x", "line 2: ../b: the id points outside the folder of the data set"),
        (b"sub/../../b|x", "line 2: sub/../../b: the id points outside the folder of the data set"),
        (b"/etc/b|x", "line 2: /etc/b: the id points outside the folder of the data set"),
        (b"..\\b|x", "line 2: ..\\b: the id points outside the folder of the data set"),
        (b"C:\\b|x", "line 2: C:\\b: the id points outside the folder of the data set"),
    ],
)
def test_bad_lines_are_refused_by_name(tmp_path, line, problem):
    (tmp_path / "b.wav").touch()  # outside wavs/
    make_folder(tmp_path / "set", b"a|one\n" + line + b"\nc|three\n")
    with pytest.raises(DataError) as caught:
        read_ljspeech(tmp_path / "set")
    assert caught.value.problems == [problem]
    assert str(caught.value).startswith(f"{tmp_path / 'set' / 'metadata.csv'}: 1 problem\n  {problem}\n")


def test_all_bad_lines_are_reported_at_once(tmp_path):
    make_folder(tmp_path, "".join(f"n{i}|x\n" for i in range(15)) + "a|fine\n")
    with pytest.raises(DataError, match=r"15 problems\n  line 1: n0: .*(\n.*){9}\n  \.\.\. and 5 more\nMend") as caught:
        read_ljspeech(tmp_path)
    assert len(caught.value.problems) == 15


@pytest.mark.parametrize("metadata", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_metadata(tmp_path, metadata):
    with pytest.raises(DataError, match=r"metadata\.csv: the file is empty"):
        read_ljspeech(make_folder(tmp_path, metadata))


def test_another_layout(tmp_path):
    with pytest.raises(DataError, match=r"gone is not there: .*metadata\.csv and the folder wavs"):
        read_ljspeech(tmp_path / "gone")
    with pytest.raises(DataError, match=r"lacks the file metadata\.csv and the folder wavs"):
        read_ljspeech(tmp_path)
    (tmp_path / "wavs").mkdir()
    with pytest.raises(DataError, match=r"lacks the file metadata\.csv:"):
        read_ljspeech(tmp_path)


def test_tiny_set(tiny_ljspeech):
    assert len(read_ljspeech(tiny_ljspeech)) == 8


def test_real_sample(ljspeech_sample):
    samples = read_ljspeech(ljspeech_sample)
    assert [sample.name for sample in samples] == [f"LJ001-{number:04d}" for number in range(1, 25)]
    assert samples[1].text == "in being comparatively modern."


def named(count: int) -> list[SpeechSample]:
    return [SpeechSample(f"LJ{number // 200:03d}-{number % 200:04d}", "x.wav", "x") for number in range(count)]


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (13_100, (12_500, 100, 500)),  # the authors' sizes
        (20_000, (19_400, 100, 500)),
        (1_310, (1_250, 10, 50)),
        (262, (248, 4, 10)),  # in proportion 2 to evaluate: four, for the mean to say something
        (24, (20, 2, 2)),  # four would be more than a tenth
        (3, (1, 1, 1)),
    ],
)
def test_split_sizes(count, sizes):
    samples = named(count)
    parts = split_ljspeech(samples, seed=0)
    assert tuple(len(part) for part in parts) == sizes
    assert sorted((sample for part in parts for sample in part), key=lambda sample: sample.name) == samples


def test_the_split_depends_on_names_and_seed_alone():
    samples = named(500)
    split = split_ljspeech(samples, seed=1)
    assert split_ljspeech(samples[::-1], seed=1) == split
    assert split_ljspeech(samples, seed=2) != split
    assert all(part == sorted(part, key=lambda sample: sample.name) for part in split)
    # A few more clips move only a few others: the held-out clips of a growing set stay held out.
    held_out = {sample.name for part in split[1:] for sample in part}
    later = {sample.name for part in split_ljspeech(named(505), seed=1)[1:] for sample in part}
    assert len(held_out & later) >= len(held_out) - 3


def test_the_split_is_pinned():
    """Seen once and written down: another split would put clips that a model was trained on into its test."""
    _, evaluation, test = split_ljspeech(named(40), seed=54321)
    assert [sample.name[-2:] for sample in evaluation] == ["01", "08", "18", "26"]
    assert [sample.name[-2:] for sample in test] == ["00", "02", "11", "12"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_to_split(count):
    with pytest.raises(DataError, match=f"{count} samples cannot be split .* 3 or more"):
        split_ljspeech(named(count), seed=0)


def test_repeated_names_are_not_split():
    with pytest.raises(DataError, match="LJ000-0001: the name occurs more than once"):
        split_ljspeech([*named(5), named(2)[1]], seed=0)


def test_a_named_folder_is_taken_or_refused(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "home" / "LJSpeech-1.1", "a|one\n")
    default = make_folder(tmp_path / "default", "a|one\n")
    assert locate_ljspeech(str(folder), default) == folder
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert locate_ljspeech("~/LJSpeech-1.1", default) == folder
    with pytest.raises(DataError, match=rf"{tmp_path}/gone is not there: .*metadata.csv and the folder wavs; set"):
        locate_ljspeech(str(tmp_path / "gone"), default)
    with pytest.raises(DataError, match=rf"home lacks .* \(but {folder} has both\)"):
        locate_ljspeech(str(tmp_path / "home"), default)


def test_the_default_folder_is_taken_refused_or_none(tmp_path, monkeypatch):
    default = tmp_path / "data" / "LJSpeech-1.1"
    assert locate_ljspeech("", default) is None
    default.mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"LJSpeech-1\.1 lacks the file metadata\.csv and the folder wavs.*or remove it"
    ):
        locate_ljspeech("", default)
    make_folder(default, "a|one\n")
    assert locate_ljspeech("", default) == default
    monkeypatch.chdir(tmp_path)
    assert locate_ljspeech("") == Path("data/LJSpeech-1.1")


# --- Finding, or taking the demo set --------------------------------------------------------------------------------


def test_find_takes_the_named_folder(tiny_ljspeech, tmp_path):
    assert find_ljspeech(str(tiny_ljspeech), tmp_path / "none") == (tiny_ljspeech, False)


def test_find_takes_the_default(tiny_ljspeech):
    assert find_ljspeech("", tiny_ljspeech) == (tiny_ljspeech, False)


def test_find_announces_the_demo_set_and_how_to_get_the_real_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ljspeech, "make_demo_set", lambda: tmp_path / "demo")
    assert find_ljspeech("", tmp_path / "LJSpeech-1.1") == (tmp_path / "demo", True)
    said = capsys.readouterr().out
    assert "DEMO SET" in said
    assert "--download" in said
    assert f"{tmp_path / 'LJSpeech-1.1'}, or give --coqpit.dataset_path=DIR" in said


def test_find_downloads_to_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(ljspeech, "download_ljspeech", lambda target: target / "fetched")
    assert find_ljspeech("", tmp_path, download=True) == (tmp_path / "fetched", False)
    with pytest.raises(DataError, match=r"--download goes to .*, not to dataset_path=elsewhere: give one of the two"):
        find_ljspeech("elsewhere", tmp_path, download=True)

"""The download of LJSpeech, from a small server on loopback that breaks off, lies and offers dangerous archives."""

import contextlib
import hashlib
import http.server
import io
import logging
import shutil
import sys
import tarfile
import threading
import wave
from collections import namedtuple

import numpy as np
import pytest

from trainer.data import ljspeech as module
from trainer.data.ljspeech import download_ljspeech, read_ljspeech
from trainer.data.speech import DataError


def wav_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(np.random.default_rng(seed).integers(-9000, 9000, 40_000).astype("<i2").tobytes())
    return buffer.getvalue()


FILES = {
    "LJSpeech-1.1/metadata.csv": b"a|one|one\nb|two|two\n",
    "LJSpeech-1.1/wavs/a.wav": wav_bytes(1),
    "LJSpeech-1.1/wavs/b.wav": wav_bytes(2),
}


def archive(files=FILES, *special: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as tar:
        folder = tarfile.TarInfo("LJSpeech-1.1/wavs")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in special:
            tar.addfile(member)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; `cuts` are the byte counts after which the next answers break off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = archive()
        self.ranges = True
        self.cuts: list[int] = []
        self.status: list[int] = []
        self.asked: list[str | None] = []
        self.headers = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/LJSpeech-1.1.tar.bz2"

    def download(self, target, **settings):
        settings = {"sha256": hashlib.sha256(self.body).hexdigest(), "size": len(self.body), "wait": 0.0, **settings}
        return download_ljspeech(target, self.url, **settings)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        span = self.headers["Range"]
        server.asked.append(span)
        if server.status:
            self.send_error(server.status.pop(0))
            return
        first = int(span.removeprefix("bytes=").removesuffix("-")) if span and server.ranges else 0
        if first >= len(server.body):
            self.send_error(416)
            return
        self.send_response(206 if span and server.ranges else 200)
        if span and server.ranges:
            self.send_header("Content-Range", f"bytes {first}-{len(server.body) - 1}/{len(server.body)}")
        if server.headers:
            self.send_header("Content-Length", str(len(server.body) - first))
        self.end_headers()
        data = server.body[first:]
        self.wfile.write(data[: server.cuts.pop(0)] if server.cuts else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {name.removeprefix("LJSpeech-1.1/"): data for name, data in FILES.items()}


def test_download(server, tmp_path, capsys):
    target = tmp_path / "data" / "lj"
    assert server.download(str(target)) == target
    assert contents(target) == EXPECTED
    assert [sample.name for sample in read_ljspeech(target)] == ["a", "b"]
    assert [path.name for path in target.parent.iterdir()] == ["lj"]  # neither the archive nor temporary files
    assert server.asked == [None]
    size = f"{len(server.body) / 1e6:.0f} MB"
    assert f"downloading {server.url}: 100 % of {size}\n" in capsys.readouterr().err


def never(*_, **__):
    raise AssertionError("this was not to be called")


def test_what_is_there_is_kept(server, tmp_path, caplog, monkeypatch):
    target = server.download(tmp_path / "lj")
    (target / "metadata.csv").write_text("a|mine\n")
    monkeypatch.setattr(module, "exclusive", never)  # no lock, so nothing is written to the folder
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert server.download(target) == target
    assert server.asked == [None]
    assert (target / "metadata.csv").read_text() == "a|mine\n"
    assert f"{target} is there already" in caplog.text


def test_something_else_is_not_overwritten(server, tmp_path):
    (tmp_path / "lj").mkdir()
    (tmp_path / "lj" / "thesis.txt").touch()
    with pytest.raises(DataError, match=r"lj lacks .*nothing is downloaded over it"):
        server.download(tmp_path / "lj")
    assert server.asked == []


def test_an_empty_folder_is_filled(server, tmp_path):
    (tmp_path / "lj").mkdir()
    assert contents(server.download(tmp_path / "lj")) == EXPECTED


def test_a_cut_connection_is_resumed(server, tmp_path, caplog):
    server.cuts = [30_000, 10_000]
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == [None, "bytes=30000-", "bytes=40000-"]
    assert "attempt 2 of 8" in caplog.text
    assert "attempt 3 of 8" in caplog.text


def test_a_broken_download_goes_on_in_the_next_call(server, tmp_path):
    server.cuts = [30_000, 0]
    with pytest.raises(
        ConnectionError, match=rf"gave up after 2 attempts with 30000 of {len(server.body)} bytes in .*part"
    ):
        server.download(tmp_path / "lj", attempts=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lj.tar.bz2.part"]
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == [None, "bytes=30000-", "bytes=30000-"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    server.cuts = [50_000]
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == [None, "bytes=50000-"]


def test_a_whole_archive_is_not_asked_for_again(server, tmp_path):
    (tmp_path / "lj.tar.bz2.part").write_bytes(server.body)
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == []


def test_an_archive_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / "lj.tar.bz2.part").write_bytes(server.body + b"more")
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == [None]


def test_server_errors_are_retried(server, tmp_path):
    server.status = [503, 416, 429]
    (tmp_path / "lj.tar.bz2.part").write_bytes(server.body[:1000])
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == ["bytes=1000-", "bytes=1000-", None, None]


def test_a_missing_page_is_not_retried(server, tmp_path):
    server.status = [404]
    with pytest.raises(ConnectionError, match="the server answers 404 Not Found: unpack the archive by hand"):
        server.download(tmp_path / "lj")
    assert server.asked == [None]


def test_no_server(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"refused.*gave up after 3 attempts with 0 of"):
        server.download(tmp_path / "lj", attempts=3)


def test_the_waiting_time_doubles_to_a_minute(server, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    server.status = [500] * 8
    with pytest.raises(ConnectionError, match="500"):
        server.download(tmp_path / "lj", wait=4.0)
    assert waited == [4, 8, 16, 32, 60, 60, 60]


def test_a_wrong_checksum_names_both_and_starts_clean(server, tmp_path):
    wrong = "ab" * 32
    right = hashlib.sha256(server.body).hexdigest()
    with pytest.raises(DataError, match=rf"SHA-256 of what came is {right}, expected is {wrong}"):
        server.download(tmp_path / "lj", sha256=wrong.upper())
    assert list(tmp_path.iterdir()) == []
    assert contents(server.download(tmp_path / "lj", sha256=right.upper())) == EXPECTED


@pytest.mark.parametrize("ranges", [True, False])
def test_another_size_is_refused_before_it_is_read(server, tmp_path, ranges):
    server.ranges = ranges
    (tmp_path / "lj.tar.bz2.part").write_bytes(server.body[:10])
    with pytest.raises(DataError, match=rf"file has {len(server.body)} bytes, {len(server.body) + 5} are expected"):
        server.download(tmp_path / "lj", size=len(server.body) + 5)


def test_an_endless_answer_is_stopped(server, tmp_path):
    server.headers = False
    with pytest.raises(DataError, match="sends more than the 1000 bytes"):
        server.download(tmp_path / "lj", size=1000)
    assert (tmp_path / "lj.tar.bz2.part").stat().st_size <= 1000


def test_other_addresses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="url=file:///etc/passwd: an http or https address"):
        download_ljspeech(tmp_path / "lj", "file:///etc/passwd")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../evil.txt"), "../evil.txt points outside the folder"),
        (member("/tmp/evil.txt"), "/tmp/evil.txt points outside the folder"),
        (member("LJSpeech-1.1/../../evil.txt"), "LJSpeech-1.1/../../evil.txt points outside the folder"),
        (member("LJSpeech-1.1/x", tarfile.SYMTYPE, "/etc"), "LJSpeech-1.1/x is a link, only files and folders"),
        (member("LJSpeech-1.1/x", tarfile.LNKTYPE, "../y"), "LJSpeech-1.1/x is a link, only files and folders"),
        (member("LJSpeech-1.1/x", tarfile.FIFOTYPE), "LJSpeech-1.1/x is a device, only files and folders"),
        (member("other/x"), "2 files or folders at its top, one folder is expected: ['LJSpeech-1.1', 'other']"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_dangerous_archives_are_refused_before_anything_is_written(server, tmp_path, monkeypatch, bad, message):
    server.body = archive(FILES, bad)
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", never)
    folder = tmp_path / "inner"
    with pytest.raises(DataError) as caught:
        server.download(folder / "lj")
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "lj.tar.bz2.part"]


def test_an_archive_of_something_else(server, tmp_path):
    server.body = archive({"LJSpeech-1.1/readme.txt": b"hello"})
    with pytest.raises(DataError, match=r"lacks the file metadata\.csv.*holds something else"):
        server.download(tmp_path / "lj")
    assert [path.name for path in tmp_path.iterdir()] == ["lj.tar.bz2.part"]


def test_a_file_that_is_no_archive(server, tmp_path):
    server.body = b"<html>please log in</html>"
    with pytest.raises(DataError, match=r"not a readable tar\.bz2"):
        server.download(tmp_path / "lj")
    assert not (tmp_path / "lj").exists()


def test_a_full_disk_is_told_before_the_download(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"0\.00 GB are needed in .*0\.00 GB are free: make room"):
        server.download(tmp_path / "lj")
    assert server.asked == []


def test_a_disk_that_fills_up_is_no_reason_to_retry(server, tmp_path, monkeypatch):
    calls = []

    def full(*_):
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_receive", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        server.download(tmp_path / "lj")
    assert calls == [1]


def test_a_break_while_unpacking_leaves_no_folder(server, tmp_path, monkeypatch):
    def copy(source, out, length):
        out.write(source.read(100))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", copy)
        with pytest.raises(OSError, match="No space left on device"):
            server.download(tmp_path / "lj")
    assert [path.name for path in tmp_path.iterdir()] == ["lj.tar.bz2.part"]
    (tmp_path / ".lj-killed.tmp").mkdir()  # of a process that was killed
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == [None]  # the archive was kept
    assert [path.name for path in tmp_path.iterdir()] == ["lj"]


def test_two_at_once(server, tmp_path):
    threads = [threading.Thread(target=server.download, args=(tmp_path / "lj",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "lj") == EXPECTED
    assert server.asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["lj"]


def test_another_process_was_faster(server, tmp_path, monkeypatch):
    made = server.download(tmp_path / "made")

    @contextlib.contextmanager
    def exclusive(part):  # while we waited for the lock
        part.touch()
        made.rename(tmp_path / "lj")
        yield True

    monkeypatch.setattr(module, "exclusive", exclusive)
    assert contents(server.download(tmp_path / "lj")) == EXPECTED
    assert server.asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["lj"]


def test_plain_progress_is_a_line_every_five_percent(capsys):
    with module._progress("downloading", 1_000_000) as show:
        for done in range(0, 1_000_001, 1000):
            show(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"downloading: {percent} % of 1 MB" for percent in range(0, 101, 5)]


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with module._progress("downloading", 1_000_000) as show:
        show(250_000)
        show(1_000_000)
    assert "downloading" in terminal.getvalue()
    assert "1.0/1.0 MB" in terminal.getvalue()

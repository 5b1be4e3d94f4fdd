"""Files that are there whole or not at all: on a disk, in memory and on S3, through all that can fail."""

import asyncio
import errno
import functools
import logging
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from trainer import storage
from trainer.storage import (
    StorageError,
    as_path,
    exists,
    is_local,
    list_files,
    open_file,
    remove,
    remove_leftovers,
    write_file,
)

MB = 2**20


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    """A folder of each kind, of this test's own."""
    if request.param == "local":
        return tmp_path
    if request.param == "memory":
        return as_path(f"memory://{uuid.uuid4().hex}/run")
    return request.getfixturevalue("s3")


@pytest.fixture
def s3(s3_server):
    return as_path(f"{s3_server.url}/{uuid.uuid4().hex}/run")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr(storage, "WAITS", (0, 0))


@pytest.fixture
def told(caplog):
    """What the trainer's logger says."""
    caplog.set_level(logging.WARNING, logger="trainer")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "trainer"]


def put(path, content):
    write_file(path, lambda file: file.write(content))


def content_of(path):
    with open_file(path) as file:
        return file.read()


def names_in(folder):
    return [entry.path.name for entry in list_files(folder)]


def raising(error):
    """A writer that fails in the middle."""

    def write(file):
        file.write(b"half")
        file.flush()
        raise error

    return write


def failing(monkeypatch, path, method, errors):
    """Let a store's method raise each of the errors in turn, then work; returns the arguments of all calls."""
    works, left, calls = getattr(path.fs, method), list(errors), []

    def call(*args, **options):
        calls.append(args)
        if left:
            raise left.pop(0)
        return works(*args, **options)

    monkeypatch.setattr(path.fs, method, call)
    return calls


class TestAsPath:
    @pytest.mark.parametrize("path", ["/a/b.pth", "a/b.pth", "~/b.pth", ".", "C:/b.pth", Path("/a/b.pth")])
    def test_what_is_no_url_becomes_a_plain_path(self, path):
        assert type(as_path(path)) is type(Path())
        assert as_path(path) == Path(path)
        assert is_local(as_path(path))

    @pytest.mark.parametrize("protocol", ["file", "local"])
    def test_so_does_a_url_of_a_file(self, protocol):
        assert type(as_path(f"{protocol}:///a/b.pth")) is type(Path())
        assert as_path(f"{protocol}:///a/b.pth") == Path("/a/b.pth")

    @pytest.mark.parametrize("scheme", ["memory", "s3", "gs"])
    def test_a_url_has_the_methods_of_pathlib(self, scheme):
        path = as_path(f"{scheme}://bucket/run/checkpoint_1.pth")
        assert (path.name, path.suffix, path.stem) == ("checkpoint_1.pth", ".pth", "checkpoint_1")
        assert str(path) == f"{scheme}://bucket/run/checkpoint_1.pth"
        assert str(path.parent / "best_model.pth") == str(path.with_name("best_model.pth"))
        assert not is_local(path)
        assert as_path(path) is path

    def test_a_url_survives_pickling(self):
        path = as_path("memory://a/b.pth")
        again = pickle.loads(pickle.dumps(path))
        assert again == path
        assert again.storage_options == path.storage_options

    def test_fsspecs_ssh_client_gets_no_options_that_it_does_not_know(self):
        assert as_path("sftp://host/a.pth").storage_options == {"host": "host"}


class TestEverywhere:
    def test_what_is_written_is_read(self, folder):
        put(folder / "a.pth", b"one")
        assert content_of(folder / "a.pth") == b"one"
        assert names_in(folder) == ["a.pth"]

    def test_a_string_will_do(self, folder):
        put(str(folder / "a.pth"), b"one")
        assert content_of(str(folder / "a.pth")) == b"one"
        assert exists(str(folder / "a.pth"))
        assert names_in(str(folder)) == ["a.pth"]

    def test_a_file_is_replaced(self, folder):
        put(folder / "a.pth", b"a long first version")
        put(folder / "a.pth", b"short")
        assert content_of(folder / "a.pth") == b"short"

    def test_an_empty_file(self, folder):
        put(folder / "a.pth", b"")
        assert exists(folder / "a.pth")
        assert content_of(folder / "a.pth") == b""

    @pytest.mark.parametrize("error", [ValueError("boo"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
    @pytest.mark.parametrize("before", [None, b"before"])
    def test_a_writer_that_fails_leaves_what_was_there(self, folder, error, before):
        if before is not None:
            put(folder / "a.pth", before)
        with pytest.raises(type(error)) as caught:
            write_file(folder / "a.pth", raising(error))
        assert caught.value is error
        assert names_in(folder) == ([] if before is None else ["a.pth"])
        if before is not None:
            assert content_of(folder / "a.pth") == before

    def test_fsspec_alone_would_publish_it(self, folder):
        """What the test above would see if write_file did as fsspec.open does."""
        path = folder / "a.pth"
        with pytest.raises(ValueError, match="boo"), fsspec.open(str(path), "wb") as file:
            raising(ValueError("boo"))(file)
        assert content_of(path) == b"half"

    def test_a_missing_file(self, folder):
        assert not exists(folder / "a.pth")
        with pytest.raises(FileNotFoundError, match=r"a\.pth"):
            open_file(folder / "a.pth")
        remove(folder / "a.pth")

    def test_a_file_is_deleted(self, folder):
        put(folder / "a.pth", b"one")
        put(folder / "b.pth", b"two")
        remove(folder / "a.pth")
        assert names_in(folder) == ["b.pth"]
        assert (exists(folder / "a.pth"), exists(folder / "b.pth")) == (False, True)

    def test_a_listing_has_sizes_and_times_and_no_subfolders(self, folder):
        start = time.time()
        if is_local(folder):
            (folder / "wavs").mkdir()
        put(folder / "wavs" / "c.wav", b"123")
        put(folder / "b.pth", b"12345")
        put(folder / "a.pth", b"")
        entries = list_files(folder)
        assert [(entry.path, entry.size) for entry in entries] == [(folder / "a.pth", 0), (folder / "b.pth", 5)]
        for entry in entries:
            assert start - 2 < entry.modified < time.time() + 2  # S3 has whole seconds

    def test_a_folder_that_is_not_there_is_empty(self, folder):
        assert list_files(folder / "none") == []
        assert remove_leftovers(folder / "none") == []

    def test_leftovers_are_only_what_write_file_leaves(self, folder):
        others = [".hidden", "a.tmp", ".a.pth.tmp", "a.pth.12.tmp", ".a.pth.12.tmp.pth", ".a.12x.tmp", "a.pth"]
        for name in others:
            put(folder / name, b"1")
        assert remove_leftovers(folder) == []
        assert names_in(folder) == sorted(others)


class TestDisk:
    def test_leftovers_are_deleted(self, tmp_path):
        code = (
            "import os, signal, sys; from trainer.storage import write_file\n"
            "write_file(sys.argv[1], lambda file: os.kill(os.getpid(), signal.SIGKILL))"
        )
        put(tmp_path / "a.pth", b"before")
        killed = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.pth"])
        assert killed.wait() == -9
        name = f".a.pth.{killed.pid}.tmp"
        assert names_in(tmp_path) == [name, "a.pth"]
        assert remove_leftovers(tmp_path) == [name]
        assert names_in(tmp_path) == ["a.pth"]
        assert content_of(tmp_path / "a.pth") == b"before"

    def test_it_is_synced_then_renamed_then_the_folder_is_synced(self, tmp_path, monkeypatch):
        done = []
        fsync, replace = os.fsync, os.replace

        def spy_fsync(descriptor):
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            done.append((f"fsync {kind}", os.fstat(descriptor).st_size if kind == "file" else None))
            fsync(descriptor)

        def spy_replace(source, target):
            done.append(("replace", Path(target).name))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", spy_fsync)
        monkeypatch.setattr(os, "replace", spy_replace)
        put(tmp_path / "a.pth", b"12345")
        assert done == [("fsync file", 5), ("replace", "a.pth"), ("fsync folder", None)]

    def test_tmpdir_is_not_used(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
        monkeypatch.setattr("tempfile.tempdir", None)
        seen = []

        def write(file):
            file.write(b"1")
            seen.extend(path.name for path in tmp_path.iterdir())

        write_file(tmp_path / "a.pth", write)
        assert seen == [f".a.pth.{os.getpid()}.tmp"]

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_the_mode_is_the_umasks(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            put(tmp_path / "a.pth", b"1")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.pth").stat().st_mode) == 0o666 & ~umask

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize(
        ("number", "remedy"),
        [(errno.ENOSPC, "free some space in "), (errno.EACCES, "make {} accessible"), (errno.EIO, "see that {} can")],
        ids=["full", "denied", "broken"],
    )
    def test_errors_say_what_to_do(self, tmp_path, monkeypatch, call, number, remedy):
        put(tmp_path / "a.pth", b"before")

        def fail(*_):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            told = f"{tmp_path / 'a.pth'}: could not be written ({os.strerror(number)}): {remedy.format(tmp_path)}"
            with pytest.raises(OSError, match=re.escape(told)) as caught:
                put(tmp_path / "a.pth", b"after")
        assert caught.value.errno == number
        assert isinstance(caught.value, PermissionError) == (number == errno.EACCES)
        assert content_of(tmp_path / "a.pth") == b"before"
        assert names_in(tmp_path) == ["a.pth"]

    def test_a_full_disk(self, tmp_path):
        """A limit on file sizes fails in the middle of a write as a full disk does, at no other moment."""
        put(tmp_path / "a.pth", b"before")
        code = (
            "import resource, sys; from trainer.storage import write_file\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MB}, {resource.RLIM_INFINITY}))\n"
            f"write_file(sys.argv[1], lambda file: [file.write(bytes({MB})) for _ in range(3)])"
        )
        child = subprocess.run([sys.executable, "-c", code, tmp_path / "a.pth"], capture_output=True, text=True)
        assert child.returncode == 1
        assert "File too large): raise the limit of file sizes" in child.stderr.splitlines()[-1]
        assert content_of(tmp_path / "a.pth") == b"before"
        assert names_in(tmp_path) == ["a.pth"]

    def test_a_full_device(self, tmp_path):
        """The kernel's own ENOSPC, when Python's buffer is flushed."""
        (tmp_path / f".a.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device\): free some space in ") as caught:
            put(tmp_path / "a.pth", b"1")
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_missing_or_a_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"see that {tmp_path}/none exists"):
            put(tmp_path / "none" / "a.pth", b"1")
        put(tmp_path / "file", b"1")
        with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file must be a folder"):
            put(tmp_path / "file" / "a.pth", b"1")

    def test_a_temporary_file_that_cannot_be_deleted_hides_no_error(self, tmp_path, monkeypatch):
        def fail(self, missing_ok):
            raise PermissionError("unlink")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fail)
            with pytest.raises(ValueError, match="boo"):
                write_file(tmp_path / "a.pth", raising(ValueError("boo")))
        assert remove_leftovers(tmp_path) == [f".a.pth.{os.getpid()}.tmp"]

    @pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
    def test_a_file_system_that_cannot_sync_folders(self, tmp_path, monkeypatch, number, fails):
        fsync = os.fsync

        def of_files_only(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", of_files_only)
        if fails:
            with pytest.raises(OSError, match="Input/output error"):
                put(tmp_path / "a.pth", b"1")
        else:
            put(tmp_path / "a.pth", b"1")
        assert content_of(tmp_path / "a.pth") == b"1"

    def test_disks_are_not_tried_again(self, tmp_path, monkeypatch, told):
        calls = []

        def fail(descriptor):
            calls.append(descriptor)
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="broken"):
            put(tmp_path / "a.pth", b"1")
        assert len(calls) == 1
        assert told() == []


class LibraryError(Exception):
    """An error of a store's library, none of the system's."""


class TestStoresThatFail:
    @pytest.fixture
    def path(self):
        return as_path(f"memory://{uuid.uuid4().hex}/run/a.pth")

    @pytest.mark.parametrize("error", [OSError("slow down"), TimeoutError("no answer"), LibraryError("reset")])
    def test_twice_then_it_works(self, path, monkeypatch, told, error):
        calls, written = failing(monkeypatch, path, "pipe_file", [error, error]), []
        monkeypatch.setattr(time, "sleep", written.append)
        monkeypatch.setattr(storage, "WAITS", (1.0, 4.0))
        put(path, b"content")
        assert content_of(path) == b"content"
        assert len(calls) == 3
        assert written == [1, 4]
        assert told() == [
            f"{path}: could not be written ({error}); trying again in 1 s, attempt 2 of 3",
            f"{path}: could not be written ({error}); trying again in 4 s, attempt 3 of 3",
        ]

    @pytest.mark.parametrize(
        ("error", "kind"),
        [(OSError(errno.EBUSY, "slow down"), OSError), (OSError("slow down"), StorageError)]
        + [(LibraryError("slow down"), StorageError)],
    )
    def test_always(self, path, monkeypatch, told, error, kind):
        put(path, b"before")
        calls = failing(monkeypatch, path, "pipe_file", [error] * 4)
        message = f"{path}: could not be written (slow down): see that {path.parent} can be reached"
        with pytest.raises(OSError, match=re.escape(message)) as caught:
            put(path, b"after")
        assert type(caught.value) is kind
        assert caught.value.errno == getattr(error, "errno", None)
        assert caught.value.__cause__ is error
        assert len(calls) == 3
        assert len(told()) == 2
        assert content_of(path) == b"before"

    @pytest.mark.parametrize(
        ("error", "remedy"),
        [
            (PermissionError("Access Denied"), "make {} accessible for this user"),
            (FileNotFoundError("The specified bucket does not exist"), "see that {} exists"),
        ],
        ids=["denied", "no bucket"],
    )
    def test_what_does_not_pass_is_not_tried_again(self, path, monkeypatch, told, error, remedy):
        calls = failing(monkeypatch, path, "pipe_file", [error])
        with pytest.raises(type(error)) as caught:
            put(path, b"1")
        assert f"{path}: could not be written ({error}): {remedy.format(path.parent)}" in str(caught.value)
        assert len(calls) == 1
        assert told() == []

    def test_a_mistake_is_not_tried_again(self, path, monkeypatch, told):
        error = TypeError("pipe_file() got an unexpected argument")
        failing(monkeypatch, path, "pipe_file", [error])
        with pytest.raises(TypeError) as caught:
            put(path, b"1")
        assert caught.value is error
        assert told() == []

    def test_an_error_of_the_writer_is_not_tried_again(self, path, told):
        error = OSError(errno.EIO, "the data set's disk")
        with pytest.raises(OSError, match="the data set's disk") as caught:
            write_file(path, raising(error))
        assert caught.value is error
        assert told() == []

    def test_a_store_that_holds_less_than_was_written(self, path, monkeypatch, told):
        works, cut = path.fs.pipe_file, [True, True]

        def pipe_file(name, content):
            works(name, content[:-1] if cut and cut.pop() else content)

        monkeypatch.setattr(path.fs, "pipe_file", pipe_file)
        put(path, b"content")
        assert content_of(path) == b"content"
        assert "the store holds 6 bytes of 7" in told()[0]
        cut.extend([True] * 3)
        with pytest.raises(StorageError, match=r"the store holds 6 bytes of 7"):
            put(path, b"content")

    @pytest.mark.parametrize(
        ("method", "call", "expected", "verb"),
        [
            ("cat_file", content_of, b"1", "read"),
            ("info", exists, True, "looked for"),
            ("ls", lambda path: names_in(path.parent), ["a.pth"], "listed"),
            ("rm_file", remove, None, "deleted"),
        ],
    )
    def test_reading_listing_and_deleting(self, path, monkeypatch, told, method, call, expected, verb):
        put(path, b"1")
        with monkeypatch.context() as patch:
            failing(patch, path, method, [LibraryError("reset")] * 2)
            assert call(path) == expected
        assert [f"could not be {verb} (reset); trying again" in line for line in told()] == [True, True]
        put(path, b"1")
        failing(monkeypatch, path, method, [LibraryError("reset")] * 3)
        with pytest.raises(StorageError, match=rf"could not be {verb} \(reset\): see that .* can be reached"):
            call(path)


class TestS3:
    """What only S3 has: uploads in parts, caches of listings, and codes for errors."""

    @pytest.fixture
    def path(self, s3):
        return s3 / "a.pth"

    @pytest.fixture
    def in_parts(self, path, monkeypatch):
        """Upload in parts of 5 MB, the least that S3 takes, and not of 50."""
        monkeypatch.setattr(path.fs, "pipe_file", functools.partial(path.fs.pipe_file, chunksize=5 * MB))

    @staticmethod
    def uploads(s3_server, path):
        found = s3_server.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        return [upload["Key"] for upload in found if f"bucket/{upload['Key']}" == path.path]

    @staticmethod
    def failing_requests(monkeypatch, path, request, errors):
        """As failing, for one kind of request; of parts the second, when the first has arrived."""
        works, left, arrived = path.fs._call_s3, list(errors), []

        async def call(method, *args, **options):
            if method == request and options.get("PartNumber") in (None, 2) and left:
                while method == "upload_part" and not arrived:
                    await asyncio.sleep(0.01)
                arrived.clear()
                raise left.pop(0)
            result = await works(method, *args, **options)
            if method == "upload_part":
                arrived.append(options["PartNumber"])
            return result

        monkeypatch.setattr(path.fs, "_call_s3", call)

    def test_in_parts(self, path, in_parts, s3_server):
        content = os.urandom(10 * MB)
        put(path, content)
        assert content_of(path) == content
        head = s3_server.client.head_object(Bucket="bucket", Key=path.path.removeprefix("bucket/"))
        assert head["ETag"].endswith('-2"')  # two parts
        assert self.uploads(s3_server, path) == []

    @pytest.mark.parametrize("request_name", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
    def test_an_upload_in_parts_that_fails_is_aborted(self, path, in_parts, s3_server, monkeypatch, request_name):
        monkeypatch.setattr(storage, "WAITS", ())
        for before in (None, b"before"):
            if before is not None:
                put(path, before)
            with monkeypatch.context() as patch:
                self.failing_requests(patch, path, request_name, [LibraryError("reset")])
                with pytest.raises(StorageError, match="reset"):
                    put(path, bytes(10 * MB))
            assert self.uploads(s3_server, path) == []
            assert exists(path) == (before is not None)
        assert content_of(path) == before

    def test_twice_then_it_works(self, path, in_parts, s3_server, monkeypatch, told):
        from botocore.exceptions import EndpointConnectionError

        content, error = os.urandom(10 * MB), EndpointConnectionError(endpoint_url="http://store")
        self.failing_requests(monkeypatch, path, "upload_part", [error, OSError(errno.EBUSY, "slow down")])
        put(path, content)
        assert content_of(path) == content
        assert self.uploads(s3_server, path) == []
        assert len(told()) == 2
        assert 'Could not connect to the endpoint URL: "http://store"' in told()[0]

    def test_a_bucket_that_does_not_exist(self, s3_server, told):
        with pytest.raises(FileNotFoundError, match=r"s3://none/a\.pth: could not be written .* see that s3://none"):
            put("s3://none/a.pth", b"1")
        assert told() == []

    def test_what_another_process_writes_is_seen_at_once(self, path, s3_server):
        key = path.path.removeprefix("bucket/")
        put(path.with_name("first"), b"1")
        assert names_in(path.parent) == ["first"]
        assert not exists(path)
        s3_server.client.put_object(Bucket="bucket", Key=key, Body=b"12")
        assert exists(path)
        assert names_in(path.parent) == ["a.pth", "first"]
        s3_server.client.put_object(Bucket="bucket", Key=key, Body=b"123")
        assert [entry.size for entry in list_files(path.parent)] == [3, 1]
        s3_server.client.delete_object(Bucket="bucket", Key=key)
        assert not exists(path)
        assert names_in(path.parent) == ["first"]
        # and so by pathlib's own methods
        s3_server.client.put_object(Bucket="bucket", Key=key, Body=b"12")
        assert sorted(found.name for found in path.parent.iterdir()) == ["a.pth", "first"]
        assert path.is_file()

    def test_unfinished_uploads_of_the_folder_are_aborted(self, path, s3_server):
        def begin(key):
            s3_server.client.create_multipart_upload(Bucket="bucket", Key=key.removeprefix("bucket/"))

        other = path.parent.with_name("run-2") / "a.pth"
        begin(path.path)
        begin(other.path)
        put(path, b"1")
        assert remove_leftovers(path.parent) == ["a.pth"]
        assert self.uploads(s3_server, path) == []
        assert self.uploads(s3_server, other) == [other.path.removeprefix("bucket/")]
        assert content_of(path) == b"1"
        assert remove_leftovers(path.parent) == []

    def test_who_may_not_list_uploads_is_told(self, path, monkeypatch, told):
        failing(monkeypatch, path, "call_s3", [PermissionError("Access Denied")])
        assert remove_leftovers(path.parent) == []
        assert "could not be searched for unfinished uploads (Access Denied)" in told()[0]

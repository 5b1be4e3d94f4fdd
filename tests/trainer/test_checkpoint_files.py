"""Checkpoint files: written whole or not at all, read without running anything in them."""

import io
import os
import pickle
import stat
import zipfile

import fsspec
import pytest
import torch

from trainer.checkpoint import (
    FORMAT_VERSION,
    exist_in,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_first,
    remove_old_checkpoints,
    save_checkpoint,
    write_file,
)


@pytest.fixture
def umask():
    """Sets the process's umask; the old one comes back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


class TestWriteFile:
    def test_content(self, tmp_path):
        path = tmp_path / "a.bin"
        for content in (b"first", b"second, longer"):
            write_file(path, lambda file, content=content: file.write(content))
            assert path.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_a_failing_writer_leaves_the_old_file_and_nothing_else(self, tmp_path, error):
        path = tmp_path / "a.bin"
        path.write_bytes(b"old")

        def write(file):
            file.write(b"half")
            raise error

        with pytest.raises(type(error)):
            write_file(path, write)
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]

    def test_nothing_is_there_before_it_is_whole(self, tmp_path):
        path, seen = tmp_path / "a.bin", []

        def write(file):
            file.write(b"x" * 100_000)
            file.flush()
            seen.append(path.exists())

        write_file(path, write)
        assert (seen, path.stat().st_size) == ([False], 100_000)

    def test_file_is_synced_before_the_rename_and_its_folder_after(self, tmp_path, monkeypatch):
        events = []
        fsync, replace = os.fsync, os.replace

        def spy(descriptor):
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size
            events.append(kind)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", spy)
        monkeypatch.setattr(os, "replace", lambda *args: (events.append("rename"), replace(*args)))
        write_file(tmp_path / "a.bin", lambda file: file.write(b"12345"))
        assert events == [5, "rename", "folder"]

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_permissions_are_those_of_any_new_file(self, tmp_path, umask, mask, mode):
        umask(mask)
        write_file(tmp_path / "a.bin", lambda file: file.write(b"x"))
        assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == mode


STATE = {"model": {"w": torch.arange(1000.0)}, "step": 7, "nested": {"a": [1, (2.5, None, "x")]}}


def assert_is_state(loaded: dict) -> None:
    """Bitwise, format aside."""
    assert torch.equal(loaded["model"]["w"], STATE["model"]["w"])
    assert (loaded["step"], loaded["nested"], loaded["format"]) == (7, {"a": [1, (2.5, None, "x")]}, FORMAT_VERSION)


class TestLoad:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "checkpoint_7.pth"
        save_checkpoint(STATE, path)
        assert_is_state(load_checkpoint(path))
        assert_is_state(load_checkpoint(str(path)))

    def test_mapped(self, tmp_path):
        save_checkpoint(STATE, tmp_path / "c.pth")
        assert_is_state(load_checkpoint(tmp_path / "c.pth", mapped=True))

    def test_from_a_url(self, tmp_path):
        save_checkpoint(STATE, tmp_path / "c.pth")
        with fsspec.open("memory://checkpoints/c.pth", "wb") as file:
            file.write((tmp_path / "c.pth").read_bytes())
        assert_is_state(load_checkpoint("memory://checkpoints/c.pth"))

    @pytest.mark.parametrize("as_zip", [False, True])
    def test_code_is_never_executed(self, tmp_path, as_zip):
        """A pickle that calls os.system, bare and inside a file such as torch.save writes."""

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'executed'}",)

        path = tmp_path / "evil.pth"
        if as_zip:
            torch.save({"model": {}, "x": Evil()}, path)
        else:
            path.write_bytes(pickle.dumps({"model": {}, "x": Evil()}, protocol=2))
        with pytest.raises(
            ValueError, match=r"evil\.pth: holds more than tensors and plain values, which could execute code: posix"
        ):
            load_checkpoint(path)
        assert not (tmp_path / "executed").exists()
        pickle.loads(pickle.dumps(Evil()))  # the same object, loaded carelessly, does run
        assert (tmp_path / "executed").exists()

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
    def test_cut_off(self, tmp_path, share):
        path = tmp_path / "cut.pth"
        save_checkpoint(STATE, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"cut\.pth: .*damaged") as caught:
            load_checkpoint(path)
        assert caught.value.__cause__ is not None

    def test_other_files(self, tmp_path):
        path = tmp_path / "other.pth"
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a.txt", "x")
        for content in (
            b"just text\n",
            b"{}",
            bytes(range(256)),
            archive.getvalue(),
            b"\x80\x02K\x01.",
            b"\x80\x02]q\x00",
        ):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"other\.pth: "):
                load_checkpoint(path)

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            load_checkpoint(tmp_path / "none.pth")
        with pytest.raises(IsADirectoryError):
            load_checkpoint(tmp_path)

    def test_a_state_dict_alone_is_the_model(self, tmp_path):
        torch.save({"w": torch.ones(2), "model": torch.zeros(1)}, tmp_path / "x.pth")
        assert list(load_checkpoint(tmp_path / "x.pth")) == ["model"]
        assert load_weights(tmp_path / "x.pth")["w"].tolist() == [1, 1]

    @pytest.mark.parametrize("content", [{}, {"step": 1}, {"model": [1]}, [1, 2], torch.zeros(2)])
    def test_no_model(self, tmp_path, content):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"x\.pth: holds no model; give a checkpoint that the Trainer wrote"):
            load_checkpoint(tmp_path / "x.pth")

    def test_newer_format(self, tmp_path):
        torch.save({"model": {}, "format": FORMAT_VERSION + 1}, tmp_path / "x.pth")
        with pytest.raises(
            ValueError, match=rf"has format {FORMAT_VERSION + 1}, this Trainer reads up to {FORMAT_VERSION}"
        ):
            load_checkpoint(tmp_path / "x.pth")

    def test_a_file_of_another_program_has_no_format(self, tmp_path):
        for extra in ({}, {"format": "pt"}):
            torch.save({"model": {}, **extra}, tmp_path / "x.pth")
            assert load_checkpoint(tmp_path / "x.pth") == {"model": {}, **extra}


class TestFolder:
    def fill(self, folder, steps, best=None) -> None:
        for step in steps:
            save_checkpoint({"model": {}, "step": step}, folder / f"checkpoint_{step}.pth")
        if best is not None:
            save_checkpoint({"model": {}, "step": best}, folder / "best_model.pth")

    def test_listed_by_step_not_by_name(self, tmp_path):
        self.fill(tmp_path, [9, 100, 20])
        for other in ("best_model_7.pth", ".checkpoint_30.pth.12.tmp", "checkpoint_x.pth", "checkpoint_40.pth.bak"):
            (tmp_path / other).write_bytes(b"")
        expected = [(step, tmp_path / f"checkpoint_{step}.pth") for step in (9, 20, 100)]
        assert list_checkpoints(tmp_path) == expected

    @pytest.mark.parametrize(
        ("steps", "best", "newest"),
        [
            ([9, 100, 20], None, "checkpoint_100.pth"),
            ([9, 20], 100, "best_model.pth"),
            ([9, 20], 15, "checkpoint_20.pth"),
            ([9, 20], 20, "checkpoint_20.pth"),
            ([], 3, "best_model.pth"),
        ],
    )
    def test_newest(self, tmp_path, steps, best, newest):
        self.fill(tmp_path, steps, best)
        assert exist_in(tmp_path)
        assert newest_first(tmp_path)[0] == tmp_path / newest

    def test_none(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert not exist_in(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint_<step>\.pth and no best_model\.pth"):
            newest_first(tmp_path)

    def test_a_damaged_best_model_comes_last(self, tmp_path):
        self.fill(tmp_path, [1])
        (tmp_path / "best_model.pth").write_bytes(b"damaged")
        assert [path.name for path in newest_first(tmp_path)] == ["checkpoint_1.pth", "best_model.pth"]

    def test_a_best_model_without_a_step_is_named(self, tmp_path):
        self.fill(tmp_path, [1])
        torch.save({"model": {}}, tmp_path / "best_model.pth")
        with pytest.raises(ValueError, match=r"best_model\.pth: holds weights only, no training to continue"):
            newest_first(tmp_path)

    def test_a_best_model_of_an_old_torch(self, tmp_path):
        """Before 1.6 files were no archives."""
        self.fill(tmp_path, [1])
        state = {"model": {"w": torch.ones(2)}, "step": 5}
        torch.save(state, tmp_path / "best_model.pth", _use_new_zipfile_serialization=False)
        assert newest_first(tmp_path)[0] == tmp_path / "best_model.pth"

    @pytest.mark.parametrize(("keep", "left"), [(1, [100]), (2, [20, 100]), (3, [9, 20, 100]), (9, [9, 20, 100])])
    def test_remove_old(self, tmp_path, keep, left):
        self.fill(tmp_path, [9, 100, 20], best=1)
        remove_old_checkpoints(tmp_path, keep)
        assert [step for step, _ in list_checkpoints(tmp_path)] == left
        assert (tmp_path / "best_model.pth").exists()

"""Checkpoint files: with their SHA-256 inside, and read without running anything in them; those of a run's folder."""

import hashlib
import io
import math
import os
import pickle
import random
import time
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch

from tests.trainer.toys import ToyConfig, build
from trainer import TrainerArgs
from trainer.checkpoint import (
    exist_in,
    list_checkpoints,
    newest_first,
    rank_model,
    remove_old_checkpoints,
)
from trainer.checkpoint_file import FORMAT_VERSION, DamagedError, load_checkpoint, load_weights, save_checkpoint

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

    def test_from_and_to_a_url(self, tmp_path):
        save_checkpoint(STATE, tmp_path / "c.pth")
        with fsspec.open("memory://checkpoints/c.pth", "wb") as file:
            file.write((tmp_path / "c.pth").read_bytes())
        assert_is_state(load_checkpoint("memory://checkpoints/c.pth"))
        save_checkpoint(STATE, "memory://checkpoints/d.pth")
        assert_is_state(load_checkpoint("memory://checkpoints/d.pth"))

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
        with pytest.raises(ValueError, match=r"cut\.pth: .*damaged"):
            load_checkpoint(path)

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


class TestSum:
    @pytest.fixture
    def path(self, tmp_path):
        save_checkpoint(STATE, tmp_path / "c.pth")
        return tmp_path / "c.pth"

    def test_it_is_the_comment_of_the_archive(self, path):
        """Of all bytes before it, with the length that a comment has when there is none."""
        content = path.read_bytes()
        comment = zipfile.ZipFile(path).comment
        without = content[: -len(comment) - 2] + b"\0\0"
        assert comment == b"sha256:" + hashlib.sha256(without).hexdigest().encode()
        buffer = io.BytesIO()
        torch.save({"format": FORMAT_VERSION, **STATE}, buffer)
        assert len(buffer.getvalue()) == len(without)

    @pytest.mark.parametrize("sizes", [[1] * 50, [22, 22], [21, 1, 30], [100, 3], [5, 17, 1000], [0, 40, 0]])
    def test_whatever_pieces_come(self, sizes):
        from trainer.checkpoint_file import _SUM_LENGTH, _Summed, check_sum

        file, pieces = io.BytesIO(), [os.urandom(size) for size in sizes]
        pieces.append(b"\0\0")  # as an archive ends
        summed = _Summed(file)
        assert [summed.write(piece) for piece in pieces] == [*sizes, 2]
        summed.finish()
        assert file.getvalue()[: -_SUM_LENGTH - 2] == b"".join(pieces)[:-2]
        assert check_sum(file, "x")

    def test_pieces_of_other_types_than_bytes(self):
        from trainer.checkpoint_file import _Summed, check_sum

        file = io.BytesIO()
        summed = _Summed(file)
        assert summed.write(memoryview(torch.arange(10).numpy())) == 80
        summed.write(bytearray(22))
        summed.finish()
        assert check_sum(file, "x")

    def test_a_flipped_bit_is_found_wherever_it_is(self, path):
        content, rng = path.read_bytes(), random.Random(0)
        ends = [*range(30), *range(len(content) - 120, len(content))]
        for position in [*ends, *rng.sample(range(len(content)), 200)]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(DamagedError, match=r"c\.pth: .*damaged"):
                load_checkpoint(path)

    def test_torch_alone_finds_no_flipped_bit(self, path):
        """Why there is a sum."""
        content = bytearray(path.read_bytes())
        content[content.index(STATE["model"]["w"].numpy().tobytes()) + 2] ^= 1
        path.write_bytes(content)
        assert not torch.equal(torch.load(path)["model"]["w"], STATE["model"]["w"])
        with pytest.raises(DamagedError, match="its bytes have changed"):
            load_checkpoint(path)

    def test_empty_and_cut_off(self, path):
        content = path.read_bytes()
        path.write_bytes(b"")
        with pytest.raises(DamagedError, match=r"c\.pth: damaged: it is empty"):
            load_checkpoint(path)
        for missing in (72, 1000):
            path.write_bytes(content[:-missing])
            with pytest.raises(DamagedError, match="damaged: its end is missing"):
                load_checkpoint(path)
        for missing in (1, 71):  # of the comment: still an archive
            path.write_bytes(content[:-missing])
            with pytest.raises(DamagedError, match="damaged"):
                load_checkpoint(path)
        path.write_bytes(content[:-1000] + bytes(1000))  # as a crash of the machine leaves it
        with pytest.raises(DamagedError, match="damaged"):
            load_checkpoint(path)

    def test_a_checkpoint_that_somebody_wrote_with_torch(self, tmp_path):
        torch.save({"format": FORMAT_VERSION, **STATE}, tmp_path / "c.pth")
        with pytest.raises(
            DamagedError, match=r"SHA-256 is missing.*write it with trainer\.checkpoint\.save_checkpoint"
        ):
            load_checkpoint(tmp_path / "c.pth")

    def test_an_error_of_the_disk_is_told_as_it_is(self, tmp_path, monkeypatch):
        """Torch makes another one of it."""

        def full(self, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("trainer.checkpoint_file._Summed._write", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(STATE, tmp_path / "c.pth")


FORMATS = Path(__file__).parent / "checkpoints"
OLD = {"optimizer": "AdamW", "dropout": 0.3, "lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_old_checkpoints_are_continued(version, tmp_path):
    """Each file is of the Trainer of its time: checkpoint_5.pth of ``build(epochs=3, max_steps=5, **OLD).fit()``.

    The weights agree but for what another processor rounds otherwise.
    """
    whole = build(epochs=3, output_path=str(tmp_path), **OLD)
    whole.fit()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint_5.pth").write_bytes((FORMATS / f"format_{version}.pth").read_bytes())
    trainer = build(seed=9, epochs=3, args=TrainerArgs(continue_path=str(folder)), **OLD)
    trainer.open_run()
    assert (trainer.total_steps_done, trainer.epochs_done, trainer.batches_done) == (5, 1, 2)
    trainer.fit()
    assert trainer.total_steps_done == 9
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    assert trainer.best_loss["eval_loss"] == pytest.approx(whole.best_loss["eval_loss"], rel=1e-5)


def test_the_file_of_the_newest_format_holds_what_is_written_now(tmp_path):
    """When a part is added, that file is written anew; or the format gets another number, and the file stays."""
    trainer = build(epochs=1, output_path=str(tmp_path), **OLD)
    trainer.fit()
    kept = load_checkpoint(FORMATS / f"format_{FORMAT_VERSION}.pth")
    now = load_checkpoint(trainer.output_path / "checkpoint_3.pth")
    assert list(kept) == list(now)
    for name in ("position", "averages", "logs", "guard"):
        assert list(kept[name]) == list(now[name])


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

    @pytest.mark.parametrize(("evaluated", "newest"), [(-1, "best_model.pth"), (20, "checkpoint_20.pth")])
    def test_of_the_same_update_the_later_one(self, tmp_path, evaluated, newest):
        """A checkpoint is saved before the evaluation of its update, and once more at the end of the training."""
        state = {"model": {}, "step": 20, "epoch": 2}
        save_checkpoint({**state, "eval_step": evaluated, "test_step": evaluated}, tmp_path / "checkpoint_20.pth")
        save_checkpoint({**state, "eval_step": 20, "test_step": -1}, tmp_path / "best_model.pth")
        assert newest_first(tmp_path)[0].name == newest

    def test_none(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert not exist_in(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"holds no checkpoint_<step>\.pth and no best_model\.pth"):
            newest_first(tmp_path)

    def test_a_damaged_best_model_comes_first(self, tmp_path):
        """To be told of: it may have been the newest."""
        self.fill(tmp_path, [1])
        (tmp_path / "best_model.pth").write_bytes(b"damaged")
        assert [path.name for path in newest_first(tmp_path)] == ["best_model.pth", "checkpoint_1.pth"]

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
        remove_old_checkpoints(tmp_path, 100, ToyConfig(save_n_checkpoints=keep))
        assert [step for step, _ in list_checkpoints(tmp_path)] == left
        assert (tmp_path / "best_model.pth").exists()

    @pytest.mark.parametrize(("age", "left"), [(None, [2, 3, 4]), (10.5, [2, 3, 4]), (9.5, [3, 4]), (0, [4])])
    def test_remove_by_age(self, tmp_path, age, left):
        """Of hours; the newest stays however old it is."""
        self.fill(tmp_path, [1, 2, 3, 4])
        for step, hours in ((1, 1), (2, 10), (3, 9), (4, 100)):
            os.utime(tmp_path / f"checkpoint_{step}.pth", (0, time.time() - hours * 3600))
        remove_old_checkpoints(tmp_path, 4, ToyConfig(save_n_checkpoints=3, save_max_age=age))
        assert [step for step, _ in list_checkpoints(tmp_path)] == left

    def test_later_ones_than_the_newest_stay_and_do_not_count(self, tmp_path):
        """Damaged ones, which the training went on before, and which could not be put aside."""
        self.fill(tmp_path, [1, 2, 3, 8, 9])
        remove_old_checkpoints(tmp_path, 3, ToyConfig(save_n_checkpoints=1))
        assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 8, 9]


def test_the_best_models_are_those_with_the_lowest_losses():
    models, beaten = {}, {}
    for step, loss in enumerate([5.0, 3.0, math.nan, 4.0, 3.0, 6.0, 2.0]):
        beaten[step] = rank_model(models, step, loss, 2)
    assert beaten == {0: [], 1: [], 2: [2], 3: [0], 4: [3], 5: [5], 6: [4]}
    assert models == {1: 3.0, 6: 2.0}

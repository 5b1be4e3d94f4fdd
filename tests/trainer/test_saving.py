"""When checkpoints are saved, which ones are kept, and what happens when a save fails."""

import errno
import math
import os
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.trainer.toys import Toy, ToyConfig, assert_same_weights, build, make_samples, weights_of
from trainer import TrainerArgs, checkpoint, checkpoint_file
from trainer.checked_config import ConfigError
from trainer.checkpoint import (
    _newest_sound,
    exist_in,
    list_checkpoints,
    load_checkpoint,
    newest_first,
    remove_old_checkpoints,
    save_checkpoint,
)
from trainer.checkpoint_command import main
from trainer.storage import as_path, exists


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def before_writing(monkeypatch):
    """Sets a function that is called with the name of every checkpoint before it is written."""
    write = checkpoint_file.write_file

    def hook(function):
        def hooked(path, *rest):
            function(path.name)
            write(path, *rest)

        monkeypatch.setattr(checkpoint_file, "write_file", hooked)

    return hook


def steps_of(trainer) -> list[int]:
    return [step for step, _ in list_checkpoints(trainer.output_path)]


def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pth*")}


def continued(trainer, **settings):
    return build(args=TrainerArgs(continue_path=str(trainer.output_path)), seed=9, **settings)


# ---- in a thread ----


def test_the_training_goes_on_while_a_checkpoint_is_written(before_writing):
    """What is written is the state of its time, though the weights have changed since."""
    go_on, weights, seen = threading.Event(), {}, []

    def wait(name):
        if name == "checkpoint_3.pth":
            assert go_on.wait(20)

    def note(trainer):
        weights[trainer.total_steps_done] = weights_of(trainer.model)
        if trainer.total_steps_done == 5:
            seen.append(steps_of(trainer))
            go_on.set()

    before_writing(wait)
    callbacks = {"on_train_step_end": note}
    trainer = build(epochs=2, save_step=3, max_steps=5, run_eval=False, save_best_after=9, callbacks=callbacks)
    trainer.fit()
    assert (seen, steps_of(trainer)) == ([[]], [3, 5])
    state = load_checkpoint(trainer.output_path / "checkpoint_3.pth")
    assert_same_weights(state["model"], weights[3])
    assert not torch.equal(weights[3]["layer.weight"], weights[5]["layer.weight"])


def test_without_a_thread_it_is_there_at_once():
    seen = []
    callbacks = {"on_train_step_start": lambda trainer: seen.append(steps_of(trainer))}
    build(max_steps=3, save_step=1, save_async=False, callbacks=callbacks).fit()
    assert seen == [[], [1], [1, 2]]


def test_what_is_being_written_when_the_training_fails_is_finished(before_writing):
    before_writing(lambda name: time.sleep(0.2))

    def fail(trainer):
        if trainer.total_steps_done == 2:
            raise KeyError

    trainer = build(save_step=1, callbacks={"on_train_step_start": fail})
    with pytest.raises(KeyError):
        trainer.fit()
    assert steps_of(trainer) == [1, 2]
    assert "checkpoint_2.pth" in (trainer.output_path / "trainer_0_log.txt").read_text()


def test_what_fails_in_the_thread_and_in_the_training_leaves_nothing_open(before_writing):
    failing = threading.Event()

    def fail_too(name):
        assert failing.wait(20)
        raise FloatingPointError("in the thread")

    def fail(trainer):
        if trainer.total_steps_done == 1:
            failing.set()
            raise KeyError("in the training")

    before_writing(fail_too)
    trainer = build(save_step=1, dashboard_logger="tensorboard", callbacks={"on_train_step_start": fail})
    with pytest.raises(FloatingPointError, match="in the thread") as error:
        trainer.fit()
    assert isinstance(error.value.__context__, KeyError)
    assert trainer.c_logger._file is None
    log = (trainer.output_path / "trainer_0_log.txt").read_text()
    assert "in the training" in log
    assert "look at it:" in log.splitlines()[-1]


def test_what_has_happened_in_the_thread_is_told_in_the_training(before_writing, caplog):
    """With the next update, not only with the next save."""
    seen = []

    def fail(name):
        if name == "checkpoint_3.pth":
            raise OSError(errno.ENOSPC, "No space left on device", name)

    def wait(trainer):
        if trainer.total_steps_done == 3:  # the save is under way
            while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                time.sleep(0.001)
        seen.append(caplog.text.count("saved ") + caplog.text.count("could not be saved"))

    before_writing(fail)
    callbacks = {"on_train_step_start": wait}
    options = {"epochs": 2, "save_best_after": 99, "run_eval": False, "callbacks": callbacks}
    trainer = build(save_step=3, **options)
    trainer.fit()
    # asked before each of six updates
    assert seen == [0, 0, 0, 0, 1, 1]
    assert "checkpoint_3.pth" in caplog.text


def test_by_hand_before_and_after_a_training():
    first = build(epochs=1)
    first.fit()
    positions = [load_checkpoint(first.output_path / "checkpoint_3.pth")["logs"]["console"]]
    first.save_checkpoint()
    positions.append(load_checkpoint(first.output_path / "checkpoint_3.pth")["logs"]["console"])
    assert positions[1]["0"] > positions[0]["0"]
    second = continued(first, epochs=1)
    second.save_checkpoint()  # opens the run, and goes on
    assert steps_of(second) == [3]
    second.fit()


# ---- when ----


def test_every_so_many_minutes(monkeypatch):
    """A clock that goes on by 20 s in each update."""
    now = [0.0]

    def tick():
        now[0] += 20

    monkeypatch.setattr("trainer.saving.time.monotonic", lambda: now[0])
    trainer = build(
        epochs=3, save_minutes=1.0, run_eval=False, callbacks={"before_gradient_clipping": tick}, save_best_after=99
    )
    trainer.fit()
    # what is asked before an update, is saved after it
    assert steps_of(trainer) == [4, 8, 9]


def test_after_a_save_by_steps_the_minutes_begin_anew(monkeypatch):
    now = [0.0]

    def tick(trainer):
        now[0] += 20

    monkeypatch.setattr("trainer.saving.time.monotonic", lambda: now[0])
    options = {"epochs": 3, "save_minutes": 1.0, "save_step": 3, "run_eval": False, "save_best_after": 99}
    trainer = build(**options, callbacks={"on_train_step_end": tick})
    trainer.fit()
    assert steps_of(trainer) == [3, 6, 9]


# ---- which ones are kept ----


def test_one_is_kept_and_deleted_only_when_the_next_is_there(before_writing):
    seen = []
    before_writing(lambda name: seen.append(steps_of(trainer)))
    trainer = build(max_steps=4, epochs=2, save_step=1, save_n_checkpoints=1, run_eval=False, save_best_after=99)
    trainer.fit()
    assert seen == [[], [1], [2], [3], [4]]  # the last one is written again at the end
    assert steps_of(trainer) == [4]


class Rated(Toy):
    """Its evaluations give these losses, one after the other."""

    losses = (5.0, 3.0, 4.0, 6.0, 3.5)

    def eval_step(self, batch, criterion):
        outputs, losses = super().eval_step(batch, criterion)
        epoch = int(self.epoch)
        return outputs, {"loss": losses["loss"] * 0 + self.losses[epoch]}

    def on_epoch_start(self, trainer):
        self.epoch = trainer.epochs_done


@pytest.mark.parametrize(
    ("keep", "left"), [(None, []), (1, [6]), (2, [6, 15]), (3, [6, 9, 15]), (9, [3, 6, 9, 12, 15])]
)
def test_the_best_models_are_kept(keep, left):
    """Three updates an epoch."""
    trainer = build(Rated, epochs=5, save_n_best=keep)
    trainer.fit()
    found = {int(p.stem.removeprefix("best_model_")): p for p in trainer.output_path.glob("best_model_*.pth")}
    assert sorted(found) == left
    for step, path in found.items():
        assert load_checkpoint(path)["step"] == step
    best = load_checkpoint(trainer.output_path / "best_model.pth")
    assert (best["step"], best["model_loss"]["eval_loss"]) == (6, 3.0)


def test_the_ranking_survives_a_stop():
    whole = build(Rated, epochs=5, save_n_best=2)
    whole.fit()
    first = build(Rated, epochs=5, save_n_best=2, max_steps=9)
    first.fit()
    second = continued(first, model_class=Rated, epochs=5, save_n_best=2)
    second.fit()
    assert second.best_models == whole.best_models == {6: 3.0, 15: 3.5}
    assert sorted(p.name for p in second.output_path.glob("best_*")) == [
        "best_model.pth",
        "best_model_15.pth",
        "best_model_6.pth",
    ]


def test_an_evaluation_with_nan_is_none_of_the_best():
    class Nan(Rated):
        losses = (math.nan, 3.0)

    trainer = build(Nan, epochs=2, save_n_best=2, nan_policy="skip")
    trainer.fit()
    assert trainer.best_models == {6: 3.0}


def test_all_best_or_some_best():
    with pytest.raises(ConfigError, match="save_n_best=2: goes without save_all_best"):
        build(save_n_best=2, save_all_best=True)


# ---- what is in it ----


class Numpys(Toy):
    """Its learning rates are NumPy's numbers, as of any schedule by ``np.cos``; so is a part of its state."""

    def get_scheduler(self, optimizers):
        return torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 0.5 + 0.5 * np.cos(step / 9))

    def get_extra_state(self):
        return {"seen": [np.int64(3), (np.bool_(True), np.float32(0.5))]}

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("in_thread", [True, False])
def test_numpys_numbers_can_be_read_again(in_thread):
    options = {"model_class": Numpys, "epochs": 3, "scheduler_after_epoch": False, "save_async": in_thread}
    whole, first = build(**options), build(**options, max_steps=4)
    whole.fit()
    first.fit()
    state = load_checkpoint(first.output_path / "checkpoint_4.pth")
    assert state["model"]._metadata == first.model.state_dict()._metadata
    assert type(first.optimizer[0].param_groups[0]["lr"]) is np.float64  # that of the training stays as it is
    second = continued(first, **options)
    second.fit()
    assert second.model.extra == {"seen": [3, (True, 0.5)]}
    assert_same_weights(weights_of(second.model.layer), weights_of(whole.model.layer))


# ---- what fails ----


@pytest.mark.parametrize("in_thread", [True, False])
def test_a_full_disk_costs_a_checkpoint_but_not_the_training(before_writing, caplog, in_thread):
    def fail(name):
        if name in ("checkpoint_2.pth", "checkpoint_3.pth", "best_model.pth"):
            raise OSError(errno.ENOSPC, "No space left on device", name)

    whole = build(epochs=2)
    whole.fit()
    before_writing(fail)
    trainer = build(epochs=2, save_step=1, save_n_checkpoints=1, save_async=in_thread)
    trainer.fit()
    assert_same_weights(weights_of(trainer.model), weights_of(whole.model))
    assert steps_of(trainer) == [6]
    text = "a checkpoint could not be saved: [Errno 28] No space left on device: 'checkpoint_2.pth'"
    assert caplog.text.count(text) == 1
    assert caplog.text.count("could not be saved") == 2 + 2  # and two best models


def test_a_tracker_that_is_down_is_no_failed_save(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ConnectionError("tracker is down")

    monkeypatch.setattr("trainer.loggers.base.DashboardLogger.add_artifact", fail)
    build(epochs=1, save_step=2).fit()
    assert "checkpoint_2.pth is saved, but the dashboard could not take it: tracker is down" in caplog.text
    assert "could not be saved" not in caplog.text


def test_the_checkpoint_before_a_failed_one_stays(before_writing):
    def fail(name):
        if name != "checkpoint_1.pth":
            raise PermissionError(errno.EACCES, "Permission denied", name)

    before_writing(fail)
    trainer = build(epochs=1, save_step=1, save_n_checkpoints=1, run_eval=False, save_best_after=9)
    with pytest.raises(PermissionError, match=r"Permission denied: 'checkpoint_3\.pth'"):
        trainer.fit()  # the last one must succeed
    assert steps_of(trainer) == [1]


class KeepsAnArray(Toy):
    """From the second update on it has a state that can be written, but not read with weights_only."""

    def get_extra_state(self):
        return np.zeros(3) if len(self.seen) > 1 else None

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("in_thread", [True, False])
def test_what_could_not_be_read_again_ends_the_training(in_thread):
    """At the first save, with what was saved before; not when the run is to be continued, days later."""
    trainer = build(KeepsAnArray, save_step=1, save_n_checkpoints=1, save_async=in_thread)
    with pytest.raises(TypeError, match=r"checkpoint_2\.pth: holds more than tensors and plain values.*numpy"):
        trainer.fit()
    assert steps_of(trainer)[0] == 1


def test_a_checkpoint_that_cannot_be_deleted_stays(monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path.name)

    monkeypatch.setattr("trainer.checkpoint.remove", refuse)
    trainer = build(epochs=2, save_step=3, save_n_checkpoints=1, save_n_best=1)
    trainer.fit()
    assert steps_of(trainer) == [3, 6]
    continued(trainer, epochs=2, save_n_checkpoints=1).fit()
    assert "checkpoint_3.pth: could not be deleted, and stays: [Errno 13] Permission denied" in caplog.text
    assert "best_model_3.pth: could not be deleted" in caplog.text
    assert "could not be saved" not in caplog.text
    assert (trainer.output_path / "best_model_6.pth").is_file()


# ---- what was damaged ----


def damage(path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[random.Random(0).randrange(len(content))] ^= 4
    path.write_bytes({"bit": content, "cut": content[:-1000], "empty": b"", "zeros": content[:-999] + bytes(999)}[how])


@pytest.mark.parametrize("how", ["bit", "cut", "empty", "zeros"])
def test_a_damaged_checkpoint_is_put_aside_and_named(how, caplog):
    whole = build(epochs=3)
    whole.fit()
    first = build(epochs=3, save_step=2, max_steps=5, run_eval=False, save_best_after=99)
    first.fit()
    path = first.output_path / "checkpoint_5.pth"
    damage(path, how)
    content = path.read_bytes()
    second = continued(first, epochs=3, save_n_checkpoints=1, save_step=100)
    second.fit()
    assert "checkpoint_5.pth: " in caplog.text
    assert "damaged" in caplog.text
    assert "continuing from checkpoint_4.pth instead" in caplog.text
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    assert (first.output_path / "checkpoint_5.pth.damaged").read_bytes() == content
    assert steps_of(second) == [9]


def test_a_best_model_whose_step_is_damaged(caplog):
    """One bit, without which it would look like weights alone: it says nothing of how far the run is."""
    first = build(epochs=1)
    first.fit()
    best = first.output_path / "best_model.pth"
    content = best.read_bytes()
    key = b"X\4\0\0\0step"
    assert content.count(key) == 1
    best.write_bytes(content.replace(key, b"X\4\0\0\0stdp"))
    continued(first, epochs=2).fit()
    assert "best_model.pth: damaged: its bytes have changed" in caplog.text
    assert "continuing from checkpoint_3.pth instead" in caplog.text


def test_when_all_are_damaged_the_run_ends_and_nothing_is_touched(caplog):
    first = build(epochs=1, save_step=1)
    first.fit()
    for path in first.output_path.glob("*.pth"):
        damage(path, "bit")
    before = files_in(first.output_path)
    caplog.clear()
    with pytest.raises(ValueError, match=r"checkpoint_3\.pth: .*damaged"):
        continued(first).fit()
    assert "continue it" not in caplog.text
    assert files_in(first.output_path) == before


def test_what_a_killed_process_left_is_deleted(caplog):
    first = build(epochs=1)
    first.fit()
    left = first.output_path / ".checkpoint_4.pth.123.tmp"
    for path in (left, first.output_path / "notes.tmp", first.output_path / ".hidden"):
        path.write_bytes(b"half")
    continued(first, epochs=1).fit()
    assert not left.exists()
    assert ".checkpoint_4.pth.123.tmp: deleted" in caplog.text
    assert (first.output_path / "notes.tmp").exists()
    assert (first.output_path / ".hidden").exists()


# ---- verify ----


def test_verify_names_what_is_damaged(capsys):
    trainer = build(epochs=1, save_step=1, save_n_best=1)
    trainer.fit()
    assert main(["verify", str(trainer.output_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(
            "best_model.pth: sound (step 3, SHA-256 as recorded)",
            "best_model_3.pth: sound (step 3, SHA-256 as recorded)",
        ),
        *(f"checkpoint_{step}.pth: sound (step {step}, SHA-256 as recorded)" for step in (1, 2, 3)),
        "5 checkpoints: all sound",
    ]
    damage(trainer.output_path / "checkpoint_2.pth", "bit")
    assert main(["verify", str(trainer.output_path)]) == 1
    out = capsys.readouterr().out
    assert "checkpoint_2.pth: damaged" in out
    assert "checkpoint_3.pth: sound" in out
    assert "NOT all sound" in out
    assert main(["verify", str(trainer.output_path / "checkpoint_3.pth")]) == 0


def test_strip_does_not_give_damaged_weights_a_sum_of_their_own(capsys):
    trainer = build(epochs=1)
    trainer.fit()
    path = trainer.output_path / "checkpoint_3.pth"
    content = bytearray(path.read_bytes())
    content[content.find(trainer.model.layer.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert main(["strip", str(path)]) == 1
    assert "checkpoint_3.pth: damaged: its bytes have changed" in capsys.readouterr().err
    assert not (trainer.output_path / "checkpoint_3_stripped.pth").exists()


def test_verify_after_a_nan(capsys):
    """The batch that gave it is saved in the run's folder, and is no checkpoint."""
    samples = make_samples(12)
    samples[11] = (samples[11][0] * math.nan, samples[11][1])
    trainer = build(epochs=1, save_step=1, train_samples=samples)
    with pytest.raises(FloatingPointError):
        trainer.fit()
    assert list(trainer.output_path.glob("bad_batch_*.pth"))
    assert steps_of(trainer)
    assert main(["verify", str(trainer.output_path)]) == 0
    assert "bad_batch" not in capsys.readouterr().out


def test_verify_of_what_has_no_sum_or_is_not_there(tmp_path, capsys):
    torch.save({"model": {}, "format": 2, "step": 7}, tmp_path / "checkpoint_7.pth")
    assert main(["verify", str(tmp_path)]) == 0
    assert "readable (step 7, format 2 records no SHA-256)" in capsys.readouterr().out
    os.remove(tmp_path / "checkpoint_7.pth")
    for path in (tmp_path, tmp_path / "nothing"):
        assert main(["verify", str(path)]) == 1
        assert str(path) in capsys.readouterr().err


# ---- in a store ----


@pytest.mark.parametrize("kind", ["disk", "memory", "s3"])
def test_the_same_in_a_store(kind, request, tmp_path, capsys):
    """Checkpoints of a folder: written, listed, deleted, damaged, passed over, verified."""
    url = {"disk": str(tmp_path), "memory": "memory://runs/a"}.get(kind)
    url = url or f"{request.getfixturevalue('s3_server').url}/runs/a"
    folder, config = as_path(url), ToyConfig(save_n_checkpoints=2)
    weights = {"w": torch.arange(300_000.0)}
    for step in (1, 2, 3, 10):
        save_checkpoint({"model": weights, "step": step}, folder / f"checkpoint_{step}.pth")
        remove_old_checkpoints(folder, step, config)
    assert [step for step, _ in list_checkpoints(folder)] == [3, 10]
    assert exist_in(url)
    save_checkpoint({"model": weights, "step": 7}, folder / "best_model.pth")
    assert [path.name for path in newest_first(folder)] == ["checkpoint_10.pth", "best_model.pth", "checkpoint_3.pth"]
    assert torch.equal(load_checkpoint(f"{url}/checkpoint_3.pth")["model"]["w"], weights["w"])
    assert main(["verify", url]) == 0
    damaged = bytearray((folder / "checkpoint_10.pth").read_bytes())
    damaged[500_000] ^= 1
    (folder / "checkpoint_10.pth").write_bytes(damaged)
    assert main(["verify", url]) == 1
    assert "checkpoint_10.pth: damaged" in capsys.readouterr().out

    told = []
    logger = SimpleNamespace(print=told.append, warn=told.append)
    path, state = _newest_sound(SimpleNamespace(c_logger=logger), folder)
    assert (path.name, state["step"]) == ("best_model.pth", 7)
    assert "continuing from best_model.pth instead" in told[0]
    assert [step for step, _ in list_checkpoints(folder)] == [3]
    assert exists(folder / "checkpoint_10.pth.damaged")


@pytest.mark.parametrize("save_async", [True, False])
def test_the_best_model_is_saved_after_a_disk_was_full(monkeypatch, save_async):
    own, failed = checkpoint.save_checkpoint, []

    def save(state, path):
        if path.name == "best_model.pth" and not failed:
            failed.append(state["step"])
            raise OSError(errno.ENOSPC, "No space left on device")
        own(state, path)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    trainer = build(epochs=3, lr=0.0, save_async=save_async)  # no later loss is lower
    trainer.fit()
    assert failed == [3]
    assert load_checkpoint(trainer.output_path / "best_model.pth")["step"] == 6

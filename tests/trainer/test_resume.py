"""Checkpoints through the Trainer: what they hold, and that a continued run ends where an undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.trainer.toys import Toy, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import TrainerArgs
from trainer.checkpoint import load_checkpoint
from trainer.checkpoint_file import FORMAT_VERSION

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def continued(trainer, **changes):
    """A new Trainer, of a model with other weights, that goes on in the folder of ``trainer``."""
    changes = {"model_class": type(trainer.model), "seed": 99, **changes}
    return build(args=TrainerArgs(continue_path=str(trainer.output_path)), **changes)


SETTINGS = {
    "plain": {},
    "adamw, dropout, scheduler by epoch": {
        "optimizer": "AdamW",
        "dropout": 0.3,
        "lr_scheduler": "ExponentialLR",
        "lr_scheduler_params": {"gamma": 0.5},
    },
    "scheduler by step, clipped": {
        "lr_scheduler": "LinearLR",
        "scheduler_after_epoch": False,
        "grad_clip": 0.5,
    },
    "fp16": {"mixed_precision": True, "precision": "fp16", "optimizer": "AdamW"},
    "gan": {"model_class": ToyGan, "optimizer": "AdamW", "lr": 0.01},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop", [3, 4, 5], ids=lambda n: f"stopped after {n} updates")
def test_a_continued_run_ends_bitwise_where_an_undisturbed_one_does(name, stop):
    """Stopped at the end of an epoch (3 updates), one update into the next, and one before its end."""
    settings = SETTINGS[name]
    whole = build(epochs=3, **settings)
    whole.fit()
    first = build(epochs=3, max_steps=stop, **settings)
    first.fit()
    second = continued(first, epochs=3, **settings)
    second.fit()
    assert second.total_steps_done == whole.total_steps_done == 9
    assert second.output_path == first.output_path
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    for a, b in zip(whole.optimizer, second.optimizer):
        assert str(a.state_dict()) == str(b.state_dict())
    assert [s and s.state_dict() for s in whole.scheduler] == [s and s.state_dict() for s in second.scheduler]
    assert second.best_loss == whole.best_loss
    assert second.precision.scaler.state_dict() == whole.precision.scaler.state_dict()


def test_the_mean_over_an_epoch_includes_what_was_done_before_the_stop():
    means = {}

    def note(trainer):
        means[trainer.total_steps_done] = dict(trainer.keep_avg_train.means)

    build(epochs=2, callbacks={"on_train_epoch_end": note}).fit()
    expected = means[6]
    first = build(epochs=2, max_steps=5)
    first.fit()
    continued(first, epochs=2, callbacks={"on_train_epoch_end": note}).fit()
    assert means[6] == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_holds_what_the_design_lists():
    trainer = build(epochs=1, optimizer="AdamW", lr_scheduler="ExponentialLR", lr_scheduler_params={"gamma": 0.5})
    trainer.fit()
    state = load_checkpoint(trainer.output_path / "checkpoint_3.pth")
    assert state["config"] == trainer.config.to_dict()
    assert_same_weights(state["model"], weights_of(trainer.model))
    assert state["optimizer"]["0"]["state"][0]["step"] == 3
    assert state["scheduler"]["0"]["last_epoch"] == 1
    assert (state["format"], state["step"], state["epoch"], state["batches_done"]) == (FORMAT_VERSION, 3, 1, 0)
    assert set(state["rng"]["0"]) == {"python", "numpy", "torch", "cuda", "mps"}
    assert state["model_loss"] == trainer.best_loss
    assert set(state) >= {"scaler", "averages", "eval_step", "stepped"}


def test_restore_path_takes_the_weights_and_begins_anew():
    first = build(epochs=1)
    first.fit()
    args = TrainerArgs(restore_path=str(first.output_path / "best_model.pth"))
    second = build(seed=5, epochs=1, args=args)
    second.open_run()
    assert_same_weights(weights_of(second.model), weights_of(first.model))
    assert (second.total_steps_done, second.epochs_done) == (0, 0)
    assert second.output_path != first.output_path


def test_a_checkpoint_of_another_model_is_an_error_that_lists_the_differences():
    first = build(epochs=1)
    first.fit()
    with pytest.raises(
        ValueError,
        match=r"model than Toy; start .*\n  - layer.weight: has shape \[1, 3\], the model \[1, 5\]",
    ):
        continued(first, features=5).fit()
    with pytest.raises(ValueError, match=r"missing: generator.weight(.|\n)*unexpected: layer.weight"):
        continued(first, model_class=ToyGan).fit()


def test_continuing_a_finished_run_says_so(caplog):
    first = build(epochs=1)
    first.fit()
    second = continued(first, epochs=1)
    second.fit()
    assert "nothing left to train" in caplog.text
    assert second.total_steps_done == 3


def test_the_newest_checkpoints_are_kept_and_best_model_counts_for_continuing():
    trainer = build(epochs=2, save_step=1, save_n_checkpoints=2)
    trainer.fit()
    assert sorted(p.name for p in trainer.output_path.glob("checkpoint_*")) == ["checkpoint_5.pth", "checkpoint_6.pth"]
    for path in trainer.output_path.glob("checkpoint_*"):
        path.unlink()
    second = continued(trainer, epochs=2)
    second.open_run()
    assert second.total_steps_done == 6
    (trainer.output_path / "best_model.pth").unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        continued(trainer).fit()


def test_arguments_that_are_not_the_ones_before_are_told_of(caplog):
    trainer = build(args=TrainerArgs(grad_accum_steps=2), epochs=1)
    trainer.fit()
    continued(trainer, epochs=1).fit()
    assert "grad_accum_steps=1, before 2: the updates are not those of a run that was never stopped" in caplog.text
    caplog.clear()
    args = TrainerArgs(continue_path=str(trainer.output_path), grad_accum_steps=2)
    build(args=args, epochs=1).fit()
    assert "never stopped" not in caplog.text


def test_without_checkpoints_nothing_is_saved():
    trainer = build(epochs=1, save_checkpoints=False, save_step=1)
    trainer.fit()
    assert not list(trainer.output_path.glob("*.pth"))
    assert "continue it" not in (trainer.output_path / "trainer_0_log.txt").read_text()


SCRIPT = """
import os, signal, sys, time
sys.path[:0] = [{root!r}]
from tests.trainer.toys import *
class Slow(Toy):
    def on_train_step_end(self, trainer):
        if trainer.total_steps_done == 4:
            os.kill(os.getpid(), signal.{signal})
    def on_keyboard_interrupt(self, trainer):
        print("callback at", trainer.total_steps_done, flush=True)
build(Slow, epochs=100).fit()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, name, code):
    script = SCRIPT.format(root=str(ROOT), signal=name)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "callback at 4" in result.stdout
    assert "--continue_path output/run-" in result.stdout
    (run,) = (tmp_path / "output").iterdir()
    assert load_checkpoint(run / "checkpoint_4.pth")["step"] == 4


def test_a_signal_without_save_on_interrupt_saves_nothing():
    def stop(trainer):
        if trainer.total_steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = build(save_on_interrupt=False, callbacks={"on_train_step_end": stop})
    with pytest.raises(SystemExit) as caught:
        trainer.fit()
    assert caught.value.code == 130
    assert not list(trainer.output_path.glob("*.pth"))


def test_a_signal_during_evaluation_leaves_the_epoch_to_be_evaluated():
    class Stopping(Toy):
        stopping = True

        def eval_step(self, batch, criterion):
            if self.stopping:
                os.kill(os.getpid(), signal.SIGINT)
            return super().eval_step(batch, criterion)

    trainer = build(Stopping, epochs=2)
    with pytest.raises(SystemExit):
        trainer.fit()
    assert (trainer.total_steps_done, trainer.epochs_done, trainer.batches_done) == (3, 0, 3)
    Stopping.stopping = False
    second = continued(trainer, epochs=2)
    second.fit()
    whole = build(epochs=2)
    whole.fit()
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    assert second.best_loss == whole.best_loss


@pytest.mark.parametrize("size", [0, 1000], ids=["empty", "truncated"])
def test_a_damaged_newest_checkpoint_is_told_of_and_the_one_before_it_used(caplog, size):
    whole = build(epochs=3, save_step=2)
    whole.fit()
    first = build(epochs=3, save_step=2, max_steps=5, run_eval=False)
    first.fit()
    for name in ("checkpoint_5.pth", "best_model.pth"):
        with open(first.output_path / name, "r+b") as file:
            file.truncate(size)
    second = continued(first, epochs=3, save_step=2)
    second.fit()
    assert "checkpoint_5.pth: damaged" in caplog.text
    assert "continuing from checkpoint_4.pth instead" in caplog.text
    assert_same_weights(weights_of(second.model), weights_of(whole.model))


def test_when_all_checkpoints_are_damaged_the_newest_is_named():
    first = build(epochs=1, run_eval=False)
    first.fit()
    for path in first.output_path.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint_3\.pth: damaged"):
        continued(first).fit()


def test_another_number_of_threads_is_told(caplog):
    """Sums are then cut up in another way: the run goes on, but not to the same bits."""
    first = build(epochs=2, max_steps=2)
    first.fit()
    threads = torch.get_num_threads()
    continued(first, epochs=2, max_steps=3).fit()
    assert "rounding otherwise" not in caplog.text
    torch.set_num_threads(threads + 1)
    try:
        continued(first, epochs=2).fit()
    finally:
        torch.set_num_threads(threads)
    assert f"rounding otherwise than before: threads: {threads + 1}, before {threads}" in caplog.text


class Ending(Toy):
    """Remembers the weights that it was tested with, and what was told at the end of an epoch."""

    ends = ()

    def test_run(self, trainer):
        self.ends = (float(self.layer.weight.sum()),)

    def on_epoch_end(self, trainer):
        self.ends = (*self.ends, trainer.keep_avg_train.means["loss"])


@pytest.mark.parametrize(
    ("by", "point"),
    [(None, "on_eval_step_end"), (signal.SIGTERM, "on_eval_step_end"), (signal.SIGTERM, "on_eval_epoch_end")],
    ids=["killed", "SIGTERM", "SIGTERM at its end"],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 6},
        {"max_steps": 5},
        {"early_stopping_patience": 1, "early_stopping_min_delta": 100.0},
        {"early_stopping_patience": 1, "early_stopping_min_delta": 100.0, "run_eval_steps": 2, "run_eval_epochs": 9},
    ],
    ids=["at the end of an epoch", "in an epoch", "stopped early", "stopped early in an epoch"],
)
def test_stopped_in_its_last_evaluation_a_run_still_ends_as_it_would_have(settings, by, point):
    settings = {**settings, "model_class": Ending, "save_step": 1, "dropout": 0.3, "lr": 0.01, "epochs": 4}
    whole = build(**settings)
    whole.fit()

    def stop(trainer):
        if trainer.total_steps_done == whole.total_steps_done:
            if by is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), by)

    first = build(callbacks={point: stop}, **settings)
    with pytest.raises(SystemExit if by else KeyboardInterrupt):
        first.fit()
    second = continued(first, **settings)
    second.fit()
    assert second.total_steps_done == second.last_eval_step == whole.total_steps_done
    assert (second.best_loss, second.epochs_done) == (whole.best_loss, whole.epochs_done)
    assert second.model.ends == whole.model.ends
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    best = [load_checkpoint(trainer.output_path / "best_model.pth")["step"] for trainer in (whole, second)]
    assert best[0] == best[1]


@pytest.mark.parametrize("stop", [3, 4], ids=["after an epoch", "in an epoch"])
def test_callbacks_that_draw_for_an_epoch(stop):
    """They are called once more when a run goes on, and at its stop."""
    names = ("on_init_end", "on_epoch_start", "on_train_epoch_start", "on_train_epoch_end", "on_epoch_end")
    drawn = {}

    def drawing(name):
        def draw(trainer):
            numbers = torch.rand(()).item(), random.random(), np.random.rand()
            assert drawn.setdefault((name, trainer.epochs_done), numbers) == numbers

        return draw

    settings = {"epochs": 3, "dropout": 0.3, "callbacks": {name: drawing(name) for name in names}}
    whole = build(**settings)
    whole.fit()
    assert len({drawn["on_epoch_start", epoch] for epoch in range(3)}) == 3
    first = build(**settings, max_steps=stop)
    first.fit()
    second = continued(first, **settings)
    second.fit()
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    without = build(epochs=3, dropout=0.3)
    without.fit()
    assert_same_weights(weights_of(without.model), weights_of(whole.model))


def test_the_batch_of_overfit_batch_stays_the_same_in_a_continued_run():
    def noisy(samples):
        batch = collate(samples)
        return {**batch, "x": batch["x"] + torch.randn(())}

    def loader():
        return DataLoader(make_samples(8), batch_size=4, shuffle=True, collate_fn=noisy)

    def train(steps=None, run=""):
        args = TrainerArgs(overfit_batch=True, continue_path=run)
        trainer = build(args=args, max_steps=steps, train_loader=loader(), epochs=3, dropout=0.3)
        trainer.fit()
        return trainer

    whole, first = train(), train(steps=3)
    second = train(run=str(first.output_path))
    assert whole.model.seen == 6 * whole.model.seen[:1]
    assert second.model.seen == whole.model.seen[3:]
    assert_same_weights(weights_of(second.model), weights_of(whole.model))

"""What a Trainer does after the launcher has restarted its process."""

import json
import os

import pytest
import torch

from tests.trainer.toys import assert_same_weights, build, weights_of
from trainer import TrainerArgs, restarts


@pytest.fixture
def new_process(tmp_path, monkeypatch):
    """Makes the module as it is in a new process, which the launcher has started; returns the file it names."""
    file = tmp_path / "runs.txt"

    def begin():
        monkeypatch.setenv("TRAINER_RESTART_FILE", str(file))
        monkeypatch.setattr(restarts, "_file", None)
        monkeypatch.setattr(restarts, "_runs_opened", 0)
        return file

    yield begin
    monkeypatch.undo()


def train(folder, seed, steps=None, args=None, **settings):
    """A run of twelve updates, or of fewer."""
    settings = {"dropout": 0.5, "max_steps": steps, "epochs": 4, "train": 12, **settings}
    trainer = build(seed=seed, args=args, output_path=str(folder), **settings)
    trainer.fit()
    return trainer


def test_each_trainer_goes_on_in_its_own_folder(new_process, tmp_path):
    whole = [train(tmp_path / "whole", seed) for seed in range(2)]
    file = new_process()
    before = [train(tmp_path / "parts", 0), train(tmp_path / "parts", 1, steps=5)]
    assert file.read_text().splitlines() == [f"{i} {trainer.output_path}" for i, trainer in enumerate(before)]
    file.write_text(2 * file.read_text())  # as by two machines
    assert "TRAINER_RESTART_FILE" not in os.environ  # processes that this one starts have other runs
    new_process()
    after = [train(tmp_path / "parts", seed) for seed in range(3)]
    assert [trainer.output_path for trainer in after[:2]] == [trainer.output_path for trainer in before]
    assert len(after[0].model.seen) == 0
    assert len(after[1].model.seen) == 7
    for trainer, expected in zip(after, whole):
        assert_same_weights(weights_of(trainer.model), weights_of(expected.model))
    # the third was not there before
    assert after[2].output_path.parent == tmp_path / "parts"
    assert len(after[2].model.seen) == 12
    assert sorted({*file.read_text().splitlines()}) == [f"{i} {trainer.output_path}" for i, trainer in enumerate(after)]


def test_without_a_checkpoint_it_begins_anew_in_that_folder(new_process, tmp_path):
    source = train(tmp_path / "source", 3, steps=2)
    args = {"restore_path": str(source.output_path / "checkpoint_2.pth")}
    expected = train(tmp_path / "whole", 1, args=TrainerArgs(**args))
    new_process()
    lost = build(seed=1, args=TrainerArgs(**args), output_path=str(tmp_path / "lost"))
    folder = lost.output_path
    lost.close_run()
    (folder / ".checkpoint_1.pth.77.tmp").write_bytes(b"half")  # it was killed while it wrote its first one
    new_process()
    found = train(tmp_path / "lost", 1, args=TrainerArgs(**args))
    assert found.output_path == folder
    assert not (folder / ".checkpoint_1.pth.77.tmp").exists()
    assert found.total_steps_done == 12
    assert_same_weights(weights_of(found.model), weights_of(expected.model))


def test_a_run_that_was_continued_is_continued_again(new_process, tmp_path):
    whole = train(tmp_path / "whole", 0)
    first = train(tmp_path / "parts", 0, steps=4)
    args = {"continue_path": str(first.output_path)}
    file = new_process()
    train(tmp_path / "parts", 0, steps=7, args=TrainerArgs(**args))
    new_process()
    last = train(tmp_path / "parts", 0, args=TrainerArgs(**args))
    assert len(last.model.seen) == 5
    assert file.read_text() == f"0 {first.output_path}\n"
    assert_same_weights(weights_of(last.model), weights_of(whole.model))


def test_a_best_path_is_taken_over_once(new_process, tmp_path):
    """After a restart, with the same arguments, the best loss reached since counts."""
    first = train(tmp_path / "parts", 0, steps=4, save_step=1000)
    best, given = tmp_path / "best.pth", {"train_loss": 5.0, "eval_loss": 100.0}
    torch.save({**torch.load(first.output_path / "best_model.pth", weights_only=True), "model_loss": given}, best)
    args = {"continue_path": str(first.output_path), "best_path": str(best)}

    def restarted():
        new_process()
        trainer = build(args=TrainerArgs(**args), epochs=4, train=12, dropout=0.5, save_step=1000)
        trainer.open_run()
        return trainer

    assert restarted().best_loss == given
    assert restarted().best_loss == given  # it was killed before it had saved
    new_process()
    second = train(tmp_path / "parts", 0, steps=7, args=TrainerArgs(**args))
    assert second.best_loss["eval_loss"] < 100.0
    assert restarted().best_loss == second.best_loss


def test_a_batch_size_that_was_found_is_kept(new_process, tmp_path):
    def fit(folder, steps=None):
        trainer = build(output_path=str(folder), max_steps=steps, dropout=0.5, batch_size=2)
        trainer.fit_with_largest_batch_size(starting_batch_size=6)
        return trainer

    whole = fit(tmp_path / "whole")
    new_process()
    before = fit(tmp_path / "parts", steps=3)
    new_process()
    after = fit(tmp_path / "parts")
    assert after.output_path == before.output_path
    assert after.config.batch_size == 12
    assert json.loads((after.output_path / "config.json").read_text())["batch_size"] == 12
    assert (after.total_steps_done, len(after.model.seen)) == (whole.total_steps_done, 3)
    assert_same_weights(weights_of(after.model), weights_of(whole.model))


def test_without_a_launcher_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("TRAINER_RESTART_FILE", raising=False)
    monkeypatch.setattr(restarts, "_file", None)
    folders = [train(tmp_path, 0, steps=1).output_path for _ in range(2)]
    assert folders[0] != folders[1]
    assert restarts.earlier_folder() is None
    assert sorted(tmp_path.iterdir()) == sorted(folders)

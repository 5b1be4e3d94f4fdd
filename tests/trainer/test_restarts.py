"""What a Trainer does after the launcher has restarted its process."""

import os

import pytest

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
    assert file.read_text().splitlines() == [str(trainer.output_path) for trainer in before]
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
    assert file.read_text().splitlines() == [str(trainer.output_path) for trainer in after]


def test_without_a_checkpoint_it_begins_anew_in_that_folder(new_process, tmp_path):
    source = train(tmp_path / "source", 3, steps=2)
    args = {"restore_path": str(source.output_path / "checkpoint_2.pth")}
    expected = train(tmp_path / "whole", 1, args=TrainerArgs(**args))
    new_process()
    lost = build(seed=1, args=TrainerArgs(**args), output_path=str(tmp_path / "lost"))
    folder = lost.output_path
    lost.close_run()
    new_process()
    found = train(tmp_path / "lost", 1, args=TrainerArgs(**args))
    assert found.output_path == folder
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
    assert file.read_text() == f"{first.output_path}\n"
    assert_same_weights(weights_of(last.model), weights_of(whole.model))


def test_without_a_launcher_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("TRAINER_RESTART_FILE", raising=False)
    monkeypatch.setattr(restarts, "_file", None)
    folders = [train(tmp_path, 0, steps=1).output_path for _ in range(2)]
    assert folders[0] != folders[1]
    assert restarts.earlier_folder() is None
    assert sorted(tmp_path.iterdir()) == sorted(folders)

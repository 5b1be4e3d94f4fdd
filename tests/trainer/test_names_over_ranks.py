"""Two optimizers that log a loss of the same name, and steps in which the first optimizer's batch is skipped."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.trainer.toys import ToyGan, build
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs
from trainer.checkpoint import load_checkpoint, save_checkpoint


class Named(ToyGan):
    """Optimizer 0 logs the number of the update, optimizer 1 a hundred more, both as ``score``."""

    skipping: tuple[str, ...] = ()  # ranks on which the first update has no batch for optimizer 0

    def on_train_step_start(self, trainer):
        self.update = trainer.total_steps_done + 1

    def train_step(self, batch, criterion, optimizer_idx):
        outputs, losses = super().train_step(batch, criterion, optimizer_idx)
        if self.training and self.update == 1 and optimizer_idx == 0 and os.environ.get("RANK", "0") in self.skipping:
            return None, None
        return outputs, {"loss": losses["loss"], "score": float(self.update + 100 * optimizer_idx)}


class SkippedByOne(Named):
    skipping = ("0",)


class SkippedByAll(Named):
    skipping = ("0", "1")


class LaterSeen(Named):
    """Optimizer 1 logs its score from the second update on, optimizer 0 only in the fourth."""

    def train_step(self, batch, criterion, optimizer_idx):
        outputs, losses = super().train_step(batch, criterion, optimizer_idx)
        if self.training and self.update < (4, 2)[optimizer_idx]:
            del losses["score"]
        return outputs, losses


def train(model_class, folder: Path, world_size: int, **settings):
    """Four updates of four samples each, on all ranks together."""
    size = 4 // world_size
    settings = {"epochs": 1, "train": 16, "lr": 0.02, "print_step": 100, **settings}
    trainer = build(model_class, batch_size=size, eval_batch_size=size, output_path=str(folder), **settings)
    trainer.fit()
    return trainer


def scores(trainer) -> dict[str, dict[str, float]]:
    """The means that are shown, of training and evaluation."""
    averages = {"train": trainer.keep_avg_train, "eval": trainer.keep_avg_eval}
    return {part: {k: v for k, v in of.means.items() if k.startswith("score")} for part, of in averages.items()}


def in_two_parts(model_class, folder: Path, world_size: int):
    """Stopped after the first update, and continued."""
    first = train(model_class, folder, world_size, max_steps=1)
    if world_size > 1:
        dist.barrier()  # until the checkpoint is written
    return train(model_class, folder, world_size, args=TrainerArgs(continue_path=str(first.output_path)))


def work(rank: int, folder: Path) -> dict:
    found = {}
    for kind in (SkippedByOne, SkippedByAll):
        found[kind.__name__] = scores(train(kind, folder, 2))
        found[f"{kind.__name__} in two parts"] = scores(in_two_parts(kind, folder, 2))
    return found


# update u counts u, or 100 + u; two samples of each rank in an update
BY_ONE = {"score": (1 + 2 * (2 + 3 + 4)) / 7, "score-1": 102.5}
BY_ALL = {"score": 102.5, "score-0": 3.0}  # optimizer 1 came first
EXPECTED = {
    "SkippedByOne": {"train": BY_ONE, "eval": {"score": 4.0, "score-1": 104.0}},
    "SkippedByAll": {"train": BY_ALL, "eval": {"score": 104.0, "score-0": 4.0}},
}


def test_ranks_add_up_what_belongs_together(tmp_path):
    expected = {**EXPECTED, **{f"{name} in two parts": means for name, means in EXPECTED.items()}}
    assert on_two_ranks(tmp_path, work, in_a_group=True) == [expected] * 2


@pytest.mark.parametrize("training", [train, in_two_parts])
def test_a_name_stays_with_the_optimizer_that_had_it_first(training, tmp_path):
    assert scores(training(SkippedByAll, tmp_path, 1)) == EXPECTED["SkippedByAll"]


def test_an_evaluation_does_not_take_a_name_that_the_training_has_not_shown_yet(tmp_path):
    """Which is read at every saving: a run that is not saved in between has the same names."""
    for folder, step in (("saved", 2), ("unsaved", 100)):
        trainer = train(LaterSeen, tmp_path / folder, 1, save_step=step, run_eval_steps=3)
        assert scores(trainer)["train"] == {"score": (102 + 103 + 104) / 3, "score-0": 4.0}


def test_a_checkpoint_of_before(tmp_path):
    """It does not say whose the names are."""
    first = train(SkippedByAll, tmp_path, 1, max_steps=1)
    for path in first.output_path.glob("*.pth"):
        state = load_checkpoint(path)
        assert state["averages"].pop("owners")["score"] == 1
        save_checkpoint(state, path)
    second = train(SkippedByAll, tmp_path, 1, args=TrainerArgs(continue_path=str(first.output_path)))
    assert second.total_steps_done == 4

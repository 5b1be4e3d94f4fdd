"""What one rank alone meets in a training on two: skipped batches, other buffers, frozen layers, other data."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.test_several_ranks import Normed
from tests.trainer.toys import Toy, ToyConfig, ToyGan, build, collate, make_samples
from tests.trainer.two_ranks import on_two_ranks
from trainer import checkpoint_file
from trainer.data.loader import build_loader


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Skipping(Toy):
    """Rank 1 skips its third batch."""

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        return (None, None) if self.training and len(self.seen) == 3 and rank() == 1 else (outputs, losses)


class Growing(Normed):
    """With a cache that is longer on rank 1, in front of BatchNorm's statistics."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("positions", torch.zeros(1), persistent=False)

    def train_step(self, batch, criterion):
        if self.training:
            self.positions = torch.arange(float(len(self.positions) + 1 + rank()))
        return super().train_step(batch, criterion)


class FrozenLater(ToyGan):
    """The discriminator is frozen from the second epoch on."""

    def on_epoch_start(self, trainer):
        self.disc.requires_grad_(trainer.epochs_done == 0)


class FrozenSkipping(ToyGan):
    """The discriminator is always frozen, and rank 1 skips its second pass; both count for its schedule."""

    def __init__(self, config):
        super().__init__(config)
        self.disc.requires_grad_(False)

    def train_step(self, batch, criterion, optimizer_idx):
        result = super().train_step(batch, criterion, optimizer_idx)
        is_skipped = optimizer_idx == 0 and self.training and self.forwards == 2 and rank() == 1
        return (None, None) if is_skipped else result

    def get_scheduler(self, optimizers):
        return [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]


class ThawedInside(ToyGan):
    """Thaws in each pass what it trains; rank 1 skips the first batch before that."""

    def __init__(self, config):
        super().__init__(config)
        self.requires_grad_(False)
        self.calls = 0

    def train_step(self, batch, criterion, optimizer_idx):
        self.calls += self.training and optimizer_idx == 0
        if self.training and self.calls == 1 and rank() == 1:
            return None, None
        self.generator.requires_grad_(optimizer_idx == 1)
        self.disc.requires_grad_(optimizer_idx == 0)
        if optimizer_idx == 1:
            batch["fake"] = self.generator(batch["x"])
        return super().train_step(batch, criterion, optimizer_idx)


class Shared(Toy):
    """A layer that two optimizers have, of which the second pass does not use it."""

    def __init__(self, config):
        super().__init__(config)
        self.other = nn.Linear(3, 1)

    def train_step(self, batch, criterion, optimizer_idx):
        layer = self.layer if optimizer_idx == 0 else self.other
        return {}, {"loss": criterion(layer(batch["x"]).squeeze(1), batch["y"])}

    eval_step = train_step

    def get_optimizer(self):
        groups = [*self.layer.parameters()], [*self.other.parameters(), *self.layer.parameters()]
        return [torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.3) for parameters in groups]


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError("no memory left, say")


class Failing(Toy):
    """Its second backward pass fails."""

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        fails = self.training and len(self.seen) == 2
        return outputs, {"loss": _Fails.apply(losses["loss"]) if fails else losses["loss"]}


def train(model_class, folder: Path, world_size: int, train=8, seed=0, **settings):
    config = ToyConfig(epochs=2, lr=0.02, print_step=100, output_path=str(folder), **settings)
    config.batch_size = config.eval_batch_size = 4 // world_size
    trainer = build(model_class, train=train, seed=seed, config=config)
    if model_class is Failing:
        with pytest.raises(RuntimeError, match="no memory left"):
            trainer.fit()
    trainer.fit()
    return trainer


CASES = {"frozen later": FrozenLater, "shared": Shared, "second fit": Failing}


def work(number: int, folder: Path) -> dict:
    found = {name: train(kind, folder, 2).model.state_dict() for name, kind in CASES.items()}
    found["plotting"] = train(Skipping, folder, 2, train=24, plot_step=3).keep_avg_train.means
    found["buffers"] = dict(train(Growing, folder, 2).model.named_buffers())
    found["rates"] = [
        o.param_groups[0]["lr"] for o in train(FrozenSkipping, folder, 2, scheduler_after_epoch=False).optimizer
    ]
    found["thawed"] = train(ThawedInside, folder, 2).model.state_dict()
    found["averages"] = train(Toy, folder, 2, seed=number, ema_decay=0.9).ema.state_dict()["weights"]
    with pytest.raises(ValueError, match=r"the ranks have \[2, 3\] batches") as error:
        train(Toy, folder, 2, train=8 + 4 * number)
    found["lengths"] = str(error.value)
    write = checkpoint_file.write_file
    checkpoint_file.write_file = lambda *args: (time.sleep(0.3), write(*args))
    found["files"] = sorted(path.name for path in train(Toy, folder, 2).output_path.glob("*.pth"))
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), work, in_a_group=True)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank(two_ranks, name, tmp_path):
    alone = train(CASES[name], tmp_path, 1).model.state_dict()
    for found in two_ranks:
        for key, weight in alone.items():
            torch.testing.assert_close(found[name][key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["thawed", "averages"])
def test_ranks_stay_equal(two_ranks, name):
    first, second = (found[name] for found in two_ranks)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_rank_that_skips_the_batch_to_plot(two_ranks):
    assert two_ranks[0]["plotting"] == two_ranks[1]["plotting"]


def test_caches_of_different_sizes(two_ranks):
    first, second = (found["buffers"] for found in two_ranks)
    assert (len(first.pop("positions")), len(second.pop("positions"))) == (5, 9)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_schedule_of_a_frozen_optimizer(two_ranks):
    assert [found["rates"] for found in two_ranks] == [[0.02 / 16, 0.02 / 16]] * 2


def test_other_data_on_a_rank_is_an_error(two_ranks):
    assert two_ranks[0]["lengths"] == two_ranks[1]["lengths"]


def test_files_are_there_when_fit_returns(two_ranks):
    assert [found["files"] for found in two_ranks] == [["best_model.pth", "checkpoint_4.pth"]] * 2


def test_one_loader_with_workers_for_training_and_evaluation(tmp_path):
    loader = build_loader(make_samples(8), 2, collate_fn=collate, seed=0, shuffle=True, num_workers=1)
    config = ToyConfig(epochs=1, run_eval_steps=1, output_path=str(tmp_path))
    trainer = build(train_loader=loader, eval_loader=loader, config=config)
    trainer.fit()
    assert trainer.total_steps_done == 4

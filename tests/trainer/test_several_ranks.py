"""The Trainer on two ranks against one rank on the joint batch: weights, losses, orders, checkpoints, and stopping."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tests.trainer.toys import Toy, ToyGan, build, collate, make_samples
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs


class Manual(Toy):
    """Optimizes by itself."""

    def optimize(self, batch, trainer):
        trainer.optimizer[0].zero_grad()
        outputs, losses = self.train_step(batch, trainer.criterion[0])
        self.scaled_backward(losses["loss"], trainer)
        trainer.optimizer[0].step()
        return outputs, losses


class Normed(Toy):
    """BatchNorm, in front and behind."""

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Sequential(*normed_layers(), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 1))


class NormedManual(Manual, Normed):
    """Optimizes by itself."""


class NormedGan(ToyGan):
    """With a generator that has BatchNorm."""

    def __init__(self, config):
        super().__init__(config)
        self.generator = torch.nn.Sequential(*normed_layers(), torch.nn.Flatten(), torch.nn.Linear(12, 1))


def normed_layers() -> list:
    return [torch.nn.Linear(3, 12), torch.nn.Unflatten(1, (4, 3)), torch.nn.BatchNorm1d(4)]


class Stopping(Toy):
    """Gets a signal on one rank in the middle of the third update."""

    def train_step(self, batch, criterion):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return super().train_step(batch, criterion)


class Spoiled(Toy):
    """Its loss is NaN on rank 1 alone, in the third update."""

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        bad = self.training and len(self.seen) == 3 and os.environ["RANK"] == "1"
        return outputs, {"loss": losses["loss"] * (float("nan") if bad else 1.0)}


def plain_loaders(size: int) -> dict:
    """Loaders that no rank knows of."""
    samples, evaluation = make_samples(13), make_samples(7, seed=1)
    return {
        "train_loader": DataLoader(samples, batch_size=size, collate_fn=collate),
        "eval_loader": DataLoader(evaluation, batch_size=size, collate_fn=collate),
    }


SYNC = {"sync_batchnorm": True, "drift_check_steps": 2}
# of 13 samples in global batches of 4, the last is one sample: rank 1 has none of its own
CASES = {
    "plain": {},
    "adam and clipping": {"optimizer": "AdamW", "grad_clip": 0.3},
    "accumulated": {"args": {"grad_accum_steps": 2}},
    "gan": {"model_class": ToyGan, "lr": 0.02, "args": {"grad_accum_steps": 2}},
    "manual": {"model_class": Manual, "args": {"grad_accum_steps": 2}},
    "plain loaders": {"loaders": True},
    "averaged weights": {"ema_decay": 0.5},
    "normalized": {"model_class": Normed, **SYNC},
    "normalized gan": {"model_class": NormedGan, "lr": 0.02, **SYNC},
    "normalized manual": {"model_class": NormedManual, **SYNC},
}


def train(name: str, world_size: int, folder: Path, **settings) -> dict:
    """Train; batch sizes are per rank, so that the global batch is the same for any number of ranks."""
    size = 4 // world_size
    args = TrainerArgs(**settings.pop("args", {}))
    if settings.pop("loaders", False):
        settings.update(plain_loaders(size))
    trainer = build(
        train=13,
        evaluation=7,
        args=args,
        batch_size=size,
        eval_batch_size=size,
        output_path=str(folder / name),
        **{"epochs": 3, "print_step": 1, **settings},
    )
    code, error = None, ""
    try:
        trainer.fit()
    except SystemExit as stopped:
        code = stopped.code
    except FloatingPointError as not_finite:
        error = str(not_finite)
    return {
        "code": code,
        "error": error,
        "skipped": trainer.guard.skipped,
        "steps": trainer.total_steps_done,
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "train": trainer.keep_avg_train.means,
        "eval": trainer.keep_avg_eval.means,
        "best": trainer.best_loss,
        "folder": str(trainer.output_path),
    }


def train_cases(rank: int, folder: Path) -> dict:
    """All cases, and a run that is stopped in the middle of an epoch and continued."""
    results = {name: train(name, 2, folder, **settings) for name, settings in CASES.items()}
    results["whole"] = train("whole", 2, folder, dropout=0.5)
    first = train("parts", 2, folder, dropout=0.5, max_steps=6)
    dist.barrier()  # until the checkpoint is written
    results["parts"] = train("parts", 2, folder, dropout=0.5, args={"continue_path": first["folder"]})
    results["nan"] = train("nan", 2, folder, model_class=Spoiled)
    results["early"] = train("early", 2, folder, epochs=9, early_stopping_patience=2, early_stopping_min_delta=100.0)
    results["nan skipped"] = train("nan skipped", 2, folder, model_class=Spoiled, nan_policy="skip")
    return results


def train_until_stopped(rank: int, folder: Path) -> dict:
    """A run that one rank is told to stop."""
    return {"stopped": train("stopped", 2, folder, model_class=Stopping)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What both ranks found, case by case."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), train_cases, in_a_group=True)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank_with_the_joint_batch(two_ranks, name, tmp_path):
    alone = train(name, 1, tmp_path, **CASES[name])
    first, second = (found[name] for found in two_ranks)
    for found in (first, second):
        assert found["steps"] == alone["steps"] == (12 if "args" not in CASES[name] else 6)
        for key, weight in alone["weights"].items():
            # fp32: sums of at most twelve terms in another order, through at most twelve updates
            torch.testing.assert_close(found["weights"][key], weight, rtol=1e-4, atol=1e-5)
        for part in ("train", "eval"):
            assert found[part] == pytest.approx(alone[part], rel=1e-4, abs=1e-6)
    for key, weight in first["weights"].items():
        assert torch.equal(second["weights"][key], weight)
    for part in ("train", "eval", "best", "folder"):
        assert first[part] == second[part]


def test_a_continued_run_of_two_ranks_is_the_whole_one(two_ranks):
    for found in two_ranks:
        assert found["parts"]["steps"] == found["whole"]["steps"] == 12
        for key, weight in found["whole"]["weights"].items():
            assert torch.equal(found["parts"]["weights"][key], weight)
    folder = Path(two_ranks[0]["parts"]["folder"])
    states = torch.load(folder / "checkpoint_6.pth", weights_only=True)["rng"]
    assert sorted(states) == ["0", "1"]
    assert not torch.equal(states["0"]["torch"], states["1"]["torch"])


def test_a_signal_to_one_rank_stops_and_saves_both(tmp_path):
    first, second = (found["stopped"] for found in on_two_ranks(tmp_path, train_until_stopped, in_a_group=True))
    assert first["code"] == second["code"] == 128 + signal.SIGTERM
    assert first["steps"] == second["steps"] <= 4
    assert (Path(first["folder"]) / f"checkpoint_{first['steps']}.pth").is_file()


def test_early_stopping_is_decided_together(two_ranks):
    first, second = (found["early"] for found in two_ranks)
    # no later evaluation is better by so much than the first
    assert first["steps"] == second["steps"] == 3 * 4
    assert first["best"] == second["best"]


def test_nan_on_one_rank_stops_all_before_the_update(two_ranks):
    for rank in two_ranks:
        assert rank["nan"]["error"].startswith("step 3: loss is nan")
        assert rank["nan"]["steps"] == 2
        assert all(value.isfinite().all() for value in rank["nan"]["weights"].values())
    names = sorted(path.name for path in Path(two_ranks[0]["nan"]["folder"]).glob("bad_batch_*"))
    assert names == ["bad_batch_3.pth", "bad_batch_3_rank1.pth"]


def test_nan_on_one_rank_is_skipped_by_all(two_ranks):
    first, second = (rank["nan skipped"] for rank in two_ranks)
    assert first["skipped"] == second["skipped"] == 1
    assert first["steps"] == second["steps"] == 12
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
        assert value.isfinite().all()

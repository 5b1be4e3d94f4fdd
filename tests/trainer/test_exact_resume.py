"""Stopped anywhere and continued, a training is bit for bit the one that was never stopped: pairs of all conditions.

Compared are the losses of all forward passes, and all that the last checkpoint and the best model hold: weights,
optimizers, schedulers, scaler, average, early stopping, running means, random states and the place in the epoch.
"""

import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from tests.chaos.cases import Noisy
from tests.chaos.compare import differences
from tests.chaos.lives import steps_of
from tests.trainer.toys import Toy, ToyGan, build, collate, make_samples
from tests.trainer.two_ranks import on_two_ranks
from trainer import Trainer, TrainerArgs
from trainer.data.loader import build_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning"),
]
SAMPLES, BATCH, EPOCHS = 34, 6, 3  # six batches an epoch, the last one of four samples


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """A sync may take a tenth of a second on a busy disk; no machine loses its power here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Killed(Exception):
    """Ends a training without a word, as SIGKILL would."""


@dataclass(frozen=True)
class Stop:
    """Where a training is stopped, and how.

    Attributes:
        point: a callback, or ``window``: inside an accumulation window.
        update: so many updates are done then; counted from the beginning of the second epoch.
        by: a signal, or None for an exception.
    """

    point: str
    update: int | str
    by: int | None = None


STOPS = {
    "killed in an epoch": Stop("on_train_step_end", "middle"),
    "killed in a window": Stop("window", "middle"),
    "killed in an evaluation": Stop("on_eval_step_end", "end"),
    "killed before the evaluation": Stop("on_train_epoch_end", "end"),
    "killed after the evaluation": Stop("on_epoch_end", "end"),
    "Ctrl-C in an epoch": Stop("on_train_step_start", "middle", signal.SIGINT),
    "SIGTERM in a window": Stop("window", "middle", signal.SIGTERM),
    "Ctrl-C in an evaluation": Stop("on_eval_step_end", "end", signal.SIGINT),
}
SCHEDULERS = {
    "none": {},
    "by step": {
        "lr_scheduler": "CosineAnnealingLR",
        "lr_scheduler_params": {"T_max": 9},
        "scheduler_after_epoch": False,
    },
    "by epoch": {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.7}},
    "by evaluation": {
        "lr_scheduler": "ReduceLROnPlateau",
        "lr_scheduler_params": {"patience": 0, "threshold": 0.3},
        "lr_scheduler_unit": "evaluation",
    },
}
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.1}}


class Recorded:
    """Keeps the loss of every forward pass, by its update, and stops the training where it is told to."""

    update, stop = 0, None

    def reach(self, point: str) -> None:
        if self.stop == (point, self.update):
            by, self.stop, self.was_stopped = self.by, None, True
            if by is None:
                raise Killed
            os.kill(os.getpid(), by)

    def train_step(self, batch, criterion, *optimizer_idx):
        outputs, losses = super().train_step(batch, criterion, *optimizer_idx)
        if self.training:
            # as a model may that draws from python's and numpy's generators
            losses["loss"] = losses["loss"] * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
            passes = self.record.setdefault(self.update, [])
            passes.append(losses["loss"].item().hex())
            if len(passes) == 2 or self.passes == 1:
                self.reach("window")
        return outputs, losses

    def on_train_step_start(self, trainer):
        self.reach("on_train_step_start")

    def on_train_step_end(self, trainer):
        self.update = trainer.total_steps_done
        self.reach("on_train_step_end")

    def on_train_epoch_start(self, trainer):
        self.update = trainer.total_steps_done

    def on_train_epoch_end(self, trainer):
        self.reach("on_train_epoch_end")

    def on_eval_step_end(self, trainer):
        self.reach("on_eval_step_end")

    def on_epoch_end(self, trainer):
        self.reach("on_epoch_end")


class Net(Recorded, Toy):
    """One optimizer; BatchNorm has buffers, and dropout draws."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Sequential(nn.BatchNorm1d(config.features), nn.Dropout(config.dropout))


class Gan(Recorded, ToyGan):
    """Two optimizers, and dropout in the generator."""

    def __init__(self, config):
        super().__init__(config)
        self.generator = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.features, 1))

    def get_optimizer(self):
        make, options = getattr(torch.optim, self.config.optimizer), self.config.optimizer_params
        return [make(part.parameters(), lr=self.config.lr, **options) for part in (self.disc, self.generator)]


def own_loader(kind: str, dataset: Noisy, size: int, options: dict) -> DataLoader:
    """A loader as scripts make them."""
    n = len(dataset)
    how = {
        "shuffled": {"shuffle": True},
        "with a generator": {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
        "weighted": {"sampler": WeightedRandomSampler([1.0 + i % 3 for i in range(n)], n)},
        "of batches": {"batch_sampler": BatchSampler(RandomSampler(dataset), size, drop_last=False)},
    }[kind]
    if "batch_sampler" not in how:
        how["batch_size"] = size
    return DataLoader(dataset, collate_fn=collate, **how, **options)


def make_loader(kind: str, workers: int, persistent: bool, size: int = BATCH) -> DataLoader:
    """A training loader, whose workers draw random numbers."""
    dataset = Noisy(make_samples(SAMPLES))
    if kind == "ours":
        return build_loader(dataset, size, collate_fn=collate, seed=54321, shuffle=True, num_workers=workers)
    options = {"num_workers": workers}
    if persistent and workers:
        options |= {"persistent_workers": True, "prefetch_factor": 3}
    return own_loader(kind, dataset, size, options)


OPTIONS = {
    "stop": list(STOPS),
    "workers": [(0, 0), (2, 2), (4, 2), (2, 0)],  # before and after
    "loader": ["ours", "shuffled", "with a generator", "weighted", "of batches"],
    "accumulate": [1, 2, 4],
    "scheduler": list(SCHEDULERS),
    "precision": ["fp32", "bf16", "fp16"],
    "model": [Net, Gan],
    "optimizer": list(OPTIMIZERS),
    "persistent": [False, True],
    "save_async": [False, True],
    "ema_decay": [None, 0.9],
    "dropout": [0.0, 0.3],
    "patience": [None, 2],
}


def pairwise(options: dict[str, list]) -> list[dict]:
    """Cases in which every two values of different options come together at least once; the same in every process."""
    names, rng = list(options), random.Random(0)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(options[a])), range(len(options[b])))
    }
    cases = []
    while left:
        first = min(left)  # one pair that is missing, and the best of some fillings
        fillings = [{**{n: rng.randrange(len(options[n])) for n in names}, **dict(first)} for _ in range(60)]
        pairs = [left & set(itertools.combinations(filling.items(), 2)) for filling in fillings]
        best = max(range(len(fillings)), key=lambda i: len(pairs[i]))
        left -= pairs[best]
        cases.append({name: options[name][i] for name, i in fillings[best].items()})
    return cases


def train(folder: Path, case: dict, workers: int, stop: Stop | None = None, run: str = "", size: int = BATCH):
    """A training of a case, continued in the folder ``run``; returns the Trainer."""
    settings = {
        "epochs": EPOCHS,
        "save_step": 2,
        "save_async": case["save_async"],
        "dropout": case["dropout"],
        "ema_decay": case["ema_decay"],
        "early_stopping_patience": case["patience"],
        "mixed_precision": case["precision"] != "fp32",
        "precision": "fp16" if case["precision"] == "fp32" else case["precision"],
        "optimizer": case["optimizer"],
        "optimizer_params": OPTIMIZERS[case["optimizer"]],
        "lr": 0.02,
        **SCHEDULERS[case["scheduler"]],
    }
    trainer = build(
        case["model"],
        args=TrainerArgs(continue_path=run, grad_accum_steps=case["accumulate"]),
        seed=99 if run else 0,
        output_path=str(folder),
        train_loader=make_loader(case["loader"], workers, case["persistent"], size),
        **settings,
    )
    model = trainer.model
    model.record, model.was_stopped, model.passes = {}, False, case["accumulate"]
    if stop is not None:
        updates = -(-6 // case["accumulate"])
        after = {"middle": updates + updates // 2, "end": 2 * updates}[stop.update]
        model.stop, model.by = (stop.point, after), stop.by
    return trainer


def fit(trainer: Trainer) -> int | str | None:
    """The exit code with which a training is stopped."""
    try:
        trainer.fit()
    except SystemExit as stopped:
        return stopped.code
    except Killed:
        return "killed"
    finally:
        # found by the garbage collector, an iterator waits five seconds for each of its workers
        vars(trainer.train_loader)["_iterator"] = None
    return None


def check(whole: Trainer, first: Trainer, second: Trainer, start: int) -> list[str]:
    """What differs between a run, and another one that was stopped and went on from the update ``start``."""
    record, before = whole.model.record, first.model.record
    lines = differences(before, {update: record[update][: len(passes)] for update, passes in before.items()})
    before = {update: passes for update, passes in before.items() if update < start}
    lines += differences(record, {**before, **second.model.record})
    for name in (f"checkpoint_{whole.total_steps_done}.pth", "best_model.pth"):
        states = [torch.load(trainer.output_path / name, weights_only=True) for trainer in (whole, second)]
        lines += [f"{name}{line}" for line in differences(*states)]
    return lines


def run_case(folder: Path, case: dict, size: int = BATCH, meet: Callable[[], None] = lambda: None) -> list[str]:
    """What differs when a case is stopped and continued; on several ranks they meet when files have to be there."""
    stop, (before, after) = STOPS[case["stop"]], case["workers"]
    whole = train(folder, case, before, size=size)
    assert fit(whole) is None
    first = train(folder, case, before, stop, size=size)
    assert fit(first) == ("killed" if stop.by is None else 128 + stop.by)
    assert first.model.was_stopped
    meet()
    saved = max(steps_of(first.output_path).values())
    second = train(folder, case, after, run=str(first.output_path), size=size)
    second.open_run()
    start = second.total_steps_done
    # a kill loses what came after the last checkpoint, a signal nothing
    assert start == (first.total_steps_done if stop.by else saved)
    assert fit(second) is None
    meet()
    return check(whole, first, second, start)


CASES = pairwise(OPTIONS)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_stopped_and_continued(tmp_path, number):
    assert run_case(tmp_path, CASES[number]) == [], CASES[number]


# ---- two processes ----

PLAIN = {
    "stop": "killed in an epoch",
    "workers": (0, 0),
    "loader": "shuffled",
    "accumulate": 1,
    "scheduler": "none",
    "precision": "fp32",
    "model": Net,
    "optimizer": "AdamW",
    "persistent": False,
    "save_async": True,
    "ema_decay": None,
    "dropout": 0.3,
    "patience": None,
}
ON_TWO_RANKS = {
    "signal": {"stop": "Ctrl-C in an epoch", "workers": (2, 0), "scheduler": "by evaluation", "patience": 2},
    "gan": {"model": Gan, "stop": "killed in a window", "accumulate": 2, "loader": "weighted", "ema_decay": 0.9},
    "fp16": {"precision": "fp16", "stop": "killed in an evaluation", "scheduler": "by step", "save_async": False},
}


def work_on_two_ranks(rank: int, folder: Path) -> dict[str, list[str]]:
    """What differs in each of the cases; batches are half as large."""
    os.fsync = lambda file: None
    multiprocessing.current_process()._config["daemon"] = False  # a daemon may not start the loader's workers
    multiprocessing.set_start_method("fork", force=True)  # a process that was spawned would spawn them
    return {name: run_case(folder / name, {**PLAIN, **case}, 3, dist.barrier) for name, case in ON_TWO_RANKS.items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes found."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), work_on_two_ranks, in_a_group=True)


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_on_two_ranks(two_ranks, name):
    assert [found[name] for found in two_ranks] == [[], []]

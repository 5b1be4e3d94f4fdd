"""Small trainings of many kinds, which run in forked processes."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.chaos.harm import Harm, Watch
from tests.trainer.toys import Toy, ToyConfig, ToyGan, build, collate
from trainer import TrainerArgs, field
from trainer.data.loader import build_loader


@dataclass
class ChaosConfig(ToyConfig):
    """Logs everything, so that everything can be compared."""

    ballast: int = field(0, "Numbers in a buffer that makes checkpoints larger.", min=0)
    dashboard_logger: str = "tensorboard"
    plot_step: int = 1
    print_step: int = 1


class Noisy(torch.utils.data.Dataset):
    """Samples with noise of every generator, drawn where they are read."""

    def __init__(self, samples: list) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        x, y = self.samples[index]
        return x + 0.1 * torch.randn(()) + 0.1 * np.random.rand() + 0.1 * random.random(), y


def noisy_loader(model: Any, config: ChaosConfig, is_eval: bool, samples: list, verbose: bool) -> Any:
    """A loader of Noisy samples."""
    size = config.eval_batch_size if is_eval else config.batch_size
    workers = 0 if is_eval else config.num_loader_workers
    options = {"collate_fn": collate, "seed": config.training_seed, "shuffle": not is_eval, "num_workers": workers}
    return build_loader(Noisy(samples), size, **options)


class ChaosToy(Toy):
    """One optimizer."""

    def __init__(self, config: ChaosConfig) -> None:
        super().__init__(config)
        self.register_buffer("ballast", torch.zeros(config.ballast))

    get_data_loader = noisy_loader


class ChaosGan(ToyGan):
    """Two optimizers, and no assertion on batches."""

    def __init__(self, config: ChaosConfig) -> None:
        super().__init__(config)
        self.register_buffer("ballast", torch.zeros(config.ballast))

    get_data_loader = noisy_loader


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        model: its class.
        settings: of its config.
        accumulate: batches for one update.
        samples: of its data set.
    """

    model: type
    settings: dict[str, Any]
    accumulate: int
    samples: int


def draw_case(rng: random.Random) -> Case:
    """A training of 15 to 30 updates."""
    is_gan = rng.random() < 0.25
    settings = {
        "epochs": rng.choice([5, 6]),
        "save_step": rng.choice([1, 2, 3, 5, 7]),
        "save_n_checkpoints": rng.choice([1, 1, 2, 4]),
        "save_async": rng.random() < 0.7,
        "run_eval": rng.random() < 0.8,
        "run_eval_steps": rng.choice([None, None, 2, 5]),
        "run_eval_epochs": rng.choice([1, 1, 2]),
        **rng.choice([{}, {}, {"save_all_best": True}, {"save_n_best": 2}]),
        "num_loader_workers": 2 if rng.random() < 0.08 else 0,
        "ema_decay": rng.choice([None, None, 0.9]),
        "optimizer": rng.choice(["SGD", "AdamW"]),
        "lr": 0.01,
        "grad_clip": rng.choice([0.0, 0.5]),
        "ballast": rng.choice([0, 0, 50_000]),
    }
    if not is_gan:
        settings["dropout"] = rng.choice([0.0, 0.3])
        settings["mixed_precision"] = rng.random() < 0.15  # fp16, with loss scaling
        if rng.random() < 0.4:
            settings["lr_scheduler"], settings["lr_scheduler_params"] = "ExponentialLR", {"gamma": 0.95}
            settings["scheduler_after_epoch"] = rng.random() < 0.5
    accumulate = rng.choice([1, 1, 2])
    return Case(ChaosGan if is_gan else ChaosToy, settings, accumulate, rng.choice([12, 14, 17]) * accumulate)


def train(case: Case, home: Path, run: Path | None, harm: Harm, output: Path) -> None:
    """Train in this process, which was forked for it.

    Args:
        case: what to train.
        home: the folder in which the run's folder is made.
        run: the run to continue, relative to home; None for a new one.
        harm: what is to happen.
        output: a file for what is printed; the ledger and the trace are written beside.
    """
    os.setsid()  # for the parent to end the loaders' workers as well
    os.chdir(home)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    ledger = os.open(output.with_name("ledger.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch = Watch(Path("output"), harm, ledger)
    watch.install()
    args = TrainerArgs(continue_path=str(run) if run else "", grad_accum_steps=case.accumulate)
    trainer = build(
        case.model,
        case.samples,
        args=args,
        seed=99 if run else 0,  # what goes on has other weights and random numbers until it is restored
        config=ChaosConfig(),
        callbacks={"on_init_end": lambda trainer: watch.note("start", trainer.total_steps_done)},
        **case.settings,
    )
    trainer.fit()
    watch.save_trace(output.with_name("trace.json"))

"""VITS through the Trainer: overfitting one batch of speech, accumulation, and continuing bitwise."""

import functools
from pathlib import Path

import pytest
import torch

from models.vits import SMALL, Vits, VitsConfig
from tests.trainer.two_ranks import on_two_ranks
from trainer import Trainer, TrainerArgs, seed_everything
from trainer.data.ljspeech import read_ljspeech
from trainer.testing import overfit_with_trainer

QUIET = {"phonemes": False, "device": "cpu", "dashboard_logger": "none", "test_sentences": [], "print_step": 1000}


def config_of(tmp_path, **changes) -> VitsConfig:
    return VitsConfig(**{**SMALL, **QUIET, "cache_dir": str(tmp_path / "cache"), **changes})


@pytest.mark.parametrize("data", ["ljspeech_sample", "tiny_ljspeech"])
def test_overfits_one_batch_of_speech(data, request, tmp_path):
    """The mel loss of the three shortest clips falls by a third in 80 updates, though the GAN never stands still."""
    samples = sorted(read_ljspeech(request.getfixturevalue(data)), key=lambda s: Path(s.path).stat().st_size)[:3]
    config = config_of(tmp_path, epochs=80, run_eval_epochs=80, batch_size=3, save_checkpoints=False)
    seed_everything(0)
    means = overfit_with_trainer(Vits(config), config, tmp_path, loss="loss_mel", below=0.67, train_samples=samples)
    assert means["loss_kl"] < 5  # 19 at first


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_continued_run_is_bitwise_the_undisturbed_one(tiny_ljspeech, tmp_path, accumulate):
    """Dropout, noise, random segments, two optimizers: four updates, and two times two with a stop in mid-epoch."""
    samples = read_ljspeech(tiny_ljspeech)

    def trained(max_steps: int, continue_path: str = "") -> Trainer:
        config = config_of(tmp_path, batch_size=2, run_eval=False, max_steps=max_steps, epochs=9)
        seed_everything(0 if not continue_path else 1)
        args = TrainerArgs(grad_accum_steps=accumulate, continue_path=continue_path)
        model = Vits(config)
        trainer = Trainer(args, config, tmp_path, model=model, train_samples=samples, parse_command_line_args=False)
        trainer.fit()
        return trainer

    whole = trained(3)
    stopped = trained(1)
    continued = trained(3, str(stopped.output_path))
    assert continued.total_steps_done == 3
    a, b = whole.model.state_dict(), continued.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def train_a_rank(samples: list, rank: int, folder: Path) -> dict:
    """Two updates of a rank, each accumulated over two batches; their weights before and after."""
    config = config_of(folder, batch_size=1, run_eval=False, max_steps=2, epochs=9, drift_check_steps=1)
    seed_everything(rank)  # the first rank's model becomes the other's
    model, args = Vits(config), TrainerArgs(grad_accum_steps=2)
    trainer = Trainer(args, config, folder, model=model, train_samples=samples, parse_command_line_args=False)
    trainer.open_run()
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer.fit()
    return {"before": before, "after": dict(model.named_parameters()), "noise": float(torch.rand(()))}


def test_two_ranks(tiny_ljspeech, tmp_path):
    """Outputs shared between the passes of two optimizers, through DistributedDataParallel."""
    first, second = on_two_ranks(
        tmp_path, functools.partial(train_a_rank, read_ljspeech(tiny_ljspeech)), in_a_group=True
    )
    assert first["noise"] != second["noise"]
    for name, value in first["after"].items():
        assert torch.equal(first["before"][name], second["before"][name])
        assert torch.equal(value, second["after"][name])
        assert not torch.equal(value, first["before"][name])

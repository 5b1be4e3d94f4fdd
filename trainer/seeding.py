"""Seeds, and the state of every random number generator that a training draws from."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer.config import TrainerConfig

_is_seeded = False  # whether the program has called seed_everything


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators (all devices). Call it before the model is built."""
    global _is_seeded
    _is_seeded = True
    seed_generators(seed)


def seed_unless_done(seed: int) -> None:
    """Seed all generators, unless the program has called seed_everything.

    Scripts for Coqui's Trainer leave it to the Trainer, which comes after the model's weights have been drawn.
    """
    if not _is_seeded:
        seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Seed python's, numpy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_backend_flags(config: TrainerConfig) -> None:
    """Set cuDNN's and TF32's switches to what the config says, whatever they were before."""
    torch.backends.cudnn.enabled = config.cudnn_enable
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32


def capture_rng_state() -> dict[str, Any]:
    """The state of all generators, as types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        # weights_only refuses numpy arrays
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put back what capture_rng_state returned; states of devices that are not here are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, index)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Run a block with freshly seeded generators and put the old states back afterwards.

    Evaluations draw the same random numbers every time, and training draws the same whether it is evaluated or not.
    """
    before = capture_rng_state()
    seed_generators(seed)
    try:
        yield
    finally:
        restore_rng_state(before)

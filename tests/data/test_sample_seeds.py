"""What the random generators are seeded with for each sample of a batch."""

import random
import struct

import numpy as np
import pytest
import torch

from trainer.data.samplers import SeededBatch, kept_rng, seed_rng

# printf "SEED EPOCH INDEX TIMES" | b2sum -l 96
DIGESTS = {(5, 2, 17, 0): "df6c027276a35cd7e00613a0", (5, 2, 17, 1): "10281051c65395452a3765d2"}


def draw() -> tuple[float, float, float]:
    """A number of each generator."""
    return random.random(), float(np.random.rand()), torch.rand((), dtype=torch.float64).item()


def drawn(indices: list, seed: int = 5, epoch: int = 2, times: list[int] | None = None) -> list[tuple]:
    return [draw() for _ in SeededBatch(indices, seed, epoch, times)]


@pytest.mark.parametrize("key", DIGESTS)
def test_seeds_are_the_words_of_a_hash(key):
    words = struct.unpack("<3I", bytes.fromhex(DIGESTS[key]))
    generator = torch.Generator().manual_seed(words[2])
    expected = (
        random.Random(words[0]).random(),
        np.random.RandomState(words[1]).rand(),
        torch.rand((), dtype=torch.float64, generator=generator).item(),
    )
    seed, epoch, index, times = key
    assert drawn([0, index, 3], seed, epoch, times=[0, times, 0])[1] == expected
    # of numpy's numbers too: samplers give them
    assert drawn([np.int64(index)], seed, epoch, times=[times]) == [expected]


def test_neighbours_have_nothing_in_common():
    """Indices, epochs and seeds that differ by one: the correlation of 4000 pairs is within 4 standard deviations."""
    n = 4000
    along = {
        "index": np.array(drawn(list(range(n)))),
        "epoch": np.array([drawn([0], epoch=epoch)[0] for epoch in range(n)]),
        "seed": np.array([drawn([0], seed=seed)[0] for seed in range(n)]),
    }
    for name, values in along.items():
        assert len(np.unique(values)) == 3 * n, name
        # uniform: mean 1/2 with variance 1/12
        assert np.abs(values.mean(0) - 0.5).max() < 4 * np.sqrt(1 / 12 / n), name
        pairs = np.concatenate([values[1:], values[:-1]], axis=1)  # of neighbours, and of the three generators
        apart = np.corrcoef(pairs.T) - np.eye(6)
        assert np.abs(apart).max() < 4 / np.sqrt(n), name


def test_orders_are_drawn_as_ever():
    """A checkpoint's place is one in the order that it was made with."""
    with kept_rng():
        seed_rng(5, (0, 2))
        found = draw()
    words = np.random.SeedSequence(5, spawn_key=(0, 2)).generate_state(3)
    assert found[:2] == (random.Random(int(words[0])).random(), np.random.RandomState(words[1]).rand())

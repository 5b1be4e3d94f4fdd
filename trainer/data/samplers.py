"""The order of samples: batches of indices that are the same for any number of ranks and workers.

The order is a function of (seed, epoch, data set): not of the number of workers or ranks, nor of what happened before.
What a data set draws for a sample (augmentation) is a function of (seed, epoch, index).

With several ranks, `batch_size` is per rank: a step takes a global batch of batch_size * ranks samples, which is the
same for any number of ranks with that product, and each rank takes its share of it. Where the product is another, the
batches are others, but without lengths the order of the samples is still the same.
"""

import contextlib
import hashlib
import itertools
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, get_worker_info

ORDER = 0  # keeps the random streams of orders apart from others


# ---- random numbers ----


@contextlib.contextmanager
def kept_rng(*generators: torch.Generator) -> Iterator[None]:
    """Put the states of python's, numpy's and torch's CPU generator, and of others, back after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    own = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for generator, state in zip(generators, own):
            generator.set_state(state)


def seed_rng(seed: int, key: tuple[int, ...]) -> None:
    """Seed python's, numpy's and torch's CPU generator from (seed, key)."""
    _seed_generators(*np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist())


def _seed_for_sample(seed: int, epoch: int, number: int, times: int) -> None:
    """Seed the same generators for one sample: as independent as a cryptographic hash, at half of seed_rng's cost."""
    digest = hashlib.blake2b(f"{seed} {epoch} {number} {times}".encode(), digest_size=12).digest()
    _seed_generators(*struct.unpack("<3I", digest))


def _seed_generators(for_python: int, for_numpy: int, for_torch: int) -> None:
    random.seed(for_python)
    np.random.seed(for_numpy)
    # Not torch.manual_seed, which would reseed the GPUs as well.
    torch.default_generator.manual_seed(for_torch)


class SeededBatch(list):
    """Indices of a batch. Iterating over them seeds python's, numpy's and torch's generator for each.

    A DataLoader reads ``[dataset[index] for index in batch]``, so what the data set draws for a sample is a function of
    (seed, epoch, index), whoever reads it, and the data set need not be wrapped. In the training's own process the
    generators are as before when the batch is read; in a worker, where nobody else draws, what collate_fn draws then is
    a function of the batch's last sample. A data set with `__getitems__` is seeded for each sample as far as it reads
    one after another; one that reads the batch as a whole draws as collate_fn does.

    Args:
        indices: of a map-style data set.
        seed: >= 0.
        epoch: from 0.
        times: how often each index has come in this epoch before, for samplers that draw with replacement; None for
            never.
    """

    def __init__(self, indices: Sequence, seed: int, epoch: int, times: list[int] | None = None):
        super().__init__(indices)
        self._seed, self._epoch, self._times = seed, epoch, times

    def __reduce__(self) -> tuple:
        return type(self), (self[:], self._seed, self._epoch, self._times)  # not through __iter__, as list's would

    def __iter__(self) -> Iterator:
        with contextlib.nullcontext() if get_worker_info() else kept_rng():
            for index, times in zip(super().__iter__(), self._times or itertools.repeat(0)):
                _seed_for_sample(self._seed, self._epoch, _number(index), times)
                yield index


def _number(index: Any) -> int:
    """An index as a number for a seed; data sets may have keys of any kind."""
    is_number = isinstance(index, int | np.integer) and index >= 0
    return int(index) if is_number else zlib.crc32(repr(index).encode())


# ---- batches over ranks ----


@dataclass(frozen=True)
class Cut:
    """Where the rest of an epoch was cut into batches anew: it went on with another global batch size.

    Attributes:
        epoch: which epoch.
        global_size: samples of a full batch on all ranks together, with which the epoch was planned.
        samples: how many samples of that plan were done.
        batches: how many batches had been done, of whatever sizes.
    """

    epoch: int
    global_size: int
    samples: int
    batches: int


class RankedBatchSampler(Sampler[list]):
    """Global batches of an epoch, of which every rank takes its share; a base class.

    Attributes:
        samples: of the data set.
    """

    samples: int

    def __init__(self, batch_size: int, drop_last: bool):
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rank, self.world_size = 0, 1
        self.epoch, self.start_batch = 0, 0
        self.cut: Cut | None = None

    def _plan(self, global_size: int) -> list[Sequence]:
        """The global batches of the epoch, uncut."""
        raise NotImplementedError

    def split(self, rank: int, world_size: int) -> None:
        """Give this rank's share of the batches from the next iteration on."""
        self.rank, self.world_size = rank, world_size

    @property
    def global_size(self) -> int:
        """The samples of a full batch on all ranks together."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int, start_batch: int = 0, cut: Cut | None = None) -> None:
        """Chooses what the next iteration gives; without a call it is the same epoch again, from its first batch on.

        Args:
            epoch: from 0.
            start_batch: batches of that epoch to leave out, for a resume in its middle.
            cut: where the epoch was cut anew, if it was.

        Raises:
            ValueError: a negative epoch, or a start_batch that the epoch does not have.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs count from 0")
        self.epoch, self.cut = epoch, cut
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch}: the epoch has {len(self)} batches")
        self.start_batch = start_batch

    def __len__(self) -> int:
        """The batches of the whole epoch, wherever the next iteration starts; the same on all ranks."""
        samples, batches = (self.cut.samples, self.cut.batches) if self.cut else (0, 0)
        full, rest = divmod(self._planned() - samples, self.global_size)
        return batches + full + (rest > 0 and not self.drop_last)

    def _planned(self) -> int:
        """The samples of the plan, which with drop_last leaves out what fills no batch."""
        size = self.cut.global_size if self.cut else self.global_size
        return self.samples // size * size if self.drop_last else self.samples

    def samples_in(self, batches: int) -> int:
        """The samples in the epoch's first batches, on all ranks together; not fewer than were done when it was cut."""
        if self.cut:
            done = self.cut.samples + (batches - self.cut.batches) * self.global_size
            return min(done, self._planned())
        done, rest = batches * self.global_size, self._planned() % self.global_size
        return done - self.global_size + rest if rest and batches > self._place_of_rest() else done

    def without_samples(self) -> range:
        """The batches of the epoch that have no sample for this rank, which then gets the first rank's again."""
        rest = (self._planned() - (self.cut.samples if self.cut else 0)) % self.global_size
        if self.drop_last or not 0 < rest <= self.rank:
            return range(0)
        place = len(self) - 1 if self.cut else self._place_of_rest()
        return range(place, place + 1)

    def _place_of_rest(self) -> int:
        """Which batch of the plan is the one that is not full."""
        return len(self) - 1

    def _global_batches(self) -> list[Sequence]:
        """From start_batch on."""
        if self.cut is None:
            return self._plan(self.global_size)[self.start_batch :]
        order = list(itertools.chain.from_iterable(self._plan(self.cut.global_size)))
        batches = cut_up(order[self.cut.samples :], self.global_size, self.drop_last)
        return batches[self.start_batch - self.cut.batches :]

    def _shares(self) -> list[Sequence]:
        """This rank's part of each."""
        # every n-th sample: sorted by length, they are the same work for all ranks
        rank, n = self.rank, self.world_size
        return [batch[rank::n] if len(batch) > rank else batch[::n] for batch in self._global_batches()]


def cut_up(order: Sequence | np.ndarray, size: int, drop_last: bool = False) -> list:
    """Batches of an order; with drop_last, without the one that is not full."""
    stop = len(order) // size * size if drop_last else len(order)
    return [order[first : first + size] for first in range(0, stop, size)]


class BucketBatchSampler(RankedBatchSampler):
    """Batches of indices, each index once in an epoch; with lengths, a batch holds samples of similar length.

    Shuffled and bucketed: a random permutation is cut into windows of `window` batches, each window is sorted by
    length and cut into batches, and the batches of all windows are shuffled.

    Args:
        lengths: the length of each sample, in any unit; or the number of samples alone, for plain batches.
        batch_size: samples in a batch of one rank; only one batch of an epoch may have fewer.
        seed: of the order, and of what the data set draws for a sample, >= 0.
        shuffle: False gives the order of the data set, in batches of neighbours.
        drop_last: leave out the samples that do not fill a batch; shuffled, those are others in each epoch.
        window: batches that are sorted together: more waste less padding, fewer mix the lengths better.

    Raises:
        ValueError: no samples, a negative length, batch_size or window below 1, a negative seed, or drop_last leaves no
            batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        window: int = 32,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("window", window, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed")
        if isinstance(lengths, int):
            self.lengths, self.samples = None, lengths
        else:
            self.lengths = np.asarray(lengths)
            self.samples = len(self.lengths)
            if self.samples and self.lengths.min() < 0:
                worst = int(self.lengths.argmin())
                raise ValueError(f"the length of sample {worst} is {self.lengths[worst]}: lengths cannot be negative")
        if self.samples < 1:
            raise ValueError("the data set is empty: there is nothing to make batches of")
        self.seed = seed
        self.shuffle = shuffle
        self.window = window
        super().__init__(batch_size, drop_last)
        self.split(0, 1)

    def split(self, rank: int, world_size: int) -> None:
        """Give this rank's share of the batches from the next iteration on.

        Raises:
            ValueError: drop_last leaves no batch.
        """
        super().split(rank, world_size)
        if self.drop_last and self.samples < self.global_size:
            ranks = f" on {world_size} ranks" if world_size > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size}{ranks} with drop_last leaves no batch of {self.samples} samples: take a "
                "smaller batch_size or drop_last=False"
            )

    def __iter__(self) -> Iterator[SeededBatch]:
        # A list, not a generator: a set_epoch after this line is meant for the next iteration.
        return iter([SeededBatch(share, self.seed, self.epoch) for share in self._shares()])

    def _place_of_rest(self) -> int:
        return min(enumerate(self._plan(self.global_size)), key=lambda entry: len(entry[1]))[0]

    def _plan(self, global_size: int) -> list[Sequence]:
        if not self.shuffle:
            return cut_up(range(self.samples), global_size, self.drop_last)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(ORDER, self.epoch)))
        order = rng.permutation(self.samples)
        if self.drop_last:  # before sorting, or it would always be the longest that are left out
            order = order[: self.samples // global_size * global_size]
        if self.lengths is None:
            return cut_up(order.tolist(), global_size)
        batches = []
        for window in cut_up(order, global_size * self.window):
            window = window[np.argsort(self.lengths[window], kind="stable")].tolist()
            rest = len(window) % global_size
            # The batch that is not full gets any place, or it would always hold the longest clips.
            place = int(rng.integers(len(window) // global_size + 1)) * global_size if rest else len(window)
            batches += cut_up(window[:place], global_size)
            batches += [window[place : place + rest]] if rest else []
            batches += cut_up(window[place + rest :], global_size)
        return [batches[i] for i in rng.permutation(len(batches))]

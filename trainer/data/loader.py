"""Batches in an order that a resumed run can take up again, and random choices that depend on the sample alone.

The order is a function of (seed, epoch, data set): not of the number of workers or ranks, nor of what happened before.
What a data set draws for a sample (augmentation) is a function of (seed, epoch, index).

With several ranks, `batch_size` is per rank: a step takes a global batch of batch_size * ranks samples, which is the
same for any number of ranks with that product, and each rank takes its share of it.
"""

import contextlib
import copy
import itertools
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

_ORDER, _SAMPLE = 0, 1  # keep the random streams of orders and samples apart


@dataclass(frozen=True)
class Repeated:
    """A batch for a rank that has no sample of its own in a step: others count these samples, here they weigh nothing.

    The rank goes through the step with it, because whatever the ranks do together (sums of gradients, a model's own
    collectives) needs all of them.
    """

    batch: Any


class _RankedBatchSampler(Sampler[list[int]]):
    """Batches of an epoch, of which every rank takes its share."""

    def __init__(self, samples: int, batch_size: int, drop_last: bool):
        self.samples = samples
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rank, self.world_size = 0, 1
        self.epoch = 0
        self.start_batch = 0
        self._check_size()

    def split(self, rank: int, world_size: int) -> None:
        """Give this rank's share of the batches from the next iteration on.

        Raises:
            ValueError: drop_last leaves no batch.
        """
        self.rank, self.world_size = rank, world_size
        self._check_size()

    def _check_size(self) -> None:
        if self.drop_last and self.samples < self.global_size:
            ranks = f" on {self.world_size} ranks" if self.world_size > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size}{ranks} with drop_last leaves no batch of {self.samples} samples: take a "
                "smaller batch_size or drop_last=False"
            )

    @property
    def global_size(self) -> int:
        """The samples of a full batch on all ranks together."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Chooses what the next iteration gives; without a call it is the same epoch again, from its first batch on.

        Args:
            epoch: from 0.
            start_batch: batches of that epoch to leave out, for a resume in its middle.

        Raises:
            ValueError: a negative epoch, or a start_batch that the epoch does not have.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs count from 0")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch}: the epoch has {len(self)} batches")
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """The batches of a whole epoch, wherever the next iteration starts; the same on all ranks."""
        full, rest = divmod(self.samples, self.global_size)
        return full + (rest > 0 and not self.drop_last)

    def batch_without_samples(self) -> int | None:
        """Which batch of the epoch has too few samples for this rank, which then gets the first rank's again."""
        rest = self.samples % self.global_size
        return self._place_of_rest() if 0 < rest <= self.rank and not self.drop_last else None

    def _place_of_rest(self) -> int:
        return len(self) - 1

    def _share(self, batch: Sequence | np.ndarray) -> Any:
        # every n-th sample: sorted by length, they are the same work for all ranks
        share = batch[self.rank :: self.world_size]
        return share if len(share) else batch[:: self.world_size]


class BucketBatchSampler(_RankedBatchSampler):
    """Batches of indices, each index once in an epoch; with lengths, a batch holds samples of similar length.

    Shuffled and bucketed: a random permutation is cut into windows of `window` batches, each window is sorted by
    length and cut into batches, and the batches of all windows are shuffled.

    Args:
        lengths: the length of each sample, in any unit; or the number of samples alone, for plain batches.
        batch_size: samples in a batch of one rank; only one batch of an epoch may have fewer.
        seed: of the order, >= 0.
        shuffle: False gives the order of the data set, in batches of neighbours.
        drop_last: leave out the samples that do not fill a batch; shuffled, those are others in each epoch.
        window: batches that are sorted together: more waste less padding, fewer mix the lengths better.

    Raises:
        ValueError: no samples, a negative length, batch_size or window below 1, a negative seed.
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
            self.lengths, samples = None, lengths
        else:
            self.lengths = np.asarray(lengths)
            samples = len(self.lengths)
            if samples and self.lengths.min() < 0:
                worst = int(self.lengths.argmin())
                raise ValueError(f"the length of sample {worst} is {self.lengths[worst]}: lengths cannot be negative")
        if samples < 1:
            raise ValueError("the data set is empty: there is nothing to make batches of")
        self.seed = seed
        self.shuffle = shuffle
        self.window = window
        super().__init__(samples, batch_size, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        # A list, not a generator: a set_epoch after this line is meant for the next iteration.
        return iter([self._share(batch).tolist() for batch in self._plan()[self.start_batch :]])

    def _place_of_rest(self) -> int:
        return min(enumerate(self._plan()), key=lambda entry: len(entry[1]))[0]

    def _plan(self) -> list[np.ndarray]:
        """The batches of all ranks together."""
        if not self.shuffle:
            return self._cut(np.arange(self.samples))[: len(self)]
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_ORDER, self.epoch)))
        order = rng.permutation(self.samples)
        if self.drop_last:  # before sorting, or it would always be the longest that are left out
            order = order[: len(self) * self.global_size]
        if self.lengths is None:
            return self._cut(order)
        batches = []
        for window in self._cut(order, self.window):
            window = window[np.argsort(self.lengths[window], kind="stable")]
            rest = len(window) % self.global_size
            # The batch that is not full gets any place, or it would always hold the longest clips.
            place = int(rng.integers(len(window) // self.global_size + 1)) * self.global_size if rest else len(window)
            batches += self._cut(window[:place])
            batches += [window[place : place + rest]] if rest else []
            batches += self._cut(window[place + rest :])
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: np.ndarray, batches: int = 1) -> list[np.ndarray]:
        step = self.global_size * batches
        return [order[first : first + step] for first in range(0, len(order), step)]


class _KeyedBatches(BucketBatchSampler):
    """Gives (epoch, index) for each index: the only way for the epoch to reach workers that live for many epochs."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:  # type: ignore[override]
        epoch = self.epoch
        return iter([[(epoch, index) for index in batch] for batch in super().__iter__()])


class _SeededDataset(Dataset):
    """Reads items of `dataset` with python's, numpy's and torch's CPU generator seeded for each of them."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list:
        """The items of one batch; the process's own random state is as before when they are done."""
        with _kept_rng():
            return [self._item(epoch, index) for epoch, index in keys]

    def _item(self, epoch: int, index: int):
        _seed_rng(self.seed, (_SAMPLE, epoch, index))
        return self.dataset[index]


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    """Put the states of python's, numpy's and torch's CPU generator back after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_rng(seed: int, key: tuple[int, ...]) -> None:
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # Not torch.manual_seed, which would reseed the GPUs as well.
    torch.default_generator.manual_seed(int(words[2]))


def _start_worker(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process decides, and stops the workers when it leaves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    collate_fn: Callable,
    seed: int,
    shuffle: bool,
    lengths: Sequence[int] | np.ndarray | None = None,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """A DataLoader whose order and random choices depend on (seed, epoch, sample) alone.

    Call `loader.batch_sampler.set_epoch(epoch, start_batch)` before each epoch. Neither building nor iterating takes
    anything from the process's random generators. Random choices belong into the data set's `__getitem__`, not into
    `collate_fn`.

    Args:
        dataset: with `__len__` and `__getitem__`.
        batch_size: samples in a batch.
        collate_fn: makes the batch of a list of items.
        seed: of the order and of the choices made for samples, >= 0.
        shuffle: False gives the data set's order.
        lengths: of the samples, for batches of similar length (see BucketBatchSampler); None for plain batches.
        num_workers: processes that read ahead, kept from epoch to epoch; 0 reads in this process.
        drop_last: leave out the samples that do not fill a batch.

    Returns:
        The loader; batches are pinned where there is CUDA.

    Raises:
        ValueError: an empty data set, a length missing, too many or negative, or a number out of its range.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers}: at least 0 is needed")
    if lengths is not None and len(lengths) != len(dataset):
        raise ValueError(f"{len(lengths)} lengths for {len(dataset)} samples: give one for each sample")
    sampler = _KeyedBatches(
        len(dataset) if lengths is None else lengths, batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last
    )
    return DataLoader(
        _SeededDataset(dataset, seed),
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),  # or it draws a number from the global one in every epoch
    )


class _SplitBatchSampler(_RankedBatchSampler):
    """This rank's share of the batches of any sampler of indices, which draws the same numbers on all ranks."""

    def __init__(self, batches: BatchSampler, seed: int, rank: int, world_size: int):
        super().__init__(len(batches.sampler), batches.batch_size, batches.drop_last)  # type: ignore[arg-type]
        self.sampler = batches.sampler
        self.seed = seed
        self.split(rank, world_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        super().set_epoch(epoch, start_batch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self.epoch, self.start_batch, len(self))

    def _batches(self, epoch: int, start: int, stop: int) -> Iterator[list[int]]:
        # A generator: with one rank, too, a DataLoader draws from its generator before its sampler does.
        indices = _drawn(self.sampler, self.seed, epoch)
        for first in range(start * self.global_size, stop * self.global_size, self.global_size):
            yield self._share(indices[first : first + self.global_size])


class DistributedSamplerWrapper(DistributedSampler):
    """This rank's share of any sampler, of indices or of batches; nothing is dropped or repeated.

    For scripts that split their loaders themselves; the Trainer does it where nobody has.

    Args:
        sampler: what is split; it draws the same random numbers on all ranks, from (seed, epoch).
        num_replicas: number of ranks; the process group's by default.
        rank: this rank; the process group's by default.
        shuffle: kept for old scripts: the order is the sampler's.
        seed: of the random numbers that the sampler draws.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ):
        # as its data set: scripts look there for the sampler
        super().__init__(sampler, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, here and in the sampler."""
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """This rank's indices or batches; the first ranks may have one more than the others."""
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator:
        return iter(_drawn(self.dataset, self.seed, self.epoch)[self.rank :: self.num_replicas])


def _drawn(sampler: Any, seed: int, epoch: int) -> list:
    """All that a sampler gives, drawn with generators seeded from (seed, epoch)."""
    with _kept_rng():
        _seed_rng(seed, (_ORDER, epoch))
        return list(sampler)


def shard(loader: DataLoader, rank: int, world_size: int, seed: int) -> DataLoader:
    """A loader of this rank's share of the batches.

    A loader of build_loader is told its rank. Of any other loader with a data set of known length, the indices that
    its sampler gives are cut into global batches, and shared; it keeps all its settings. A loader that the script has
    split by itself (DistributedSampler, DistributedSamplerWrapper) is left as it is.

    Args:
        loader: the same on all ranks.
        rank: this rank.
        world_size: number of ranks; with one, the loader is returned as it is.
        seed: of the random numbers that its sampler draws, if it has no generator of its own.

    Raises:
        TypeError: it is no DataLoader.
        ValueError: its batches cannot be shared.
    """
    if world_size == 1:
        return loader
    if not isinstance(loader, DataLoader):
        raise TypeError(f"a {type(loader).__name__} cannot be split over {world_size} ranks: use a DataLoader")
    batches = loader.batch_sampler
    if isinstance(batches, BucketBatchSampler):
        batches.split(rank, world_size)
    if isinstance(batches, _RankedBatchSampler) or any(isinstance(s, DistributedSampler) for s in _samplers(loader)):
        return loader
    obstacle = _why_not_split(loader)
    if obstacle:
        raise ValueError(f"over {world_size} ranks, {obstacle}")
    split = copy.copy(loader)
    # not its constructor: torch's versions have different arguments, and subclasses their own
    vars(split).update(batch_sampler=_SplitBatchSampler(batches, seed, rank, world_size), _iterator=None)
    return split


def _why_not_split(loader: DataLoader) -> str:
    if isinstance(loader.dataset, IterableDataset):
        name = type(loader.dataset).__name__
        return f"the IterableDataset {name} cannot be split: use a data set with __len__ and __getitem__"
    if type(loader.batch_sampler) is BatchSampler:
        return ""
    what = "batch_size=None" if loader.batch_sampler is None else type(loader.batch_sampler).__name__
    return (
        f"a loader's batches cannot be split ({what}): use batch_size with a sampler of indices, or wrap what gives "
        "batches in trainer.data.loader.DistributedSamplerWrapper"
    )


def _samplers(loader: DataLoader) -> list:
    found = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def rest_of_epoch(
    loader: DataLoader, epoch: int, start_batch: int, batches: int | None = None, seed: int = 0
) -> Iterator:
    """The batches of an epoch from `start_batch` on.

    A loader of build_loader or shard is set to that place. Of any other loader the first batches are read and dropped,
    and its samplers are told the epoch where they want to know (DistributedSampler).

    Args:
        loader: this rank's (see shard).
        epoch: from 0.
        start_batch: batches to leave out.
        batches: of the whole epoch on the rank that has most of them; None with one rank. A rank that has no samples
            of its own in a step gets Repeated.
        seed: of the order that another loader's samplers and generator draw.

    Raises:
        ValueError: this rank has no batch at all, and others have.
    """
    sampler = loader.batch_sampler
    if not isinstance(sampler, _RankedBatchSampler):
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if batches is None:
            return _ordered(loader, seed, epoch, start_batch)
        return _lengthened(_ordered(loader, seed, epoch, 0), start_batch, batches)
    sampler.set_epoch(epoch, start_batch)
    empty = sampler.batch_without_samples()
    if empty is None:
        return iter(loader)
    return (Repeated(batch) if i == empty else batch for i, batch in enumerate(loader, start_batch))


def _ordered(loader: DataLoader, seed: int, epoch: int, start: int) -> Iterator:
    """The batches from `start` on, in an order that is drawn with generators seeded from (seed, epoch)."""
    with _kept_rng():
        _seed_rng(seed, (_ORDER, epoch))
        for owner in (loader, *_samplers(loader)):
            if getattr(owner, "generator", None) is not None:
                owner.generator.manual_seed(torch.initial_seed())
        batches = iter(loader)
        for _ in range(start):
            next(batches, None)
        # samplers draw when they are asked for the first time
        first = [] if start else list(itertools.islice(batches, 1))
    return itertools.chain(first, batches)


def _lengthened(own: Iterator, start: int, length: int) -> Iterator:
    """A rank's batches from `start` on, and its last batch again until all ranks are done."""
    count, batch = 0, None
    for count, batch in enumerate(own, start=1):
        if count > start:
            yield batch
    if count == 0 < length:
        raise ValueError(f"this rank's loader has no batch, and another rank's has {length}: give it more samples")
    for _ in range(max(count, start), length):
        yield Repeated(batch)

"""Batches in an order that a resumed run can take up again, and random choices that depend on the sample alone.

The order is a function of (seed, epoch, data set): not of the number of workers, nor of what happened before. What a
data set draws for a sample (augmentation) is a function of (seed, epoch, index).
"""

import itertools
import random
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

_ORDER, _SAMPLE = 0, 1  # keep the random streams of orders and samples apart


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of indices, each index once in an epoch; with lengths, a batch holds samples of similar length.

    Shuffled and bucketed: a random permutation is cut into windows of `window` batches, each window is sorted by
    length and cut into batches, and the batches of all windows are shuffled.

    Args:
        lengths: the length of each sample, in any unit; or the number of samples alone, for plain batches.
        batch_size: samples in a batch; only one batch of an epoch may have fewer.
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
            self.lengths, self.samples = None, lengths
        else:
            self.lengths = np.asarray(lengths)
            self.samples = len(self.lengths)
            if self.samples and self.lengths.min() < 0:
                worst = int(self.lengths.argmin())
                raise ValueError(f"the length of sample {worst} is {self.lengths[worst]}: lengths cannot be negative")
        if self.samples < 1:
            raise ValueError("the data set is empty: there is nothing to make batches of")
        if drop_last and self.samples < batch_size:
            raise ValueError(
                f"batch_size={batch_size} with drop_last leaves no batch of {self.samples} samples: take a smaller "
                "batch_size or drop_last=False"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.window = window
        self.epoch = 0
        self.start_batch = 0

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
        """The batches of a whole epoch, wherever the next iteration starts."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        # A list, not a generator: a set_epoch after this line is meant for the next iteration.
        return iter([batch.tolist() for batch in self._plan()[self.start_batch :]])

    def _plan(self) -> list[np.ndarray]:
        if not self.shuffle:
            return self._cut(np.arange(self.samples))[: len(self)]
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_ORDER, self.epoch)))
        order = rng.permutation(self.samples)
        if self.drop_last:  # before sorting, or it would always be the longest that are left out
            order = order[: len(self) * self.batch_size]
        if self.lengths is None:
            return self._cut(order)
        batches = []
        for window in self._cut(order, self.window):
            window = window[np.argsort(self.lengths[window], kind="stable")]
            rest = len(window) % self.batch_size
            # The batch that is not full gets any place, or it would always hold the longest clips.
            place = int(rng.integers(len(window) // self.batch_size + 1)) * self.batch_size if rest else len(window)
            batches += self._cut(window[:place])
            batches += [window[place : place + rest]] if rest else []
            batches += self._cut(window[place + rest :])
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: np.ndarray, batches: int = 1) -> list[np.ndarray]:
        step = self.batch_size * batches
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
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._item(epoch, index) for epoch, index in keys]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _item(self, epoch: int, index: int):
        words = np.random.SeedSequence(self.seed, spawn_key=(_SAMPLE, epoch, index)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        # Not torch.manual_seed, which would reseed the GPUs as well.
        torch.default_generator.manual_seed(int(words[2]))
        return self.dataset[index]


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


def rest_of_epoch(loader: DataLoader, epoch: int, start_batch: int) -> Iterator:
    """The batches of an epoch from `start_batch` on.

    A loader of build_loader is set to that place. Of any other loader the first batches are read and dropped, and its
    sampler is told the epoch where it wants to know (DistributedSampler).
    """
    if isinstance(loader.batch_sampler, BucketBatchSampler):
        loader.batch_sampler.set_epoch(epoch, start_batch)
        return iter(loader)
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    return itertools.islice(iter(loader), start_batch, None)

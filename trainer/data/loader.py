"""Loaders whose batches come in an order that a resumed run can take up again, on any number of ranks and workers.

What the order and the random choices made for a sample depend on is said in trainer/data/samplers.py.
"""

import copy
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

from trainer.data.iterable import Stream
from trainer.data.samplers import ORDER, BucketBatchSampler, Cut, RankedBatchSampler, kept_rng
from trainer.data.script_samplers import (
    DistributedSamplerWrapper,
    DrawnBatches,
    OwnBatches,
    generators_of,
    samplers_of,
    seed_loader,
)
from trainer.signals import start_worker, starting_workers, stop_waiting

__all__ = ["BucketBatchSampler", "DistributedSamplerWrapper", "build_loader", "rest_of_epoch", "shard", "stream_of"]
Gather = Callable[[Any], list[Any]]
_END = object()


@dataclass(frozen=True)
class Repeated:
    """A batch for a rank that has no sample of its own in a step: others count these samples, here they weigh nothing.

    The rank goes through the step with it, because whatever the ranks do together (sums of gradients, a model's own
    collectives) needs all of them.
    """

    batch: Any


def _is_guarded(loader: Any) -> bool:
    """Whether the loader has workers that do not hear the signals which end a training."""
    init = getattr(loader, "worker_init_fn", None)
    return getattr(loader, "num_workers", 0) > 0 and start_worker in (init, getattr(init, "func", None))


def _guarded(loader: DataLoader) -> DataLoader:
    """The loader, or a copy whose workers do not hear the signals which end a training."""
    if loader.num_workers == 0 or _is_guarded(loader):
        return loader
    return _changed(loader, worker_init_fn=functools.partial(start_worker, then=loader.worker_init_fn))


def _iterator_of(loader: Any, heard: Callable[[], bool] | None = None) -> Iterator:
    """``iter(loader)``, whose new workers hear no signal from their first moment on; see rest_of_epoch."""
    method = None
    if _is_guarded(loader):
        context = loader.multiprocessing_context
        method = multiprocessing.get_start_method() if context is None else context.get_start_method()
    with starting_workers(method):
        batches = iter(loader)
    if heard is not None:
        stop_waiting(loader, batches, heard)
    return batches


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
    `collate_fn`, and are drawn from python's, numpy's or torch's global generator.

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
    sampler = BucketBatchSampler(
        len(dataset) if lengths is None else lengths, batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(seed),  # or it draws a number from the global one in every epoch
    )


def shard(loader: DataLoader, rank: int, world_size: int, seed: int) -> DataLoader:
    """A loader of this rank's share of the batches, in an order that a resumed run can take up again.

    A loader of build_loader is told its rank. Of any other loader with a map-style data set, a copy is made with
    another batch sampler, which draws from the loader's own (see DrawnBatches); it keeps its data set and all its
    settings. Of batches that the script has split by itself (DistributedSampler, DistributedSamplerWrapper), a rank
    keeps what it has. So it is with one rank: the order, and what a data set draws for a sample, are those of any
    number of ranks.

    What has no indices to share is left as it is: an IterableDataset, which on several ranks has to say
    `splits_itself = True`.

    Args:
        loader: the same on all ranks.
        rank: this rank.
        world_size: number of ranks.
        seed: of the random numbers that its sampler and its data set draw.

    Raises:
        TypeError: it is no DataLoader, and there are several ranks.
        ValueError: its samples cannot be shared, or drop_last leaves no batch.
    """
    if not isinstance(loader, DataLoader):
        if world_size == 1:
            return loader
        raise TypeError(f"a {type(loader).__name__} cannot be split over {world_size} ranks: use a DataLoader")
    if isinstance(loader.batch_sampler, RankedBatchSampler):
        if isinstance(loader.batch_sampler, BucketBatchSampler):
            loader.batch_sampler.split(rank, world_size)
        return loader
    if isinstance(loader.dataset, IterableDataset):
        if world_size > 1 and not getattr(loader.dataset, "splits_itself", False):
            raise ValueError(
                f"the IterableDataset {type(loader.dataset).__name__} cannot be split over {world_size} ranks: use a "
                "data set with __len__ and __getitem__, or read in it this rank's part alone (RANK and WORLD_SIZE in "
                "the environment), and set splits_itself = True in its class"
            )
        return loader  # see stream_of
    if loader.batch_sampler is None:  # its data set gives batches, for which it draws as for samples
        one_by_one, collate = BatchSampler(loader.sampler, 1, False), functools.partial(_collate_one, loader.collate_fn)
        loader = _changed(loader, batch_sampler=one_by_one, collate_fn=collate)
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(loader)):
        return _guarded(_changed(loader, batch_sampler=OwnBatches(loader, seed, rank, world_size)))
    batches = DrawnBatches(loader, seed)
    batches.split(rank, world_size)
    return _guarded(_changed(loader, batch_sampler=batches))


def _changed(loader: DataLoader, **changes: Any) -> DataLoader:
    """A copy; not through its constructor: torch's versions differ in arguments, and subclasses do."""
    changed = copy.copy(loader)
    vars(changed).update(_iterator=None, **changes)
    return changed


def _collate_one(collate_fn: Callable, items: list) -> Any:
    return collate_fn(items[0])


def stream_of(loader: Any, seed: int, rank: int = 0, window: int = 1) -> Stream | None:
    """What reads a loader that cannot be set to a place; None for one with indices, of build_loader or shard."""
    if isinstance(getattr(loader, "batch_sampler", None), RankedBatchSampler):
        return None
    return Stream(loader, seed, rank, window, _guarded)


def rest_of_epoch(
    loader: DataLoader,
    epoch: int,
    start_batch: int,
    seed: int = 0,
    cut: Cut | None = None,
    gather: Gather | None = None,
    stream: Stream | None = None,
    heard: Callable[[], bool] | None = None,
) -> Iterator:
    """The batches of an epoch from `start_batch` on.

    A loader of build_loader or shard is set to that place. Any other is read by its Stream, which may have to read the
    first batches again. A rank that has no samples of its own in a step gets Repeated.

    Args:
        loader: this rank's (see shard).
        epoch: from 0.
        start_batch: batches to leave out.
        seed: of what samplers, workers and generators draw.
        cut: where the epoch was cut anew; None if it was not, or if the loader cannot.
        gather: makes a list of what all ranks hand to it; None with one rank. Only ranks whose loaders were split by
            the script use it: once if lengths are known, otherwise for each batch.
        stream: of the loader (see stream_of), with what it knows of earlier epochs; None makes one.
        heard: whether a signal has come: batches of workers are then not waited for.

    Raises:
        ValueError: a rank has no batch at all, and others have.
        Stopped: a signal has come.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, RankedBatchSampler):
        stream = stream or stream_of(loader, seed)
        batches = stream.read(epoch, start_batch, functools.partial(_iterator_of, heard=heard))
        return batches if gather is None else _in_step(batches, stream, gather)
    sampler.set_epoch(epoch, start_batch, cut)
    if isinstance(sampler, OwnBatches) and gather is not None:
        lengths = gather(len(sampler))
        _check_all_have_batches([n > 0 for n in lengths])
        sampler.length = max(lengths)
    with kept_rng(*generators_of(loader)):
        seed_loader(loader, seed, _key(epoch, sampler))
        batches = _iterator_of(loader, heard)
    empty = sampler.without_samples()
    return (Repeated(batch) if i in empty else batch for i, batch in enumerate(batches, start_batch))


def _key(epoch: int, sampler: RankedBatchSampler) -> tuple[int, ...]:
    """What a loader's random numbers depend on; with the same on all ranks, their workers would draw the same."""
    return (ORDER, epoch, sampler.rank) if sampler.rank else (ORDER, epoch)


def _in_step(own: Iterator, stream: Stream, gather: Gather) -> Iterator:
    """A rank's batches, and its last one again until all ranks are done, of which nobody knows when that will be."""
    while True:
        batch = next(own, _END)
        has_batch, has_any = zip(*gather((batch is not _END, stream.newest is not None)))
        if not any(has_batch):
            return
        _check_all_have_batches(has_any)
        yield Repeated(stream.newest) if batch is _END else batch


def _check_all_have_batches(has_batch: Sequence[bool]) -> None:
    missing = [str(rank) for rank, found in enumerate(has_batch) if not found]
    if missing and len(missing) < len(has_batch):
        raise ValueError(f"rank {', '.join(missing)} has no batch, and others have: give its loader more samples")

"""The samplers of loaders that a script makes, under the rules of trainer/data/samplers.py."""

import itertools
import operator
import random
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from trainer.data.samplers import ORDER, Cut, RankedBatchSampler, SeededBatch, cut_up, kept_rng, seed_rng


def samplers_of(loader: DataLoader) -> list:
    """A loader's sampler, batch sampler, and the sampler inside that one."""
    found = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def tell_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell a loader's samplers the epoch, where they want to know."""
    for sampler in samplers_of(loader):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def generators_of(loader: DataLoader) -> list[torch.Generator]:
    """The generators that a loader and its samplers have of their own."""
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers_of(loader))]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def kept_generators(source: Any, depth: int = 4) -> list[str]:
    """Where a data set, or what it is made of, keeps random generators: ``transform.rng`` and the like.

    Args:
        source: a data set, a transform, any object.
        depth: of the attributes that are looked into.
    """
    found, is_object = [], not isinstance(source, type | types.ModuleType)
    for name, value in getattr(source, "__dict__", {}).items() if depth and is_object else ():
        if isinstance(value, random.Random | np.random.Generator | np.random.RandomState | torch.Generator):
            found.append(name)
        for part in value[:10] if type(value) in (list, tuple) else (value,):  # data sets or transforms in a row
            found += [f"{name}.{inner}" for inner in kept_generators(part, depth - 1)]
    return list(dict.fromkeys(found))


def seed_loader(loader: DataLoader, seed: int, key: tuple[int, ...]) -> None:
    """Seed the process's generators, and those of the loader, from (seed, key)."""
    seed_rng(seed, key)
    for generator in generators_of(loader):
        generator.manual_seed(torch.initial_seed())


class DrawnBatches(RankedBatchSampler):
    """What the sampler of any loader draws, with generators seeded from (seed, epoch): the same on all ranks.

    The indices that a sampler gives are cut into global batches and shared. Of a batch sampler of another kind, each
    rank takes whole batches: it decides what belongs together. `samples` and `batch_size` then count batches.

    Args:
        loader: with a map-style data set and a batch sampler.
        seed: >= 0.
    """

    def __init__(self, loader: DataLoader, seed: int):
        own = loader.batch_sampler
        self._is_whole = type(own) is not BatchSampler
        if self._is_whole:
            super().__init__(1, drop_last=False)
        else:
            super().__init__(own.batch_size, own.drop_last)
        self.loader, self.seed = loader, seed
        self._is_seeded = _may_draw(loader)
        self._drawn: tuple[int, list, list | None] | None = None

    @property
    def samples(self) -> int:  # type: ignore[override]
        return len(self._draw(again=False)[0])

    def __iter__(self) -> Iterator[list]:
        drawn = self._draw(again=True)  # a callback may have changed the sampler since it was asked for its length
        return iter([self._batch(share, *drawn) for share in self._shares()])

    def is_repeatable(self) -> bool:
        """Whether the sampler gives an epoch's order again, and not the one after the last that it was asked for."""
        return repr(self._draw(again=True)) == repr(self._draw(again=True))

    def _plan(self, global_size: int) -> list[Sequence]:
        return cut_up(range(self.samples), global_size, self.drop_last)  # places among what was drawn

    def _batch(self, places: Sequence[int], drawn: list, times: list | None) -> list:
        if self._is_whole:
            indices, times = list(drawn[places[0]]), times and times[places[0]]
        else:
            indices, times = [drawn[i] for i in places], times and [times[i] for i in places]
        return SeededBatch(indices, self.seed, self.epoch, times) if self._is_seeded else indices

    def _draw(self, again: bool) -> tuple[list, list | None]:
        """The epoch's indices (or batches), and how often each index has come before; None if none comes twice."""
        if again or self._drawn is None or self._drawn[0] != self.epoch:
            own = self.loader.batch_sampler
            batches = own if self._is_whole else BatchSampler(own.sampler, own.batch_size, False)
            tell_epoch(self.loader, self.epoch)
            with kept_rng(*generators_of(self.loader)):
                seed_loader(self.loader, self.seed, (ORDER, self.epoch))
                iterator = iter(batches)
                # as a DataLoader does before its sampler draws
                torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
                drawn = _all(iterator, own)
            times = _repetitions(drawn) if self._is_seeded else None
            if not self._is_whole:
                drawn, times = (part and list(itertools.chain.from_iterable(part)) for part in (drawn, times))
            self._drawn = self.epoch, drawn, times
        return self._drawn[1:]


class OwnBatches(DrawnBatches):
    """The batches of a loader that the script has split over the ranks by itself; ranks may have more or fewer.

    Args:
        loader: this rank's.
        seed: >= 0.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int, world_size: int):
        super().__init__(loader, seed)
        self.rank = rank
        size = getattr(loader.batch_sampler, "batch_size", None)
        self._global_size = (size if isinstance(size, int) else 1) * world_size
        self._is_whole, self.batch_size, self.drop_last = True, 1, False
        self.length = 0  # batches of the epoch on the rank that has most

    @property
    def global_size(self) -> int:
        """Samples on all ranks together, if the batch sampler has a `batch_size`; otherwise batches."""
        return self._global_size

    def __len__(self) -> int:
        """The batches of this rank."""
        return self.samples

    def samples_in(self, batches: int) -> int:
        return batches * self.global_size

    def without_samples(self) -> range:
        return range(len(self), self.length)

    def set_epoch(self, epoch: int, start_batch: int = 0, cut: Cut | None = None) -> None:
        super().set_epoch(epoch)
        self.start_batch = start_batch  # other ranks may have more batches

    def _shares(self) -> list[Sequence]:
        places = [*range(len(self)), *[len(self) - 1] * (self.length - len(self))]
        return [[place] for place in places[self.start_batch :]]


def _may_draw(loader: DataLoader) -> bool:
    """Whether reading a batch may draw random numbers; seeding for it costs more than reading from a list does."""
    if loader.num_workers and loader.collate_fn not in (default_collate, default_convert):
        return True  # where the training's generators are not at hand
    dataset = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) not in (list, tuple, range, TensorDataset)


def _all(iterator: Iterator, sampler: Any) -> list:
    """All that a sampler gives, whose len() may be an estimate."""
    most = 100 * (operator.length_hint(sampler, 10**6) + 100)
    drawn = list(itertools.islice(iterator, most))
    if len(drawn) == most:
        name = type(sampler).__name__
        raise ValueError(f"{name} gives {most} batches or more, a hundred times its len(): a sampler must end")
    return drawn


def _repetitions(batches: list) -> list[list[int]] | None:
    """How often each index has come before, in the form of the batches; None if none comes twice."""
    names = [[i if isinstance(i, int) else repr(i) for i in batch] for batch in batches]
    if len(set(itertools.chain.from_iterable(names))) == sum(map(len, names)):
        return None
    counts: Counter = Counter()
    times = []
    for batch in names:
        times.append([])
        for name in batch:
            times[-1].append(counts[name])
            counts[name] += 1
    return times


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
        with kept_rng():
            seed_rng(self.seed, (ORDER, self.epoch))
            drawn = list(self.dataset)
        return iter(drawn[self.rank :: self.num_replicas])

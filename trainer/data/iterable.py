"""Loaders that can only be read from their beginning, such as those of an IterableDataset, and how a run resumes them.

A data set with ``state_dict`` and ``load_state_dict`` goes on where it was; so does a loader that is no DataLoader and
has them itself. Any other is read again from the beginning of its epoch, and what was done is dropped.

What is asked of the data set: ``iter()`` begins an epoch, unless ``load_state_dict`` was called before; the state holds
all that what follows depends on, and counts a sample before it is yielded. It may draw from python's, numpy's and
torch's global generators: they are seeded for each batch from (seed, epoch, rank, worker, number of the batch), so
their states need not be kept. If it has ``set_epoch``, it is told the epoch, in the workers as well.
"""

import copy
import itertools
import math
import pickle
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.data.samplers import ORDER, kept_rng, seed_rng
from trainer.data.script_samplers import generators_of, seed_loader, tell_epoch

_STREAM = 3  # keeps these random numbers apart from those of orders, samples and ranks
_END = object()
# what torch.load(weights_only=True) reads; of these types exactly, not of classes derived from them
_VALUES = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Tensor, torch.dtype, torch.device)
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, torch.Size)


def length_of(loader: Any) -> float:
    """The batches of an epoch; infinity where nobody knows before it is over."""
    is_sized = hasattr(type(loader), "__len__")
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        is_sized = hasattr(type(loader.dataset), "__len__") or type(loader).__len__ is not DataLoader.__len__
    return len(loader) if is_sized else math.inf


def has_state(source: Any) -> bool:
    """Whether a data set or loader can say where it is, and be set to it."""
    return callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))


def check_state(value: Any, owner: str, where: str = "") -> None:
    """Raise a TypeError that names what of a state a checkpoint could not be read with.

    Args:
        value: the state, or a part of it.
        owner: whose it is, for the message.
        where: the part's place in the state.
    """
    if type(value) in _CONTAINERS:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            check_state(key, owner, where)
            check_state(part, owner, f"{where}[{key!r}]")
    elif type(value) not in _VALUES:
        raise TypeError(
            f"{owner}.state_dict(){where} is a {type(value).__name__}, which no checkpoint may hold: make it numbers, "
            "strings, tensors, and lists, tuples or dicts of them"
        )


def _pickled_state(source: Any) -> bytes | None:
    """A state as it is now; the source may go on changing what it has handed out."""
    return pickle.dumps(source.state_dict()) if has_state(source) else None


@dataclass(frozen=True)
class _Place:
    """How far one worker has read, or the training's process where there are none.

    Attributes:
        batches: of this epoch that it has given to the training.
        before: the state before the newest of them; None at the beginning of the epoch.
        after: the state after it.
        is_short: it was not full, so that the worker has come to its end.
        resumed: where a resumed worker starts, until its first batch is here.
    """

    batches: int = 0
    before: bytes | None = None
    after: bytes | None = None
    is_short: bool = False
    resumed: Mapping[str, Any] | None = None

    def followed_by(self, after: bytes | None, is_short: bool) -> "_Place":
        """The place one batch further."""
        batches, before = self.batches, self.after
        if self.resumed is not None:
            batches, state = self.resumed["batches"], self.resumed["state"]
            before = None if state is None else pickle.dumps(state)
        return _Place(batches + 1, before, after, is_short)

    def start(self, again: bool) -> Mapping[str, Any]:
        """Where reading goes on; ``again``: before the newest batch, which is then dropped."""
        if self.resumed is not None:
            return self.resumed
        state = self.before if again else self.after
        return {
            "batches": self.batches - again,
            "state": None if state is None else pickle.loads(state),
            "again": again,
        }


@dataclass(frozen=True)
class _Progress:
    """How far a loader was read, after each of its batches.

    Attributes:
        epoch: under way.
        batches: of it that were read.
        last: the worker that has given the newest.
        places: of all workers that have given one.
        resumed: the state from which reading goes on, until a batch was read.
        origin: the state at the end of the epoch before, of a data set that lives on; None if it is not known.
    """

    epoch: int
    batches: int = 0
    last: int = 0
    places: Mapping[int, _Place] = field(default_factory=dict)
    resumed: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any] | None:
        """What reading goes on from; None at the beginning of an epoch."""
        if self.resumed is not None or not self.places:
            return self.resumed
        newest = self.places[self.last].batches
        if newest == 1 and self.origin is not None:  # no worker's state from within this epoch, or not of all of them
            return {**self.origin, "skip": self.batches}
        # a worker that has had its turn in this round would give its next batch in it, too early; and a data set that
        # has come to its end may be at its beginning again
        starts = {
            worker: place.start(place.is_short or place.batches == newest) for worker, place in self.places.items()
        }
        return {"epoch": self.epoch, "batches": self.batches, "skip": 0, "last": self.last, "starts": starts}


class _InWorker:
    """What workers do besides reading; each has a copy. The training's process tells it the epoch and where to start.

    Args:
        loader: with an IterableDataset and workers.
        seed: of the random numbers.
        rank: of the process.
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int) -> None:
        self._collate_fn, self._init_fn, self._batch_size = loader.collate_fn, loader.worker_init_fn, loader.batch_size
        self._seed, self._rank = seed, rank
        # workers that live on see it change
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.starts: dict[int, dict[str, Any]] = {}
        self._batches = self._read = 0

    def begin(self, worker: int) -> None:
        """The worker_init_fn: from here on, ``iter(dataset)`` begins the epoch that the training's process is in."""
        if self._init_fn is not None:
            self._init_fn(worker)
        dataset = get_worker_info().dataset
        kind = type(dataset)

        def iterate(dataset: Any) -> Iterator:
            start = self.starts.pop(worker, {"batches": 0, "state": None})
            epoch, self._batches = int(self.epoch), start["batches"]
            seed_rng(self._seed, (_STREAM, epoch, self._rank, worker))
            begin_epoch(dataset, epoch, start["state"])
            iterator = kind.__iter__(dataset)
            if self._batches:
                self._seed_batch(worker)
            return iterator

        # not a wrapper around it: scripts look for their own data set in get_worker_info()
        names = {"__iter__": iterate, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        dataset.__class__ = types.new_class(kind.__name__, (kind,), exec_body=lambda own: own.update(names))

    def collate(self, items: Any) -> tuple[Any, int, bytes | None, bool]:
        """The collate_fn: the batch, the worker that has read it, the data set's state, and whether it is short."""
        batch, info = self._collate_fn(items), get_worker_info()
        if not self._read and has_state(info.dataset):
            check_state(info.dataset.state_dict(), type(info.dataset).__name__)
        self._read += 1
        self._batches += 1
        self._seed_batch(info.id)
        is_short = self._batch_size is not None and len(items) < self._batch_size
        return batch, info.id, _pickled_state(info.dataset), is_short

    def _seed_batch(self, worker: int) -> None:
        seed_rng(self._seed, (_STREAM, int(self.epoch), self._rank, worker, self._batches))


def begin_epoch(source: Any, epoch: int, state: Any) -> None:
    """Tell a data set (or loader) the epoch, if it wants to know, and set it to a place; before ``iter()``.

    Args:
        source: the data set.
        epoch: from 0.
        state: of the source; None for the beginning of the epoch.
    """
    if callable(getattr(source, "set_epoch", None)):
        source.set_epoch(epoch)
    if state is not None:
        source.load_state_dict(state)


class Stream:
    """Reads a loader epoch by epoch, and knows where it is.

    Args:
        loader: iterable.
        seed: of the random numbers that are drawn while it is read.
        rank: of this process.
        window: batches that may have been read when those before them are all that is done.
        guard: makes a DataLoader whose workers hear no signals, of it or of a copy.

    Attributes:
        loader: as it was given.
        reader: what is iterated: the loader, or a copy whose workers send the data set's states along.
        newest: the newest batch of the epoch under way; None if there is none yet.
    """

    def __init__(
        self,
        loader: Any,
        seed: int = 0,
        rank: int = 0,
        window: int = 1,
        guard: Callable[[DataLoader], DataLoader] = lambda loader: loader,
    ) -> None:
        self._is_torchs = isinstance(loader, DataLoader)
        self.loader, reader = loader, guard(loader) if self._is_torchs else loader
        self._seed, self._rank, self._workers, self._source = seed, rank, 0, reader
        self._in_worker: _InWorker | None = None
        # also where the loader has a state, as torchdata's: that one does not hold what workers draw
        if self._is_torchs and isinstance(loader.dataset, IterableDataset):
            self._source, self._workers = loader.dataset, loader.num_workers
            if loader.num_workers:
                self._in_worker = own = _InWorker(loader, seed, rank)
                reader = copy.copy(loader)
                vars(reader).update(_iterator=None, worker_init_fn=own.begin, collate_fn=own.collate)
                reader = guard(reader)
        self.reader = reader
        self.newest: Any = None
        self._history: deque[_Progress] = deque(maxlen=window + 1)
        self._is_over = self._is_checked = False

    # ---- the state ----

    @property
    def name(self) -> str:
        """Of the data set, or of the loader if it is asked for the state."""
        return type(self._source).__name__

    def state_dict(self, epoch: int, batches: int) -> dict[str, Any] | None:
        """What reading goes on from, as types that a checkpoint may hold; None if there is no state of this place.

        Args:
            epoch: under way, or about to begin.
            batches: of it that are done.

        Raises:
            TypeError: the state of the data set holds what no checkpoint may hold.
        """
        progress = self._progress_at(epoch, batches)
        state = progress.state_dict() if progress is not None and has_state(self._source) else None
        if state is None:
            return None
        for start in state["starts"].values():
            check_state(start["state"], self.name)
        return {**state, "is_over": self._is_over, "workers": self._workers}

    def load_state_dict(self, state: dict[str, Any] | None) -> str | None:
        """Go on from a state in the next call of ``read``.

        Args:
            state: what state_dict returned; None if it is not known.

        Returns:
            Why it cannot, as the rest of a sentence; None if it can.
        """
        if not has_state(self._source):
            return f"{self.name} has no state_dict() and load_state_dict()"
        if state is None:
            return f"the checkpoint holds no state of {self.name} that fits"
        if state["workers"] != self._workers:
            return f"{self.name} was read by {state['workers']} workers, and is by {self._workers} now"
        self._history.append(_Progress(state["epoch"], state["batches"], state["last"], resumed=state))
        self._is_over = state["is_over"]
        return None

    def _progress_at(self, epoch: int, batches: int) -> _Progress | None:
        for progress in reversed(self._history):
            if (progress.epoch, progress.batches) == (epoch, batches):
                return progress
        if not self._history:
            return None
        newest = self._history[-1]
        # a rank that has come to its end goes on with the others
        is_over = newest.epoch == epoch and self._is_over and batches > newest.batches
        # or this epoch begins, or has not come far
        skip = newest.resumed["skip"] if newest.resumed else 0
        return newest if is_over or (newest.epoch, skip) == (epoch - 1, batches) else None

    # ---- reading ----

    def read(self, epoch: int, start: int, iterate: Callable[[Any], Iterator] = iter) -> Iterator:
        """The batches of an epoch from ``start`` on.

        Args:
            epoch: from 0.
            start: batches of it to leave out.
            iterate: makes an iterator of the loader.
        """
        progress, state = self._progress_at(epoch, start), self.state_dict(epoch, start)
        if state is not None and state["epoch"] == epoch:
            return self._read(epoch, state, 0, iterate)
        lives_on = self._in_worker is None or self.reader.persistent_workers
        if state is not None and lives_on and progress.resumed is not None:
            # a data set that keeps something from epoch to epoch has to come to the end of the one before
            next(self._read(state["epoch"], state, 0, iterate), None)
        batches = self._read(epoch, None, start, iterate)
        self._history[-1] = replace(self._history[-1], resumed=state, origin=state if lives_on else None)
        return batches

    def _read(self, epoch: int, state: dict[str, Any] | None, skip: int, iterate: Callable) -> Iterator:
        self.newest, self._is_over, starts = None, False, {}
        progress = _Progress(epoch)
        if state is not None:
            starts = state["starts"]
            if self._in_worker is not None:
                vars(self.reader).update(_iterator=None)  # only new workers can be told where to start
            places = {worker: _Place(start["batches"], resumed=start) for worker, start in starts.items()}
            progress = _Progress(epoch, state["batches"], state["last"], places, resumed=state)
        self._history.clear()
        self._history.append(progress)
        return self._new(self._items(epoch, starts, iterate), skip)

    def _new(self, items: Iterator, skip: int) -> Iterator:
        """The batches that are new to the training; notes the place after each."""
        for batch, worker, after, is_short in items:
            progress = self._history[-1]
            place = progress.places.get(worker, _Place())
            places = {**progress.places, worker: place.followed_by(after, is_short)}
            if place.resumed is not None and place.resumed["again"]:
                self._history[-1] = replace(progress, places=places)
                if worker == progress.last:
                    self.newest = batch
                continue
            self.newest = batch
            self._history.append(
                replace(progress, batches=progress.batches + 1, last=worker, places=places, resumed=None)
            )
            if progress.batches >= skip:
                yield batch
        self._is_over = True

    def _items(self, epoch: int, starts: dict[int, dict[str, Any]], iterate: Callable) -> Iterator[tuple]:
        """Each batch with the worker that has read it, the state after it, and whether it is short."""
        own, start = self._in_worker, starts.get(0, {"batches": 0, "state": None})
        key = (ORDER, epoch, self._rank) if self._rank else (ORDER, epoch)
        with kept_rng(*generators_of(self.loader) if self._is_torchs else ()):
            if self._is_torchs:
                tell_epoch(self.loader, epoch)
                seed_loader(self.loader, self._seed, key)
            else:
                seed_rng(self._seed, key)
            begin_epoch(self._source, epoch, None if own else start["state"])
            if own is not None:
                own.epoch.fill_(epoch)
                own.starts = starts
            items = iterate(self.reader)
            # much of what is drawn once for an epoch is drawn when the first item is asked for
            first = list(itertools.islice(items, 1)) if own is None and start["batches"] == 0 else []
        if own is not None:
            yield from items
            return
        for batch in itertools.chain(first, self._seeded(items, epoch, start["batches"] or 1)):
            if not self._is_checked and has_state(self._source):
                self._is_checked = True
                check_state(self._source.state_dict(), self.name)
            yield batch, 0, _pickled_state(self._source), False

    def _seeded(self, items: Iterator, epoch: int, number: int) -> Iterator:
        """The rest of the epoch's batches, read in this process with generators seeded for each of them."""
        while True:
            with kept_rng():
                seed_rng(self._seed, (_STREAM, epoch, self._rank, 0, number))
                batch = next(items, _END)
            if batch is _END:
                return
            yield batch
            number += 1

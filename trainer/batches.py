"""What a Trainer trains on: its loaders, the rest of an epoch, and a batch on its way to the model."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.utils.data import DataLoader

from trainer.data.iterable import Stream, length_of
from trainer.data.loader import Repeated, rest_of_epoch, shard, stream_of
from trainer.data.samplers import Cut, RankedBatchSampler
from trainer.data.script_samplers import DrawnBatches, OwnBatches, kept_generators
from trainer.device import count_samples, to_device
from trainer.model import Batch
from trainer.seeding import forked_rng
from trainer.signals import Stopped


class Batches:
    """Loaders and batches; a base class of Trainer."""

    restored_position: dict[str, Any] | None = None  # what a checkpoint says of the epoch under way, until it is used
    _cut: Cut | None = None
    # what reads the loader of the training, and that of the evaluation, if it cannot be set to a place
    _train_stream: Stream | None = None
    _eval_stream: Stream | None = None

    def take_data(
        self,
        train_samples: list | None,
        eval_samples: list | None,
        train_loader: DataLoader | None,
        eval_loader: DataLoader | None,
    ) -> None:
        """What the Trainer was given, cut to ``small_run`` samples."""
        n = self.args.small_run
        if n and (train_loader is not None or eval_loader is not None):
            raise ValueError(f"small_run={n} cuts the samples; it cannot cut loaders: hand samples over")
        self.train_samples = train_samples[:n] if n and train_samples else train_samples
        self.eval_samples = eval_samples[:n] if n and eval_samples else eval_samples
        self.train_loader, self.eval_loader = train_loader, eval_loader

    def over_ranks(self, samples: int) -> AbstractContextManager:
        """What a batch goes forward and backward in, with so many samples that count; see sync_batchnorm."""
        return nullcontext() if self.batch_norms is None else self.batch_norms.over_ranks(samples > 0)

    def build_loaders(self) -> None:
        """Build the loaders that a training needs, so that what is missing is said before it begins."""
        if not self.args.skip_train_epoch:
            self.get_loader(is_eval=False)
        if self.config.run_eval and not self.args.overfit_batch:
            self.epoch_length(self.get_loader(is_eval=True))  # which compares the ranks' data

    def get_loader(self, is_eval: bool) -> DataLoader:
        """The training or evaluation loader: the one handed over, else the model's, built once."""
        name = "eval_loader" if is_eval else "train_loader"
        loader = getattr(self, name)
        if loader is None:
            loader = self._new_loader(is_eval)
        loader = shard(loader, self.ranks.rank, self.ranks.world_size, self.config.training_seed)
        if is_eval and loader is self.train_loader and getattr(loader, "persistent_workers", False):
            loader = copy.copy(loader)  # one set of workers cannot read an evaluation in the middle of an epoch
            vars(loader)["_iterator"] = None
        setattr(self, name, loader)
        if not is_eval:
            self._find_place()
        if length_of(loader) == 0:
            raise ValueError(f"the {name} has no batch: check its samples, and drop_last with its batch size")
        return loader

    def end_workers(self) -> None:
        """End workers that are kept from epoch to epoch; those that the garbage collector ends take seconds each."""
        for loader in (self.train_loader, self.eval_loader):
            if isinstance(loader, DataLoader) and loader._iterator is not None:
                vars(loader)["_iterator"] = None

    def _new_loader(self, is_eval: bool) -> DataLoader:
        name, samples = ("eval_samples", self.eval_samples) if is_eval else ("train_samples", self.train_samples)
        if isinstance(samples, list | tuple) and not samples:
            raise ValueError(f"{name} is empty: check the data set")
        try:
            # the same order of samples on all ranks and after a resume, if the model shuffles them
            with forked_rng(self.config.training_seed):
                return self.model.get_data_loader(config=self.config, is_eval=is_eval, samples=samples, verbose=True)
        except TypeError as error:
            if samples is not None:
                raise
            remedy = "give some, or set run_eval=False" if is_eval else "give some, or a train_loader"
            raise ValueError(f"{name}=None, and get_data_loader needs them ({error}): {remedy}") from error

    def epoch_length(self, loader: DataLoader) -> float:
        """Batches of the epoch under way, on the rank that has most of them; infinity if nobody knows.

        Raises:
            ValueError: the Trainer splits the data set, and ranks have different ones.
        """
        lengths = self.ranks.gather(length_of(loader))
        sampler = getattr(loader, "batch_sampler", None)
        is_split_here = isinstance(sampler, RankedBatchSampler) and not isinstance(sampler, OwnBatches)
        if is_split_here and len(set(lengths)) > 1:
            raise ValueError(f"the ranks have {lengths} batches: give all of them the same data set")
        return max(lengths)

    def updates_in(self, batches: float) -> float:
        """The updates that so many batches make; infinity for infinity."""
        return batches if batches == math.inf else math.ceil(max(0, batches) / self.args.grad_accum_steps)

    def rest_of_epoch(self, loader: DataLoader, epoch: int, start: int, is_training: bool = False) -> Iterator[Any]:
        """The batches of an epoch from ``start`` on; ``is_training``: what a checkpoint says of it is used."""
        cut = self._cut_of(epoch)
        if loader is not self.train_loader or (cut and start < cut.batches):
            cut = None
        several = self.ranks.world_size > 1
        gather = self.ranks.gather if several else None
        # of several ranks, others may have their batch, and wait for this rank in the update
        heard = None if several else self._signals.heard
        stream = self._stream_of(loader, is_training)
        return rest_of_epoch(loader, epoch, start, self.config.training_seed, cut, gather, stream, heard)

    def _stream_of(self, loader: DataLoader, is_training: bool) -> Stream | None:
        """What reads a loader that cannot be set to a place, and knows where it is; kept from epoch to epoch."""
        name = "_train_stream" if is_training else "_eval_stream"
        stream = getattr(self, name)
        if stream is None or stream.loader is not loader:
            stream = stream_of(loader, self.config.training_seed, self.ranks.rank, self.args.grad_accum_steps)
            setattr(self, name, stream)
        return stream

    def windows(self, loader: DataLoader) -> Iterator[list[Any]]:
        """The rest of this epoch's batches, in lists of grad_accum_steps; after a signal, none that is waited for."""
        try:
            if self.args.overfit_batch:
                with forked_rng(self._seed):  # the same batch in every epoch, and after a stop in its middle
                    first, n = next(self.rest_of_epoch(loader, 0, 0)), self.epoch_length(loader)
                n = self.args.grad_accum_steps if n == math.inf else n  # one update, where nobody knows
                batches = (copy.deepcopy(first) for _ in range(n - self.batches_done))
            else:
                batches = self.rest_of_epoch(loader, self.epochs_done, self.batches_done, is_training=True)
            while window := list(itertools.islice(batches, self.args.grad_accum_steps)):
                yield window
        except Stopped:  # what was read of a window is read again
            return

    def evaluation_batches(self, loader: DataLoader) -> Iterator[Any]:
        """The batches of an evaluation, until a rank has heard of a signal; with overfit_batch, the training's one."""
        try:
            for batch in itertools.islice(self.rest_of_epoch(loader, 0, 0), 1 if self.args.overfit_batch else None):
                self._agreed = self.ranks.agree(0, self._signals.received).signal
                if self._signal is not None:
                    return
                yield batch
        except Stopped:
            return

    def format_batch(self, batch: Any) -> Batch:
        """The loader's batch through format_batch, onto the device, through format_batch_on_device."""
        batch = self.model.format_batch(batch)
        if batch is None:
            raise ValueError(f"{type(self.model).__name__}.format_batch returned None: return the batch")
        batch = to_device(batch, self.device)
        return self.model.format_batch_on_device(batch)

    def prepare(self, batch: Any) -> tuple[Batch, int]:
        """A batch as the model sees it, and how many samples it counts for."""
        if isinstance(batch, Repeated):  # this rank has no samples left where others have
            return self.format_batch(batch.batch), 0
        batch = self.format_batch(batch)
        return batch, count_samples(batch)

    # ---- the place in the epoch, for a run that goes on with another number of ranks or batch size ----

    def position(self) -> dict[str, Any] | None:
        """How much of the epoch under way is done, in samples; None before there is a training loader.

        All ranks call it together: each adds the state of what it reads, if its loader cannot be set to a place.
        """
        if self.restored_position is not None or self.train_loader is None:
            return self.restored_position
        sampler, size, cut = self._sampler(), self._global_size(), self._cut_of(self.epochs_done)
        samples = self.batches_done * size
        if sampler is not None and self.batches_done:
            sampler.set_epoch(self.epochs_done, cut=cut)
            samples = sampler.samples_in(self.batches_done)
        position = {"samples": samples, "global_size": size, "cut": cut and dataclasses.asdict(cut)}
        if (stream := self._stream_of(self.train_loader, is_training=True)) is not None:
            states = self.ranks.gather(stream.state_dict(self.epochs_done, self.batches_done))
            position |= {"streams": states} if any(states) else {}
        return position

    def _sampler(self) -> RankedBatchSampler | None:
        """The training loader's, if it can be set to a place."""
        sampler = getattr(self.train_loader, "batch_sampler", None)
        return sampler if isinstance(sampler, RankedBatchSampler) else None

    def _global_size(self) -> int:
        """Samples in a batch of the training, on all ranks together."""
        if (sampler := self._sampler()) is not None:
            return sampler.global_size
        return (getattr(self.train_loader, "batch_size", None) or 1) * self.ranks.world_size

    def _cut_of(self, epoch: int) -> Cut | None:
        return self._cut if self._cut and self._cut.epoch == epoch else None

    def _find_place(self) -> None:
        """Tell the training loader where the epoch under way goes on."""
        position, self.restored_position = self.restored_position, None
        if position:
            if self.batches_done:
                self._go_on(position["samples"], position["global_size"], position["cut"])
                if getattr(self.train_loader, "in_order", True) is False and self.train_loader.num_workers > 1:
                    self.c_logger.warn(
                        "in_order=False: its batches come as the workers get ready, so that in the rest of this epoch "
                        "samples may come twice or be left out"
                    )
            if (stream := self._stream_of(self.train_loader, is_training=True)) is not None:
                self._go_on_reading(stream, position)
        if (sampler := self._sampler()) is not None:
            sampler.set_epoch(self.epochs_done, self.batches_done, self._cut_of(self.epochs_done))
            if position and isinstance(sampler, DrawnBatches) and not sampler.is_repeatable():
                self.c_logger.warn(
                    "the sampler gives another order each time, which a checkpoint does not hold: the order of samples "
                    "is not that of a run without the stop; let it draw from the epoch (set_epoch), or from the global "
                    "generators of python, numpy or torch"
                )
            if position and (kept := kept_generators(self.train_loader.dataset)):
                self.c_logger.warn(
                    f"{type(self.train_loader.dataset).__name__} keeps random generators of its own "
                    f"({', '.join(kept)}), whose states no checkpoint holds: what it draws is not that of a run "
                    "without the stop; let it draw from the global generators of python, numpy or torch, which are "
                    "seeded for each sample"
                )

    def _go_on(self, samples: int, global_size: int, cut: dict[str, int] | None) -> None:
        """Find a checkpoint's place in its epoch."""
        sampler, now, before = self._sampler(), self._global_size(), Cut(**cut) if cut else None
        change = f"this epoch had {global_size} samples in a batch of all ranks, and goes on with {now}"
        if now == global_size:
            self._cut = before
        elif sampler is None or isinstance(sampler, OwnBatches):
            self.batches_done = samples // now
            self.c_logger.warn(
                f"{change}: its loader has an order of its own, so that in the rest of the epoch samples may come "
                "twice or be left out"
            )
        else:
            size = before.global_size if before else global_size
            self._cut = Cut(self.epochs_done, size, samples, self.batches_done)
            self.c_logger.print(f"{change}: each of its other samples still comes once")

    def _go_on_reading(self, stream: Stream, position: dict[str, Any]) -> None:
        """Set what cannot be set to a place to a checkpoint's state; say what is lost where that cannot be done."""
        states, is_same_size = position.get("streams", []), position["global_size"] == self._global_size()
        fits = is_same_size and len(states) == self.ranks.world_size
        problem = stream.load_state_dict(states[self.ranks.rank] if fits else None)
        if problem is None or not self.batches_done or not is_same_size:  # of another size, _go_on has told
            return
        again = f"{problem}: the {self.batches_done} batches of this epoch that are done are read again, and dropped"
        if states:
            self.c_logger.warn(f"{again}; in the rest of the epoch samples may come twice or be left out")
        else:
            self.c_logger.warn(
                f"{again}; the rest of the epoch is as without the stop if there are as many workers as before, and if "
                "what is read depends on nothing but them, the epoch (set_epoch) and the global generators of python, "
                "numpy and torch, which are seeded for each batch"
            )

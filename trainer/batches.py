"""What a Trainer trains on: its loaders, the rest of an epoch, and a batch on its way to the model."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.utils.data import DataLoader

from trainer.data.loader import Repeated, rest_of_epoch, shard
from trainer.data.samplers import Cut, RankedBatchSampler
from trainer.data.script_samplers import OwnBatches
from trainer.device import count_samples, to_device
from trainer.model import Batch
from trainer.seeding import forked_rng


class Batches:
    """Loaders and batches; a base class of Trainer."""

    restored_position: dict[str, Any] | None = None  # what a checkpoint says of the epoch under way, until it is used
    _cut: Cut | None = None

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
        if len(loader) == 0:
            raise ValueError(f"the {name} has no batch: check its samples, and drop_last with its batch size")
        return loader

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

    def epoch_length(self, loader: DataLoader) -> int:
        """Batches of the epoch under way, on the rank that has most of them.

        Raises:
            ValueError: the Trainer splits the data set, and ranks have different ones.
        """
        lengths = self.ranks.gather(len(loader))
        sampler = getattr(loader, "batch_sampler", None)
        is_split_here = isinstance(sampler, RankedBatchSampler) and not isinstance(sampler, OwnBatches)
        if is_split_here and len(set(lengths)) > 1:
            raise ValueError(f"the ranks have {lengths} batches: give all of them the same data set")
        return max(lengths)

    def rest_of_epoch(self, loader: DataLoader, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from ``start`` on."""
        cut = self._cut_of(epoch)
        if loader is not self.train_loader or (cut and start < cut.batches):
            cut = None
        gather = self.ranks.gather if self.ranks.world_size > 1 else None
        return rest_of_epoch(loader, epoch, start, self.config.training_seed, cut, gather)

    def windows(self, loader: DataLoader) -> Iterator[list[Any]]:
        """The rest of this epoch's batches, in lists of grad_accum_steps."""
        if self.args.overfit_batch:
            first = next(self.rest_of_epoch(loader, 0, 0))
            batches = (copy.deepcopy(first) for _ in range(self.epoch_length(loader) - self.batches_done))
        else:
            batches = self.rest_of_epoch(loader, self.epochs_done, self.batches_done)
        while window := list(itertools.islice(batches, self.args.grad_accum_steps)):
            yield window

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
        """How much of the epoch under way is done, in samples; None before there is a training loader."""
        if self.restored_position is not None or self.train_loader is None:
            return self.restored_position
        sampler, size, cut = self._sampler(), self._global_size(), self._cut_of(self.epochs_done)
        samples = self.batches_done * size
        if sampler is not None and self.batches_done:
            sampler.set_epoch(self.epochs_done, cut=cut)
            samples = sampler.samples_in(self.batches_done)
        return {"samples": samples, "global_size": size, "cut": cut and dataclasses.asdict(cut)}

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
        if position and self.batches_done:
            self._go_on(**position)
        if (sampler := self._sampler()) is not None:
            sampler.set_epoch(self.epochs_done, self.batches_done, self._cut_of(self.epochs_done))

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

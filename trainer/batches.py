"""What a Trainer trains on: its loaders, the rest of an epoch, and a batch on its way to the model."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from trainer.data.loader import Repeated, rest_of_epoch, shard
from trainer.device import count_samples, to_device
from trainer.model import Batch
from trainer.seeding import forked_rng


class Batches:
    """Loaders and batches; a base class of Trainer."""

    def build_loaders(self) -> None:
        """Build the loaders that a training needs, so that what is missing is said before it begins."""
        if not self.args.skip_train_epoch:
            self.get_loader(is_eval=False)
        if self.config.run_eval and not self.args.overfit_batch:
            self.get_loader(is_eval=True)

    def get_loader(self, is_eval: bool) -> DataLoader:
        """The training or evaluation loader: the one handed over, else the model's, built once."""
        name = "eval_loader" if is_eval else "train_loader"
        loader = getattr(self, name)
        if loader is None:
            loader = self._new_loader(is_eval)
        loader = shard(loader, self.ranks.rank, self.ranks.world_size, self.config.training_seed)
        setattr(self, name, loader)
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
        """Batches of an epoch, on the rank that has most of them."""
        return max(self.ranks.gather(len(loader)))

    def rest_of_epoch(self, loader: DataLoader, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from ``start`` on."""
        length = self.epoch_length(loader) if self.ranks.world_size > 1 else None
        return rest_of_epoch(loader, epoch, start, length, self.config.training_seed)

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

"""The largest batch size that fits into memory, found by training with one after another."""

import collections
import copy
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from trainer.callbacks import Callbacks
from trainer.checkpoint import load_checkpoint, newest_first
from trainer.data.iterable import length_of
from trainer.data.loader import BucketBatchSampler, rest_of_epoch
from trainer.loggers.base import DashboardLogger
from trainer.seeding import capture_rng_state, restore_rng_state

if TYPE_CHECKING:
    from trainer.trainer import Trainer

_UPDATES = 2  # of a trial: the first one also makes the optimizers' states, beside which the second has to fit
_MARGIN = 20  # a 20th of a GPU's free memory is left for what many batches of many shapes do to its allocator
_MESSAGES = (
    "out of memory",  # of CUDA, HIP, XPU and MPS
    "can't allocate memory",  # of the CPU; "not enough memory" on Windows
    "not enough memory",
    "Invalid buffer size",  # of MPS: a single tensor that is too large
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_STATEFUL = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler)


def fit_with_largest_batch_size(trainer: "Trainer", starting_batch_size: int = 2048) -> None:
    """Set ``config.batch_size`` to the largest that fits into memory, then ``fit``.

    Each size is tried by two real updates (of accumulated batches, if there are more) with the longest samples of the
    data set, where the loader is one of ``build_loader`` that knows lengths, else with the loader's first batches.
    Functions that were handed over as callbacks do not hear of them; the model's own hooks do. Afterwards everything
    is as before: the fit is bitwise that of a training that had this batch size from the start. ``eval_batch_size``
    is not changed.

    Up to 256 the size is the largest exactly; above that it is at most 1/128 too small. While sizes are tried, a
    twentieth of a GPU's free memory is held back. A CPU's memory has to be one that the system refuses when there is
    no more: most systems rather end the process, so choose the starting size with care there.

    A run that is continued keeps its batch size, by which its place in the data is counted.

    Args:
        trainer: not trained yet, with a model that makes its loaders by ``get_data_loader``.
        starting_batch_size: the size that is tried first; then it is doubled or halved. No size above the number of
            samples is tried.

    Raises:
        ValueError: a loader was handed over, which cannot be built anew; several ranks; a starting size below 1.
        MemoryError: not even batches of one sample fit.
    """
    if starting_batch_size < 1:
        raise ValueError(f"starting_batch_size={starting_batch_size}: at least 1 is needed")
    if trainer.train_loader is not None and trainer.total_steps_done == 0:
        raise ValueError("train_loader has its batch size already: hand train_samples over to have one found")
    if trainer.args.use_ddp:
        raise ValueError("several ranks cannot search for the largest batch size: find it on one GPU")
    trainer.open_run()
    try:
        if trainer.total_steps_done > 0:
            if not trainer.args.continue_path:  # restarted by the launcher: the config is that of the script again
                state = load_checkpoint(newest_first(trainer.output_path)[0], mapped=True)
                trainer.config.batch_size = state["config"]["batch_size"]
                trainer.write_config()
            trainer.c_logger.print(f"a run that is continued keeps its batch_size {trainer.config.batch_size}")
        else:
            _set_largest(trainer, starting_batch_size)
        trainer.fit()
    finally:
        trainer.close_run()


def _set_largest(trainer: "Trainer", start: int) -> None:
    given, trials = trainer.config.batch_size, _Trials(trainer)
    try:
        size = find_largest(trials.fits, start, trials.count_samples())
        if size == 0:
            raise MemoryError(
                f"batch_size=1 does not fit into the memory of {trainer.device} ({trials.error}): "
                "take shorter samples, a smaller model or mixed_precision"
            )
    except BaseException:
        trainer.config.batch_size = given
        raise
    trainer.config.batch_size = size
    trainer.c_logger.print(f"batch_size {size} is the largest that fits (it was {given})")
    trainer.write_config()  # a run is continued with what its folder says


def find_largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest size from 1 to ``limit`` that fits, or 0: up to 256 exactly, above that within 1/128.

    Doubles from ``start`` while sizes fit, or halves it until one does, and then bisects.
    """
    largest, too_large, size = 0, None, min(start, limit)
    while largest < limit and (too_large is None or too_large - largest > max(1, largest // 128)):
        if fits(size):
            largest = size
        else:
            too_large = size
        size = min(2 * largest, limit) if too_large is None else (largest + too_large) // 2
    return largest


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


class _Trials:
    """Trains a little with a batch size, and undoes it.

    Attributes:
        error: what the last size that did not fit has failed with.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.error = trainer, ""
        self._state = _State(trainer)
        self._rng = capture_rng_state()
        self._reserve = None
        if trainer.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(trainer.device)
            self._reserve = torch.empty(free // _MARGIN, dtype=torch.uint8, device=trainer.device)

    def count_samples(self) -> int:
        """Samples that the model's loader reads: it may leave some of the trainer's out."""
        try:
            loader = self._loader(1)
            if math.isinf(samples := length_of(loader)):
                raise ValueError(f"the {type(loader).__name__} has no length: the search needs to know its samples")
            return int(samples)
        finally:
            self._undo()

    def fits(self, size: int) -> bool:
        """Whether there is memory for updates with this batch size."""
        fits = True
        try:
            self._train(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # the message only: the error holds all the tensors of the frames it went through
            fits, self.error = False, str(error).partition("\n")[0] or type(error).__name__
        finally:
            self._undo()
        self.trainer.c_logger.print(f"batch_size {size}: {'fits' if fits else 'out of memory'}")
        return fits

    def _loader(self, size: int) -> DataLoader:
        self.trainer.config.batch_size, self.trainer.train_loader = size, None
        return self.trainer.get_loader(is_eval=False)

    def _train(self, size: int) -> None:
        trainer = self.trainer
        trainer.callbacks = Callbacks(trainer.model, [*trainer.criterion, *trainer.optimizer])
        trainer.dashboard_logger = DashboardLogger()
        if trainer.precision.scaler.is_enabled():
            # the first updates are skipped while the loss scale is too large, and make no optimizer state
            trainer.precision.scaler.load_state_dict({**trainer.precision.scaler.state_dict(), "scale": 1.0})
        trainer.callbacks("on_epoch_start", trainer)
        loader = self._loader(size)
        trainer.model.train()
        trainer.callbacks("on_train_epoch_start", trainer)
        batches = _heaviest_batches(loader, size, trainer.epochs_done)
        for _ in range(_UPDATES):
            trainer.train_step(list(itertools.islice(batches, min(trainer.args.grad_accum_steps, len(loader)))))
            trainer.callbacks("on_train_step_end", trainer)

    def _undo(self) -> None:
        self._state.restore()
        restore_rng_state(self._rng)
        gc.collect()
        if self.trainer.device.type in ("cuda", "mps"):
            getattr(torch, self.trainer.device.type).empty_cache()


def _heaviest_batches(loader: DataLoader, size: int, epoch: int) -> Iterator[Any]:
    """The batch of the longest samples again and again, or the epoch's batches when lengths are not known."""
    sampler = loader.batch_sampler
    if isinstance(sampler, BucketBatchSampler) and sampler.lengths is not None:
        endless = itertools.repeat(np.argsort(sampler.lengths, kind="stable")[-size:].tolist())
        yield from DataLoader(loader.dataset, batch_sampler=endless, collate_fn=loader.collate_fn)
    while True:  # an epoch may have fewer batches than are needed
        yield from rest_of_epoch(loader, epoch, 0)


class _State:
    """What a training's objects hold, to be put back in place: attributes, containers, and tensors (kept on the CPU).

    It goes through this package's objects, modules, optimizers, schedulers and scalers, and the lists, dicts and sets
    in them. So nothing has to be named, and a model's own counters and caches are put back as well.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._seen = {id(trainer.train_samples), id(trainer.eval_samples)}  # may be large, and nothing changes them
        self._add(trainer)

    def _add(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.detach().to("cpu", copy=True)))
        elif isinstance(value, dict | list | set | collections.deque):
            self._containers.append((value, copy.copy(value)))
            for item in value.values() if isinstance(value, dict) else value:
                self._add(item)
        elif isinstance(value, tuple):
            for item in value:
                self._add(item)
        elif isinstance(value, _STATEFUL) or type(value).__module__.startswith("trainer."):
            self._add(vars(value))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, without gradients."""
        for container, items in self._containers:
            container.clear()
            container.update(items) if isinstance(container, dict | set) else container.extend(items)
        for tensor, value in self._tensors:
            tensor.copy_(value)
            if tensor.is_leaf:
                tensor.grad = None

"""What Coqui's models and scripts call by another name, or have besides; see coqui_modules for where they find it."""

import functools
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import torch

from trainer.optimizers import get_lr, new_optimizer, new_scheduler, reset_lr
from trainer.restore import fit_weights, report, summary, under_own_names
from trainer.storage import write_file

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from trainer.model import TrainerModel


logger = logging.getLogger("trainer")


class CoquiNames:
    """What Coqui's Trainer calls otherwise, or has besides; a base class of Trainer."""

    def fit_with_largest_batch_size(self, starting_batch_size: int = 2048) -> None:
        """Find the largest batch size that fits into memory, by doubling and bisecting, and fit with it."""
        from trainer.batch_size import fit_with_largest_batch_size

        fit_with_largest_batch_size(self, starting_batch_size)

    def profile_fit(
        self, torch_profiler: torch.profiler.profile, epochs: int | None = None, small_run: int | None = None
    ) -> torch.profiler.profile:
        """Fit under a profiler, which is stepped after every update; returns it."""
        from trainer.profiling import profile_fit

        return profile_fit(self, torch_profiler, epochs, small_run)

    @property
    def use_cuda(self) -> bool:
        """Whether the training is on a GPU."""
        return self.device.type == "cuda"

    @property
    def num_gpus(self) -> int:
        """GPUs of this training, over all ranks."""
        return self.ranks.world_size if self.use_cuda else 0

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler, if losses are scaled."""
        return self.precision.scaler if self.precision.scaling else None

    @property
    def use_amp_scaler(self) -> bool:
        """Whether losses are scaled."""
        return self.precision.scaling

    @property
    def grad_accum_steps(self) -> int:
        """Batches of an update that the model's own ``optimize`` has to count: 1, since the Trainer holds its steps.

        Scripts that ask ``total_steps_done % grad_accum_steps == 0`` before ``step()`` would else count twice.
        """
        return self.args.grad_accum_steps if self.manual is None else 1

    @property
    def wrapped_model(self) -> None:
        """Coqui's DDP wrapper; gradients are summed over the ranks without one."""

    def _get_model(self) -> "TrainerModel":
        return self.model

    def get_lr(self) -> list[float]:
        """The initial learning rate of each optimizer."""
        return get_lr(self.model, self.config, len(self.optimizer))

    def reset_lr(self) -> None:
        """Every parameter group goes back to its own initial rate."""
        reset_lr(self.optimizer)

    def eval_epoch(self) -> None:
        """See evaluate."""
        self.evaluate()

    def test_run(self) -> None:
        """See test."""
        self.open_run()
        self.test()

    def get_train_dataloader(self, samples: list | None, *, verbose: bool = True) -> "DataLoader":
        """A new loader of the model's for these training samples."""
        return self.model.get_data_loader(config=self.config, is_eval=False, samples=samples, verbose=verbose)

    def get_eval_dataloader(self, samples: list | None, *, verbose: bool = True) -> "DataLoader":
        """A new loader of the model's for these evaluation samples."""
        return self.model.get_data_loader(config=self.config, is_eval=True, samples=samples, verbose=verbose)

    @staticmethod
    def master_params(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        """All parameters of an optimizer."""
        for group in optimizer.param_groups:
            yield from group["params"]


def get_optimizer(
    optimizer_name: str,
    optimizer_params: dict[str, Any],
    lr: float,
    model: torch.nn.Module | None = None,
    parameters: Iterable[Any] | None = None,
) -> torch.optim.Optimizer:
    """A torch optimizer by its name, over the model's parameters or those given."""
    parameters = parameters if model is None else model.parameters()
    return new_optimizer(optimizer_name, optimizer_params, lr, parameters)


def get_scheduler(
    lr_scheduler: str | None, lr_scheduler_params: dict[str, Any], optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """A scheduler by its name; None for None."""
    return new_scheduler(lr_scheduler, lr_scheduler_params, optimizer)


def load_fsspec(path: str | os.PathLike, map_location: Any = None, *, cache: bool = True, **options: Any) -> Any:
    """``torch.load`` from a path or URL; never executes code. ``cache`` keeps a copy of a remote file."""
    remote = cache and "://" in str(path)
    chained = {"filecache": {"cache_storage": str(get_user_data_dir("tts_cache"))}} if remote else {}
    with fsspec.open(f"filecache::{path}" if remote else str(path), "rb", **chained) as file:
        return torch.load(file, map_location=map_location, weights_only=True, **options)


def save_fsspec(state: Any, path: str | os.PathLike, **options: Any) -> None:
    """``torch.save`` to a path or URL; a file that is there already stays until the new one is whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    write_file(os.fspath(path), lambda file: file.write(buffer.getbuffer()))


def get_user_data_dir(appname: str) -> Path:
    """Where an application keeps its data: in TTS_HOME, or where the system wants it."""
    if home := os.environ.get("TTS_HOME") or os.environ.get("XDG_DATA_HOME"):
        folder = Path(home).expanduser()
    elif sys.platform == "win32":
        folder = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        folder = Path.home() / "Library/Application Support"
    else:
        folder = Path.home() / ".local/share"
    return folder / appname


def set_partial_state_dict(model_dict: dict[str, Any], checkpoint_state: dict[str, Any], config: Any) -> dict[str, Any]:
    """The model's state with what fits of a checkpoint's (see restore.fit_weights); tells what does not."""
    words = getattr(config, "reinit_layers", None) or []
    weights, entries = fit_weights(under_own_names(checkpoint_state, model_dict), model_dict, words)
    for line in (summary(entries), *report(entries)):
        logger.info(line)
    model_dict.update(weights)
    return model_dict


def count_parameters(model: torch.nn.Module) -> int:
    """Trainable values of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def is_dist_avail_and_initialized() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


def rank_zero_only(function: Any) -> Any:
    """A function that does nothing on the other ranks."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        return function(*args, **options) if is_main_process() else None

    return wrapped


def is_pytorch_at_least_2_4() -> bool:
    """Always, here."""
    return True

"""Checkpoints: files that hold the whole state of a training."""

import datetime
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fsspec
import torch

from trainer.seeding import capture_rng_state, restore_rng_state

if TYPE_CHECKING:
    from trainer.trainer import Trainer

FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint_(\d+)\.pth")


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Everything that a training needs to go on as if it had never stopped.

    Optimizers and schedulers are named by their position; random states by their rank.
    """
    trainer.keep_avg_train.read()
    return {
        "config": trainer.config.to_dict(),
        "model": trainer.model.state_dict(),
        "optimizer": {str(i): o.state_dict() for i, o in enumerate(trainer.optimizer)},
        "scheduler": {str(i): s.state_dict() for i, s in enumerate(trainer.scheduler) if s is not None},
        "scaler": trainer.precision.scaler.state_dict(),
        "step": trainer.total_steps_done,
        "epoch": trainer.epochs_done,
        "batches_done": trainer.batches_done,
        "stepped": sorted(trainer.stepped_optimizers),
        "eval_step": trainer.last_eval_step,
        "best_loss": trainer.best_loss,
        "averages": trainer.keep_avg_train.state_dict(),
        "rng": {"0": capture_rng_state()},
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
    }


def save_step(trainer: "Trainer") -> Path:
    """Save ``checkpoint_<step>.pth`` in the run's folder, then delete the oldest beyond ``save_n_checkpoints``."""
    path = trainer.output_path / f"checkpoint_{trainer.total_steps_done}.pth"
    save_checkpoint(state_of(trainer), path)
    remove_old_checkpoints(trainer.output_path, keep=trainer.config.save_n_checkpoints)
    return path


def save_best(trainer: "Trainer") -> None:
    """Save ``best_model.pth``, and with ``save_all_best`` a copy that stays, ``best_model_<step>.pth``."""
    state = state_of(trainer)
    save_checkpoint(state, trainer.output_path / "best_model.pth")
    if trainer.config.save_all_best:
        save_checkpoint(state, trainer.output_path / f"best_model_{trainer.total_steps_done}.pth")


def restore(trainer: "Trainer", source: str | Path, whole: bool) -> None:
    """Load a checkpoint into a trainer: the whole state to continue a run, or the model's weights to start a new one.

    Raises:
        ValueError: the checkpoint's model is another one than the trainer's; lists what differs.
    """
    state = load_checkpoint(source)
    problems = _differences(state["model"], trainer.model.state_dict())
    if problems:
        raise ValueError(
            "\n  - ".join([f"{source}: is of another model than {type(trainer.model).__name__}", *problems])
        )
    trainer.model.load_state_dict(state["model"])
    if not whole:
        trainer.c_logger.print(f"weights restored from {source} (step {state['step']})")
        return
    for i, optimizer in enumerate(trainer.optimizer):
        optimizer.load_state_dict(state["optimizer"][str(i)])
    for i, scheduler in enumerate(trainer.scheduler):
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"][str(i)])
    if trainer.precision.scaler.is_enabled() and state["scaler"]:
        trainer.precision.scaler.load_state_dict(state["scaler"])
    trainer.total_steps_done, trainer.epochs_done = state["step"], state["epoch"]
    trainer.batches_done, trainer.stepped_optimizers = state["batches_done"], set(state["stepped"])
    trainer.last_eval_step, trainer.best_loss = state["eval_step"], state["best_loss"]
    trainer.keep_avg_train.load_state_dict(state["averages"])
    restore_rng_state(state["rng"]["0"])
    trainer.c_logger.print(f"continuing from {source}: step {state['step']}, epoch {state['epoch'] + 1}")


def _differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names and shapes in which two model states differ; the first ten."""
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    problems += [
        f"{name}: has shape {list(found[name].shape)}, the model {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    return problems[:10] + [f"and {len(problems) - 10} more"] * (len(problems) > 10)


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file that is there whole or not at all: beside its place, synced, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: its entry in the folder is written apart from the file. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save a state dict durably under its format's version."""
    write_file(path, lambda file: torch.save({"format": FORMAT_VERSION, **state}, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, from a path or any URL that fsspec reads; never executes code in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, would execute code, is no checkpoint, or of a newer format.
    """
    with fsspec.open(str(path), "rb") as file:
        state = _read_state(file, path)
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path}: holds no model; give a checkpoint that the Trainer wrote")
    version = state.get("format", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{path}: has format {state['format']}, this Trainer reads up to {FORMAT_VERSION}; upgrade it")
    return state


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A model's state dict from a file: ``.safetensors``, or ``.pth`` and the like (of a checkpoint its ``model``).

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a ``.safetensors`` file, and the package is not installed.
        ValueError: the file is damaged, or would execute code.
    """
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path}: pip install safetensors to read it") from error
        return load_file(path)
    with fsspec.open(str(path), "rb") as file:
        state = _read_state(file, path)
    return state.get("model", state)


def _read_state(file: BinaryIO | Path, path: str | Path, **options: Any) -> Any:
    """What torch.load reads, with one error for all the ways in which it fails."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        reason = "holds more than tensors and plain values, which could execute code, or is damaged"
        raise ValueError(f"{path}: {reason} ({str(error).splitlines()[0]})") from error
    # torch lets whatever its readers stumble over through: of zip files, of pickles cut off in the middle
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error})") from error


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every ``checkpoint_<step>.pth`` of a run, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint (best_model.pth included) with the highest step.

    Raises:
        FileNotFoundError: the run's folder holds none.
    """
    checkpoints = list_checkpoints(folder)
    best = folder / "best_model.pth"
    if best.is_file():
        # mapped, so that only the step is read of what may be gigabytes
        step = _read_state(best, best, mmap=True)["step"]
        checkpoints = sorted([(step, best), *checkpoints], key=lambda entry: entry[0])
    if not checkpoints:
        raise FileNotFoundError(f"{folder}: holds no checkpoint_<step>.pth and no best_model.pth to continue from")
    return checkpoints[-1][1]


def exist_in(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint to continue from."""
    return bool(list_checkpoints(folder)) or (folder / "best_model.pth").is_file()


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for _, path in list_checkpoints(folder)[:-keep]:
        path.unlink()

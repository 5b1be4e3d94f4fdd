"""Checkpoints: files that hold the whole state of a training.

``python -m trainer.checkpoint inspect FILE`` prints what one holds; ``strip FILE`` writes a small file of the weights.
"""

import datetime
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fsspec
import torch

from trainer.restore import OPTIONAL_PARTS, best_loss_of, continue_run, is_coquis, start_from
from trainer.seeding import capture_rng_state
from trainer.sharded import full, full_state

if TYPE_CHECKING:
    from trainer.trainer import Trainer

FORMAT_VERSION = 2
_NAME = re.compile(r"checkpoint_(\d+)\.pth")


class DamagedError(ValueError):
    """A file cannot be read as a checkpoint."""


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Everything that a training needs to go on as if it had never stopped; all ranks must call it together.

    Optimizers and schedulers are named by their position; random states by their rank. Where the model is sharded, the
    tensors are whole on rank 0, which writes them, and None on the others.

    Raises:
        FloatingPointError: a loss or a weight is not finite: there is nothing worth saving.
    """
    trainer.guard.finish()
    trainer.keep_avg_train.read()
    parts = {name: getattr(trainer, name) for name in OPTIONAL_PARTS}
    state = {
        "config": trainer.config.to_dict(),
        "model": trainer.model.state_dict(),
        "optimizer": {str(i): o.state_dict() for i, o in enumerate(trainer.optimizer)},
        "scheduler": {str(i): s.state_dict() for i, s in enumerate(trainer.scheduler) if s is not None},
        "scaler": trainer.precision.scaler.state_dict(),
        "step": trainer.total_steps_done,
        "epoch": trainer.epochs_done,
        "batches_done": trainer.batches_done,
        "position": trainer.position(),
        "stepped": sorted(trainer.stepped_optimizers),
        "eval_step": trainer.last_eval_step,
        "model_loss": dict(trainer.best_loss),
        "averages": trainer.keep_avg_train.state_dict(),
        "rng": {str(rank): state for rank, state in enumerate(trainer.ranks.gather(capture_rng_state()))},
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        **{name: part.state_dict() for name, part in parts.items() if part is not None},
    }
    _check_finite(trainer, state)
    return full_state(state, keep=trainer.ranks.is_main) if trainer.shards is not None else state


def _check_finite(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """Raise a FloatingPointError that names the first weight with a NaN; one transfer for each device."""
    parameters = {name for name, _ in trainer.model.named_parameters(remove_duplicate=False)}
    weights = [(name, tensor, f"weight {name}") for name, tensor in state["model"].items()]
    weights += [(name, t, f"averaged weight {name}") for name, t in state.get("ema", {}).get("weights", {}).items()]
    pending: dict[torch.device, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
    for name, tensor, label in weights:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            # buffers may rightly be infinite: attention masks are
            bad = ~tensor.isfinite() if name in parameters else tensor.isnan()
            pending.setdefault(tensor.device, []).append((label, tensor, full(bad.sum())))
    for entries in pending.values():
        counts = torch.stack([bad for _, _, bad in entries]).tolist()
        for (label, tensor, _), count in zip(entries, counts):
            if count:
                raise FloatingPointError(
                    f"{label}: {count} of {tensor.numel()} values are NaN or infinite after update "
                    f"{trainer.total_steps_done}; nothing is saved, and earlier checkpoints stay"
                )


def save_step(trainer: "Trainer") -> Path:
    """Save ``checkpoint_<step>.pth`` in the run's folder, then delete the oldest beyond ``save_n_checkpoints``.

    As save_best, it is called on all ranks; the first one writes.
    """
    path, state = trainer.output_path / f"checkpoint_{trainer.total_steps_done}.pth", state_of(trainer)
    if trainer.ranks.is_main:
        save_checkpoint(state, path)
        remove_old_checkpoints(trainer.output_path, keep=trainer.config.save_n_checkpoints)
    return path


def save_best(trainer: "Trainer") -> None:
    """Save ``best_model.pth``, and with ``save_all_best`` a copy that stays, ``best_model_<step>.pth``."""
    state = state_of(trainer)
    if not trainer.ranks.is_main:
        return
    save_checkpoint(state, trainer.output_path / "best_model.pth")
    if trainer.config.save_all_best:
        save_checkpoint(state, trainer.output_path / f"best_model_{trainer.total_steps_done}.pth")


def restore(trainer: "Trainer", source: str | Path) -> None:
    """Start from a checkpoint's weights, as far as they fit the trainer's model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no checkpoint, or nothing in it fits. Nothing is loaded then.
    """
    start_from(trainer, load_checkpoint(source), source)


def continue_newest(trainer: "Trainer", folder: Path) -> None:
    """Go on from the newest checkpoint of a run that can be read; damaged ones are told of and passed over.

    Raises:
        FileNotFoundError: the run's folder holds none.
        ValueError: all are damaged, or the newest sound one is of another model or of a run with other optimizers.
    """
    damaged = []
    for path in newest_first(folder):
        try:
            state = load_checkpoint(path)
        except DamagedError as error:
            damaged.append(error)
            continue
        for error in damaged:
            trainer.c_logger.warn(f"{error}; continuing from {path.name} instead")
        continue_run(trainer, state, path, _best_loss(trainer, state, path))
        return
    raise damaged[0]


def _best_loss(trainer: "Trainer", state: Mapping[str, Any], source: str | Path) -> dict[str, float | None] | None:
    """The best loss so far: of ``best_path``, else of the checkpoint."""
    if path := trainer.args.best_path:
        best = best_loss_of(load_checkpoint(path, mapped=True))
        if best is None:
            raise ValueError(f"best_path={path!r}: holds no best loss; give best_model.pth of a run's folder")
        return best
    beside = Path(source).parent / "best_model.pth"
    if is_coquis(state) and beside.is_file():
        # Coqui's checkpoint_<step>.pth hold the loss of their own step
        state = load_checkpoint(beside, mapped=True)
    return best_loss_of(state)


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


def load_checkpoint(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint to the CPU, from a path or any URL that fsspec reads; never executes code in it.

    A state dict alone (``.safetensors`` as well) becomes the ``model`` of a checkpoint that holds nothing else.

    Args:
        path: the file.
        mapped: leave the tensors of a local file on disk until somebody looks at them.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a ``.safetensors`` file, and the package is not installed.
        ValueError: the file is damaged, would execute code, is no checkpoint, or of a newer format.
    """
    # files of torch before 1.6 are no zip archives and cannot be mapped
    if Path(path).suffix == ".safetensors":
        state = _read_safetensors(path)
    elif mapped and zipfile.is_zipfile(path):
        state = _read_state(path, path, mmap=True)
    else:
        with fsspec.open(str(path), "rb") as file:
            state = _read_state(file, path)
    if isinstance(state, Mapping) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        state = {"model": state}
    if not isinstance(state, dict) or not isinstance(state.get("model"), Mapping):
        raise ValueError(f"{path}: holds no model; give a checkpoint that the Trainer wrote")
    version = state.get("format", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"{path}: has format {state['format']}, this Trainer reads up to {FORMAT_VERSION}; upgrade it")
    return state


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A model's state dict from a file: ``.safetensors``, or ``.pth`` and the like (of a checkpoint its ``model``).

    Raises as load_checkpoint does.
    """
    return load_checkpoint(path)["model"]


def _read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(f"{path}: pip install safetensors to read it") from error
    with fsspec.open(str(path), "rb") as file:
        try:
            return load(file.read())
        except SafetensorError as error:
            raise DamagedError(f"{path}: damaged, or no safetensors file ({error})") from error


def _read_state(file: BinaryIO | str | Path, path: str | Path, **options: Any) -> Any:
    """What torch.load reads, with one error for all the ways in which it fails."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{path}: {_unreadable(str(error))}") from error
    # torch lets whatever its readers stumble over through: of zip files, of pickles cut off in the middle
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error})") from error


def _unreadable(error: str) -> str:
    """Why torch refused to unpickle a file, and what to do."""
    reason = "holds more than tensors and plain values, which could execute code"
    if (found := re.search(r"GLOBAL ([\w.]+)", error)) is None:
        return f"{reason}, or is damaged ({error.splitlines()[0]})"
    return (
        f"{reason}: {found[1]}. If you trust it, convert it once where that can be imported: "
        "python -c \"import torch; s = torch.load('OLD.pth', 'cpu', weights_only=False); "
        "torch.save({k: v.to_dict() if hasattr(v, 'to_dict') else v for k, v in s.items()}, 'NEW.pth')\""
    )


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every ``checkpoint_<step>.pth`` of a run, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints (best_model.pth included) by their steps, the highest first; a damaged best_model.pth last.

    Raises:
        FileNotFoundError: the run's folder holds none.
    """
    checkpoints = list_checkpoints(folder)
    best = folder / "best_model.pth"
    if best.is_file():
        try:
            # mapped, so that only the step is read of what may be gigabytes
            step = load_checkpoint(best, mapped=True).get("step")
        except DamagedError:
            step = -1  # tried last, to be told of
        if step is None:
            raise ValueError(f"{best}: holds weights only, no training to continue; move it out of the run's folder")
        checkpoints = sorted([(step, best), *checkpoints], key=lambda entry: entry[0])
    if not checkpoints:
        raise FileNotFoundError(f"{folder}: holds no checkpoint_<step>.pth and no best_model.pth to continue from")
    return [path for _, path in reversed(checkpoints)]


def exist_in(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint to continue from."""
    return bool(list_checkpoints(folder)) or (folder / "best_model.pth").is_file()


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for _, path in list_checkpoints(folder)[:-keep]:
        path.unlink()


if __name__ == "__main__":
    from trainer.checkpoint_command import main

    sys.exit(main())

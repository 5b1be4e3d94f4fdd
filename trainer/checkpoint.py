"""Checkpoints of a run: what they hold, when they are deleted, and which one a run continues from.

``python -m trainer.checkpoint inspect FILE`` prints what one holds; ``strip FILE`` writes a small file of the weights;
``verify RUN`` checks that all checkpoints of a run are as they were written.
"""

import datetime
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint_file import DamagedError, load_checkpoint, load_sound, load_weights, save_checkpoint
from trainer.restore import COUNTING_ARGS, OPTIONAL_PARTS, best_loss_of, continue_run, is_coquis, start_from
from trainer.seeding import arithmetic, capture_rng_state
from trainer.sharded import full_state
from trainer.storage import FileEntry, as_path, exists, is_local, list_files, logger, remove, remove_leftovers

if TYPE_CHECKING:
    from trainer.checkpoint_writer import CheckpointWriter
    from trainer.config import TrainerConfig
    from trainer.trainer import Trainer

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint"]
_NAME = re.compile(r"checkpoint_(\d+)\.pth")


# ---- what a checkpoint holds ----


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Everything that a training needs to go on as if it had never stopped; all ranks must call it together.

    Optimizers and schedulers are named by their position; random states by their rank. Where the model is sharded, the
    tensors are whole on rank 0, which writes them, and None on the others.

    Raises:
        FloatingPointError: a loss is not finite: there is nothing worth saving.
    """
    trainer.guard.finish()
    trainer.keep_avg_train.read()
    parts = {name: getattr(trainer, name) for name in OPTIONAL_PARTS}
    rng = trainer.own_rng or capture_rng_state()
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
        "own_schedulers": sorted(trainer.own_schedulers),
        "eval_step": trainer.last_eval_step,
        "test_step": trainer.last_test_step,
        "model_loss": dict(trainer.best_loss),
        "best_path": trainer.args.best_path,
        "best_models": dict(trainer.best_models),
        "averages": trainer.keep_avg_train.state_dict(),
        "logs": trainer.log_positions(),
        "rng": {str(rank): state for rank, state in enumerate(trainer.ranks.gather(rng))},
        "args": {name: getattr(trainer.args, name) for name in COUNTING_ARGS},
        "arithmetic": arithmetic(trainer.device),
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        **{name: part.state_dict() for name, part in parts.items() if part is not None},
    }
    return full_state(state, keep=trainer.ranks.is_main) if trainer.shards is not None else state


def check_finite(state: Mapping[str, Any], parameters: set[str]) -> None:
    """Look for NaN and infinity in the weights of a state on the host.

    Args:
        state: as of state_of.
        parameters: names of the parameters among the weights: buffers may rightly be infinite, as attention masks are.

    Raises:
        FloatingPointError: names the first weight that has one.
    """
    weights = [(name, tensor, f"weight {name}") for name, tensor in state["model"].items()]
    weights += [(name, t, f"averaged weight {name}") for name, t in state.get("ema", {}).get("weights", {}).items()]
    for name, tensor, label in weights:
        if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # torch cannot add up types of 8 bits, most of which have no infinity
        is_small = tensor.element_size() == 1
        # a finite sum says it ten times as quickly
        if not is_small and tensor.sum().isfinite():
            continue
        count = int((~tensor.isfinite() if name in parameters and not is_small else tensor.isnan()).sum())
        if count:
            raise FloatingPointError(
                f"{label}: {count} of {tensor.numel()} values are NaN or infinite after update {state['step']}; "
                "nothing is saved, and earlier checkpoints stay"
            )


# ---- saving ----


def save_step(trainer: "Trainer", writer: "CheckpointWriter", path: Path, done: Callable[[], None]) -> None:
    """Save a ``checkpoint_<step>.pth``, then delete those in its folder that it makes superfluous.

    As save_best, it is called on all ranks; the first one writes.

    Args:
        trainer: whose state it is.
        writer: writes it.
        path: the file.
        done: called when the file is there, in the training's thread.

    Raises:
        OSError: it, or an earlier one, could not be written.
    """
    newest, config = trainer.total_steps_done, trainer.config

    def write(state: dict[str, Any]) -> None:
        _write(state, path)
        remove_old_checkpoints(path.parent, newest, config)

    _submit(trainer, writer, write, done)


def save_best(
    trainer: "Trainer",
    writer: "CheckpointWriter",
    is_best: bool,
    beaten: list[int],
    done: Callable[[], None] | None = None,
) -> None:
    """Save ``best_model.pth``, and what ``save_all_best`` and ``save_n_best`` ask for as ``best_model_<step>.pth``.

    Args:
        trainer: whose state it is.
        writer: writes it.
        is_best: False if it is only one of the ``save_n_best`` best.
        beaten: steps of the models that are no longer among them.
        done: as of save_step.

    Raises:
        OSError: it, or an earlier one, could not be written.
    """
    folder, step = trainer.output_path, trainer.total_steps_done
    is_numbered = trainer.config.save_all_best or step in trainer.best_models

    def write(state: dict[str, Any]) -> None:
        if is_numbered:
            _write(state, folder / f"best_model_{step}.pth")
        for other in beaten:
            _remove(folder / f"best_model_{other}.pth")
        if is_best:  # last: what goes on from it must find the others done
            _write(state, folder / "best_model.pth")

    _submit(trainer, writer, write, done)


def _write(state: dict[str, Any], path: Path) -> None:
    """Save a state, and see that it can be read again before anything is deleted: not all that can be written can."""
    save_checkpoint(state, path)
    if not is_local(path):  # there it would be read whole
        return
    try:
        load_checkpoint(path, mapped=True)
    except DamagedError as error:
        raise TypeError(f"no run could continue from this state: {error}") from error


def _submit(
    trainer: "Trainer",
    writer: "CheckpointWriter",
    write: Callable[[dict[str, Any]], None],
    done: Callable[[], None] | None = None,
) -> None:
    state, parameters = state_of(trainer), {name for name, _ in trainer.model.named_parameters(remove_duplicate=False)}

    def check_and_write(state: dict[str, Any]) -> None:
        check_finite(state, parameters)
        write(state)

    if trainer.ranks.is_main:
        writer.submit(state, check_and_write, done)


def rank_model(models: dict[int, float], step: int, loss: float, keep: int) -> list[int]:
    """Take a model among the best if it is one of them.

    Args:
        models: the loss of each of the best so far, by step; changed in place.
        step: of this model.
        loss: of this model.
        keep: how many there may be.

    Returns:
        The steps of those that are no longer among the best.
    """
    models[step] = loss
    # of equal ones, the earlier
    best = sorted((step for step in models if not math.isnan(models[step])), key=lambda step: (models[step], step))
    beaten = [step for step in models if step not in best[:keep]]
    for other in beaten:
        del models[other]
    return beaten


# ---- the checkpoints of a run ----


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every ``checkpoint_<step>.pth`` of a run, oldest first."""
    return [(step, entry.path) for step, entry in _entries(folder)]


def _entries(folder: str | Path) -> list[tuple[int, FileEntry]]:
    found = [(int(match[1]), entry) for entry in list_files(folder) if (match := _NAME.fullmatch(entry.path.name))]
    return sorted(found, key=lambda item: item[0])


def remove_old_checkpoints(folder: str | Path, newest: int, config: "TrainerConfig") -> None:
    """Delete what ``save_n_checkpoints`` and ``save_max_age`` do not keep.

    Args:
        folder: the run's.
        newest: step of the checkpoint that was written last, which always stays. Later ones, of a training that went
            on from before them, are nothing that would replace it: they stay as well.
        config: the run's.
    """
    earlier = [entry for step, entry in _entries(folder) if step < newest]
    oldest = -math.inf if config.save_max_age is None else time.time() - config.save_max_age * 3600
    first_kept = len(earlier) - (config.save_n_checkpoints - 1)
    for i, entry in enumerate(earlier):
        if i < first_kept or (entry.modified is not None and entry.modified < oldest):
            _remove(entry.path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; one that cannot be deleted stays, and fails neither the save nor the training."""
    try:
        remove(path)
    except OSError as error:
        logger.warning(f"{path.name}: could not be deleted, and stays: {error}")


def exist_in(folder: str | Path) -> bool:
    """Whether a run's folder holds a checkpoint to continue from."""
    return bool(list_checkpoints(folder)) or exists(as_path(folder) / "best_model.pth")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints (best_model.pth included) by how far they are, the furthest first.

    A best_model.pth that cannot be read comes before all others, to be told of: it may be the newest.

    Raises:
        FileNotFoundError: the run's folder holds none.
        ValueError: best_model.pth is no training's.
    """
    checkpoints = [((step, 0), path) for step, path in list_checkpoints(folder)]
    best = folder / "best_model.pth"
    if exists(best):
        place = _place_of(best)
        # after the same update a checkpoint may have been saved before the evaluation, or at the end of the training
        checkpoints = [(_place_of(path) if key[0] == place[0] else key, path) for key, path in checkpoints]
        checkpoints = sorted([(place, best), *checkpoints], key=lambda entry: entry[0])
    if not checkpoints:
        raise FileNotFoundError(
            f"{folder}: holds no checkpoint_<step>.pth and no best_model.pth to continue from; start anew, and save "
            "more often (save_step, save_minutes)"
        )
    return [path for _, path in reversed(checkpoints)]


def _place_of(path: Path) -> tuple[float, ...]:
    """How far a checkpoint is: update, epoch, last evaluation, last test; infinitely far if it cannot be read."""
    try:
        state, _ = load_sound(path)  # compared: a flipped bit may make anything of its numbers
    except DamagedError:
        return (math.inf,)
    if "step" not in state:
        raise ValueError(f"{path}: holds weights only, no training to continue; move it out of the run's folder")
    return tuple(state.get(name, -1) for name in ("step", "epoch", "eval_step", "test_step"))


# ---- going on ----


def restore(trainer: "Trainer", source: str | Path) -> None:
    """Start from a checkpoint's weights, as far as they fit the trainer's model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no checkpoint, or nothing in it fits. Nothing is loaded then.
    """
    start_from(trainer, load_checkpoint(source), source)


def delete_leftovers(trainer: "Trainer", folder: Path) -> None:
    """Delete what earlier starts of a run were writing when they were killed."""
    for name in remove_leftovers(folder):
        trainer.c_logger.print(f"{name}: deleted; a process was killed while it wrote this file")


def continue_newest(trainer: "Trainer", folder: Path) -> None:
    """Go on from the newest checkpoint of a run that is sound; damaged ones are told of and put aside.

    Raises:
        FileNotFoundError: the run's folder holds none.
        ValueError: all are damaged, or the newest sound one is of another model or of a run with other optimizers.
    """
    found = _newest_sound(trainer, folder) if trainer.ranks.is_main else None
    path = trainer.ranks.broadcast(found and found[0])
    state = found[1] if found else load_checkpoint(path)
    continue_run(trainer, state, path, _best_loss(trainer, state, path))
    if trainer.ranks.is_main and trainer.config.save_checkpoints and _NAME.fullmatch(path.name):
        # what the process that wrote it did not live to delete
        remove_old_checkpoints(folder, state["step"], trainer.config)


def _newest_sound(trainer: "Trainer", folder: Path) -> tuple[Path, dict[str, Any]]:
    damaged: list[tuple[Path, DamagedError]] = []
    for path in newest_first(folder):
        try:
            state = load_checkpoint(path)
        except DamagedError as error:
            damaged.append((path, error))
            continue
        for other, error in damaged:
            trainer.c_logger.warn(f"{error}; continuing from {path.name} instead")
            # out of the way: it must not count as one of the newest when old ones are deleted
            other.rename(other.with_name(f"{other.name}.damaged"))
        return path, state
    problems = [f"{folder}: no checkpoint is sound", *(str(error) for _, error in damaged)]
    raise DamagedError("\n  - ".join(problems))


def _best_loss(trainer: "Trainer", state: Mapping[str, Any], source: str | Path) -> dict[str, float | None] | None:
    """The best loss so far: of ``best_path``, else of the checkpoint."""
    # a checkpoint of a start with this best_path has taken it over, and may have a better one since: the launcher
    # starts a script again with the same arguments
    if (path := trainer.args.best_path) and path != state.get("best_path"):
        best = best_loss_of(load_checkpoint(path, mapped=True))
        if best is None:
            raise ValueError(f"best_path={path!r}: holds no best loss; give best_model.pth of a run's folder")
        return best
    beside = as_path(source).parent / "best_model.pth"
    if is_coquis(state) and exists(beside):
        # Coqui's checkpoint_<step>.pth hold the loss of their own step
        state = load_checkpoint(beside, mapped=True)
    return best_loss_of(state)


if __name__ == "__main__":
    from trainer.checkpoint_command import main

    sys.exit(main())

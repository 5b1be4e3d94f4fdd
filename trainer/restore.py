"""What of a checkpoint goes into a Trainer: the whole state to continue a run, or what fits to start a new one.

It reads the checkpoints that this Trainer wrote, in all formats, and those of Coqui's Trainer. Nothing is loaded
before everything was compared: an error leaves the Trainer as it was.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checked_config import nearest
from trainer.seeding import arithmetic_changes, restore_rng_state
from trainer.sharded import full_state

if TYPE_CHECKING:
    from trainer.trainer import Trainer

# what a Trainer has only when the config asks for it, None otherwise; a checkpoint holds it under the same name
OPTIONAL_PARTS = ("ema", "early_stopping", "guard")
COUNTING_ARGS = ("grad_accum_steps", "overfit_batch", "small_run")  # what an update is made of, besides the config
LOADED, RESIZED, REINITIALIZED, SKIPPED, MISSING = "loaded", "resized", "reinitialized", "skipped", "missing"


# ---- names and shapes ----


def plain_name(name: str) -> str:
    """A weight's name without what DDP and torch.compile put before it, and with the old names of weight norm."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name).replace("._orig_mod.", ".")
    name = re.sub(r"parametrizations\.(\w+)\.original0$", r"\1_g", name)
    return re.sub(r"parametrizations\.(\w+)\.original1$", r"\1_v", name)


def under_own_names(found: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's weights, under the model's names where the model has them."""
    own_by_plain = {plain_name(name): name for name in own}
    return {name if name in own else own_by_plain.get(plain_name(name), name): value for name, value in found.items()}


def _shape(value: Any) -> str:
    """A tensor's shape; the extra state of a module may be anything."""
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 1


def _differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names and shapes in which two model states differ; the first ten."""
    problems = [f"missing: {name}" for name in own if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in own]
    problems += [
        f"{name}: has shape {_shape(found[name])}, the model {_shape(own[name])}"
        for name in own
        if name in found and _shape(found[name]) != _shape(own[name])
    ]
    return problems[:10] + [f"and {len(problems) - 10} more"] * (len(problems) > 10)


# ---- a new run: what fits ----


@dataclass(frozen=True)
class Entry:
    """What happened to one weight: its shapes (``-`` where there is none) and how many values that concerns."""

    name: str
    checkpoint: str
    model: str
    outcome: str
    values: int


def fit_weights(
    found: Mapping[str, Any], own: Mapping[str, Any], reinit_layers: list[str]
) -> tuple[dict[str, Any], list[Entry]]:
    """The model's state with everything that fits of a checkpoint's.

    Where a tensor has another size but as many dimensions, the part that both have is taken and the rest keeps the
    model's values. Only positions are known: of a vocabulary that grew at its end the old symbols keep their vectors,
    but a symbol that moved gets the vector of the one that was there before it.

    Args:
        found: the checkpoint's weights, under the model's names.
        own: the model's state.
        reinit_layers: what has one of these words in its name keeps the model's values.

    Returns:
        A state for the model, and what happened to each weight of either.
    """
    weights, entries = dict(own), []
    for name, value in own.items():
        if any(word in name for word in reinit_layers):
            outcome, values = REINITIALIZED, _size(value)
        elif name not in found:
            outcome, values = MISSING, _size(value)
        elif _shape(found[name]) == _shape(value):
            outcome, values, weights[name] = LOADED, _size(value), found[name]
        elif isinstance(value, torch.Tensor) and getattr(found[name], "ndim", None) == value.ndim:
            weights[name], values = _overlapped(found[name], value)
            outcome = RESIZED
        else:
            outcome, values = SKIPPED, _size(found[name])
        entries.append(Entry(name, _shape(found[name]) if name in found else "-", _shape(value), outcome, values))
    entries += [Entry(n, _shape(v), "-", SKIPPED, _size(v)) for n, v in found.items() if n not in own]
    return weights, entries


def _overlapped(found: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A copy of ``own`` with the part of ``found`` that lies in both, and the number of its values."""
    part = tuple(slice(min(sizes)) for sizes in zip(found.shape, own.shape))
    mixed = own.clone()
    mixed[part].copy_(found[part])
    return mixed, mixed[part].numel()


def report(entries: list[Entry]) -> list[str]:
    """The table of all weights that were not simply loaded, as lines."""
    rows = [(e.name, e.checkpoint, e.model, e.outcome) for e in entries if e.outcome != LOADED]
    if not rows:
        return []
    rows.insert(0, ("name", "checkpoint", "model", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"  {name:<{widths[0]}}  {there:<{widths[1]}}  {here:<{widths[2]}}  {outcome}".rstrip()
        for name, there, here, outcome in rows
    ]


def summary(entries: list[Entry]) -> str:
    """``3 tensors loaded (40 values), 1 resized (8 values taken)``."""
    tensors, values = Counter(e.outcome for e in entries), Counter()
    for entry in entries:
        values[entry.outcome] += entry.values
    notes = {RESIZED: " taken", REINITIALIZED: " kept fresh", SKIPPED: " not used", MISSING: " kept fresh"}
    parts = [
        f"{tensors[outcome]} {outcome} ({values[outcome]:,} values{notes.get(outcome, '')})"
        for outcome in (LOADED, RESIZED, REINITIALIZED, SKIPPED, MISSING)
        if tensors[outcome]
    ]
    return "tensors: " + ", ".join(parts)


def start_from(trainer: "Trainer", state: Mapping[str, Any], source: str | Path) -> None:
    """Load what fits of a checkpoint's weights into the model of a new run, and print what did not.

    Steps, rates, optimizers, schedulers and random numbers stay those of the new run.

    Raises:
        ValueError: nothing fits, or a word of ``reinit_layers`` is in no name; nothing is loaded.
    """
    own, words = full_state(trainer.model.state_dict()), trainer.config.reinit_layers or []
    for word in words:
        if not any(word in name for name in own):
            raise ValueError(f"reinit_layers={word!r}: in no parameter's name{nearest(word, own)}")
    found = under_own_names(state["model"], own)
    weights, entries = fit_weights(found, own, words)
    if not any(entry.outcome in (LOADED, RESIZED) for entry in entries):
        theirs, ours = (", ".join(list(names)[:3]) or "none" for names in (state["model"], own))
        raise ValueError(
            f"{source}: nothing in it fits {type(trainer.model).__name__}. Its weights are {theirs} ...; the model's "
            f"{ours} ...: restore from a checkpoint of a similar model"
        )
    trainer.model.load_state_dict(weights)
    step = f" (step {state['step']})" if "step" in state else ""
    trainer.c_logger.print(f"weights restored from {source}{step}; {summary(entries)}")
    for line in report(entries):
        trainer.c_logger.print(line)
    if state.get("ema"):
        trainer.c_logger.print(
            "its averaged weights (EMA) are not used: `python -m trainer.checkpoint strip` makes a file of them"
        )
    if trainer.ema is not None:
        trainer.ema.reset()


# ---- a run to continue: everything ----


def is_coquis(state: Mapping[str, Any]) -> bool:
    """Whether Coqui's Trainer wrote a checkpoint: a training's state without a format."""
    return not isinstance(state.get("format"), int) and {"step", "optimizer"} <= set(state)


def best_loss_of(state: Mapping[str, Any]) -> dict[str, float | None] | None:
    """``train_loss`` and ``eval_loss`` of the best model so far, or None when the checkpoint does not say.

    Format 1 and old files of Coqui's hold a single number: of the evaluation, if there was one.
    """
    loss = state.get("model_loss", state.get("best_loss"))
    if isinstance(loss, int | float):
        evaluated = (state.get("config") or {}).get("run_eval", True)
        loss = {"train_loss": None, "eval_loss": loss} if evaluated else {"train_loss": loss, "eval_loss": None}
    loss = {k: v for k, v in (loss or {}).items() if v is not None and not math.isnan(v)}
    if not loss:
        return None
    evaluation = float(loss["eval_loss"]) if "eval_loss" in loss else None
    return {"train_loss": float(loss.get("train_loss", math.inf)), "eval_loss": evaluation}


def _numbered(states: Any, keys: list[str]) -> dict[str, Any]:
    """Coqui's states (a list; formerly a dict of them, or one alone) under our names, the positions."""
    if isinstance(states, Mapping):
        alone = "param_groups" in states or "last_epoch" in states
        states = [states] if alone else list(states.values())
    states = states or []
    # as many as there should be, or numbers that the comparison reports
    return dict(zip(keys if len(keys) == len(states) else map(str, range(len(states))), states))


def from_coqui(state: Mapping[str, Any], optimizers: list[str], schedulers: list[str]) -> dict[str, Any]:
    """A checkpoint of Coqui's Trainer as one of ours, as far as it goes.

    It names an epoch but no position in it, so the epoch begins again; it holds no random states. Its step counts
    batches, of which each was an update unless gradients were accumulated.

    Args:
        state: the checkpoint.
        optimizers: the positions of the run's optimizers.
        schedulers: the positions of those that have a scheduler; Coqui leaves the others out.
    """
    return {
        **state,
        "optimizer": _numbered(state["optimizer"], optimizers),
        "scheduler": _numbered(state.get("scheduler"), schedulers),
        "scaler": state.get("scaler") or {},
        "epoch": state.get("epoch", 0),
        "batches_done": 0,
        "stepped": [],
        "eval_step": -1,
        "averages": {"sums": {}, "weights": {}},
        "rng": {},
    }


def continue_run(
    trainer: "Trainer", state: Mapping[str, Any], source: str | Path, best_loss: dict[str, float | None] | None
) -> None:
    """Load the whole state of a run that goes on.

    Args:
        trainer: the Trainer, built as for the run that wrote the checkpoint.
        state: the checkpoint.
        source: where it came from, for messages.
        best_loss: ``train_loss`` and ``eval_loss`` of the best model so far, if known.

    Raises:
        ValueError: the checkpoint is of another model, or of a run with other optimizers, schedulers or without
            gradient scaler; nothing is loaded.
    """
    if not {"step", "optimizer"} <= set(state):
        raise ValueError(f"{source}: holds weights only, no training to continue: start a new run with --restore_path")
    optimizers = {str(i): optimizer for i, optimizer in enumerate(trainer.optimizer)}
    schedulers = {str(i): scheduler for i, scheduler in enumerate(trainer.scheduler) if scheduler is not None}
    foreign = is_coquis(state)
    if foreign:
        state = from_coqui(state, list(optimizers), list(schedulers))
    own = trainer.model.state_dict()
    state = {**state, "model": under_own_names(state["model"], own)}
    if state.get("ema"):
        state["ema"] = {**state["ema"], "weights": under_own_names(state["ema"]["weights"], own)}
    _compare(trainer, state, source, optimizers, schedulers)

    trainer.model.load_state_dict(state["model"])
    for key, parts in (("optimizer", optimizers), ("scheduler", schedulers)):
        for name, part in parts.items():
            part.load_state_dict(state[key][name])
    if trainer.precision.scaler.is_enabled():
        trainer.precision.scaler.load_state_dict(state["scaler"])
    _take_place(trainer, state)
    if best_loss is not None:
        # a run that was not evaluated before has no best loss of that kind yet
        unknown = {"eval_loss": math.inf} if trainer.config.run_eval and best_loss["eval_loss"] is None else {}
        trainer.best_loss = {**best_loss, **unknown}
    epoch = state["epoch"] + 1
    trainer.c_logger.print(f"continuing from {source}: step {state['step']}, epoch {epoch}")
    if foreign:
        trainer.c_logger.print(
            f"written by Coqui's Trainer, which keeps no position in an epoch and no random states: epoch {epoch} "
            f"begins again, with other random numbers, even if it had been finished"
        )
    _tell_of_changes(trainer, state)
    _restore_optional(trainer, state)
    _restore_rng(trainer, state["rng"])
    trainer.rewind_logs(state)


def _take_place(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """How far the run is. Checkpoints of older formats lack what was not in them."""
    trainer.total_steps_done, trainer.epochs_done = state["step"], state["epoch"]
    trainer.batches_done, trainer.stepped_optimizers = state["batches_done"], set(state["stepped"])
    trainer.own_schedulers = set(state.get("own_schedulers", []))
    trainer.restored_position = state.get("position")
    trainer.last_eval_step, trainer.last_test_step = state["eval_step"], state.get("test_step", -1)
    trainer.best_models = state.get("best_models", {})
    trainer.keep_avg_train.load_state_dict(state["averages"])


def _tell_of_changes(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """Say what of the run's settings is not as before, and what that means."""
    for name in ("lr", "optimizer_params", "lr_scheduler_params"):
        before, now = state.get("config", {}).get(name), getattr(trainer.config, name)
        if before is not None and before != now:
            trainer.c_logger.warn(f"{name}={now!r}: a run that is continued keeps what it had ({before!r})")
    # another number of ranks may mean to accumulate otherwise
    same_ranks = len(state["rng"]) == trainer.ranks.world_size
    for name, before in state.get("args", {}).items() if same_ranks else ():
        if (now := getattr(trainer.args, name)) != before:
            trainer.c_logger.warn(
                f"{name}={now!r}, before {before!r}: the updates are not those of a run that was never stopped; "
                f"with --{name}={'none' if before is None else str(before).lower()} they are"
            )
    if "arithmetic" in state and (changes := arithmetic_changes(state["arithmetic"], trainer.device)):
        trainer.c_logger.warn(f"going on exactly, but rounding otherwise than before: {'; '.join(changes)}")


def _restore_optional(trainer: "Trainer", state: Mapping[str, Any]) -> None:
    """EMA, early stopping and the count of skipped updates, each only if both the run and the checkpoint have it."""
    labels = {
        "ema": "averaged weights (EMA)",
        "early_stopping": "a state of early stopping",
        "guard": "a count of skipped updates",
    }
    for name in OPTIONAL_PARTS:
        part, found, what = getattr(trainer, name), state.get(name), labels[name]
        if part is not None and found is not None:
            part.load_state_dict(found)
        elif part is not None and name == "ema":
            part.reset()
            trainer.c_logger.print(f"the checkpoint holds no {what}: the average starts from its weights")
        elif found is not None:
            trainer.c_logger.print(f"the checkpoint holds {what}: dropped, since this run has it switched off")
    if state["scaler"] and not trainer.precision.scaler.is_enabled():
        trainer.c_logger.print(
            "the checkpoint holds a state of a gradient scaler: dropped, since this run scales no losses"
        )


def _restore_rng(trainer: "Trainer", states: Mapping[str, Any]) -> None:
    """This rank's random states; another rank's would make two ranks draw the same numbers."""
    rank, world_size = trainer.ranks.rank, trainer.ranks.world_size
    if str(rank) in states:
        restore_rng_state(states[str(rank)])
    if states and (missing := [str(other) for other in range(world_size) if str(other) not in states]):
        trainer.c_logger.print(
            f"the checkpoint holds no random states of rank {', '.join(missing)}: it draws from the start of its own "
            "stream, which training_seed and the rank give"
        )


# ---- does it fit? ----


def _compare(
    trainer: "Trainer",
    state: Mapping[str, Any],
    source: str | Path,
    optimizers: Mapping[str, Any],
    schedulers: Mapping[str, Any],
) -> None:
    """Raise a ValueError with all that keeps a checkpoint from being continued."""
    if differences := _differences(state["model"], trainer.model.state_dict()):
        name = type(trainer.model).__name__
        remedy = "start a new run from its weights with --restore_path"
        raise ValueError("\n  - ".join([f"{source}: is of another model than {name}; {remedy}", *differences]))
    problems = _optimizer_problems(state["optimizer"], optimizers)
    problems += _scheduler_problems(state["scheduler"], schedulers)
    if trainer.precision.scaler.is_enabled() and not state["scaler"]:
        problems.append("gradient scaler: it holds no state of one; continue with the precision of the training so far")
    if trainer.ema is not None and state.get("ema"):
        here, there = trainer.ema.state_dict()["weights"], state["ema"]["weights"]
        problems += [f"averaged weights (EMA): {problem}" for problem in _differences(there, here)]
    if problems:
        raise ValueError("\n  - ".join([f"{source}: is of a run that was set up differently", *problems]))


def _optimizer_problems(found: Mapping[str, Any], optimizers: Mapping[str, Any]) -> list[str]:
    if len(found) != len(optimizers):
        return [f"optimizers: it holds the states of {len(found)}, this run has {len(optimizers)}"]
    problems = []
    for i, optimizer in optimizers.items():
        there, here = found[i], optimizer.state_dict()
        # an optimizer made of several has a state of its own form
        if not all(isinstance(state, Mapping) and "param_groups" in state for state in (there, here)):
            continue
        there, here = there["param_groups"], here["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (there, here)]
        if sizes[0] != sizes[1]:
            problems.append(f"optimizer {i}: its groups have {sizes[0]} parameters, this run's {sizes[1]}")
        # what schedulers add to a group says nothing of the optimizer
        ignored = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
        problems += _kind_problems(f"optimizer {i}", set(there[0]) - ignored, set(here[0]) - ignored, optimizer)
    return problems


def _scheduler_problems(found: Mapping[str, Any], schedulers: Mapping[str, Any]) -> list[str]:
    if len(found) != len(schedulers):
        return [f"schedulers: it holds the states of {len(found)}, this run has {len(schedulers)}"]
    if set(found) != set(schedulers):
        return [f"schedulers: it holds those of the optimizers {sorted(found)}, this run has {sorted(schedulers)}"]
    problems = []
    for name, scheduler in schedulers.items():
        # private attributes come and go with torch's versions
        there, here = (
            {key for key in state if not key.startswith("_")} for state in (found[name], scheduler.state_dict())
        )
        problems += _kind_problems(f"scheduler {name}", there, here, scheduler)
    return problems


def _kind_problems(label: str, there: set[str], here: set[str], part: Any) -> list[str]:
    """A later version of a class may have more settings than an earlier one; two classes lack some of each other's."""
    if there - here and here - there:
        settings = ", ".join(sorted(there - here))
        return [f"{label}: is of another class, with {settings}, than this run's {type(part).__name__}"]
    return []

"""What two runs have left behind, bit for bit."""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

# when it was written, and where in the log files
NOT_COMPARED = {"date", "logs"}
TIMES = ("/step_time", "/loader_time")
_LOSSES = re.compile(r"^\S+ \S+ ((?:eval at )?step \d+: .*?)  (?:step_time|\().*$", re.MULTILINE)


def differences(left: Any, right: Any, name: str = "") -> list[str]:
    """Where two states differ; tensors and numbers are compared by their bits."""
    if type(left) is not type(right):
        return [f"{name}: {type(left).__name__} and {type(right).__name__}"]
    if isinstance(left, Mapping):
        keys = [key for key in left if key not in NOT_COMPARED or name]
        if {*keys} != {key for key in right if key not in NOT_COMPARED or name}:
            return [f"{name}: has {sorted(map(str, left))} and {sorted(map(str, right))}"]
        return [line for key in keys for line in differences(left[key], right[key], f"{name}/{key}")]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [f"{name}: {len(left)} and {len(right)} entries"]
        return [line for i, pair in enumerate(zip(left, right)) for line in differences(*pair, f"{name}/{i}")]
    if isinstance(left, torch.Tensor):
        is_same = left.dtype == right.dtype and left.shape == right.shape and _bits(left) == _bits(right)
        return [] if is_same else [f"{name}: tensors differ"]
    is_same = struct.pack("d", left) == struct.pack("d", right) if isinstance(left, float) else left == right
    return [] if is_same else [f"{name}: {left!r} and {right!r}"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def scalars(run: Path) -> dict[tuple[str, int], list[bytes]]:
    """All values of each (tag, step) in a run's event files, but times; as they were written, duplicates too."""
    found: dict[tuple[str, int], list[bytes]] = {}
    for path in sorted(run.rglob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and not value.tag.endswith(TIMES):
                    found.setdefault((value.tag, event.step), []).append(struct.pack("f", value.simple_value))
    return found


def compare_scalars(expected: Path, found: Path) -> list[str]:
    """Steps that were logged twice, not at all, or otherwise."""
    left, right, lines = scalars(expected), scalars(found), []
    for key in sorted({*left, *right}):
        here, there = left.get(key, []), right.get(key, [])
        if here != there:
            lines.append(f"{key[0]} at step {key[1]}: logged {len(there)} times, not {len(here)}, or otherwise")
    return lines


def compare_logs(expected: Path, found: Path) -> list[str]:
    """Lines of the losses in the log files, of which each has to be there once."""
    left, right = (_LOSSES.findall((run / "trainer_0_log.txt").read_text()) for run in (expected, found))
    return [] if left == right else [f"log file: {len(right)} lines of losses, not {len(left)}, or others"]


def compare_checkpoints(expected: Path, found: Path, damaged: set[str]) -> list[str]:
    """Which checkpoints are left, and what is in them.

    Args:
        expected: the run that was never stopped.
        found: the other one.
        damaged: files of it that the harness has damaged and nobody has written since.
    """
    left, right = ({path.name: path for path in run.glob("*.pth")} for run in (expected, found))
    aside = {path.stem for path in found.glob("*.pth.damaged")}
    missing, more = left.keys() - right.keys(), right.keys() - left.keys()
    # what was damaged and put aside may be missing; then as many older ones have stayed
    if missing - aside or len(more) > len(missing) or any(not name.startswith("checkpoint_") for name in more):
        return [f"there are {sorted(right)}, not {sorted(left)}"]
    lines = []
    for name in sorted((left.keys() & right.keys()) - damaged):
        states = [torch.load(folder[name], weights_only=True) for folder in (left, right)]
        lines += [f"{name}{line}" for line in differences(*states)]
    return lines

"""Kills trainings at random instants, lets them go on, and compares what comes out with what was never disturbed.

    python -m tests.chaos --runs 300

Half of the kills come at any time, half at a low-level event of saving a checkpoint: before, after or in the middle of
a write, a sync, a rename, a deletion. Between a kill and what comes then, a checkpoint may be damaged, the folder
read-only, or the disk full. Each run is continued until it ends by itself. Counted are:

* aimed: kills at such an event; the others are those at any time.
* nothing saved: killed before the first checkpoint was there; the start that goes on has to say so, and fail.
* lost: a start that does not go on from the newest sound checkpoint, or fails, or begins anew in silence.
* differing: weights, optimizers, all else in the checkpoints left, which ones are left, scalars, or lines of the log.
* unsafe: what a power cut could destroy, which a kill does not: renamed before it was synced, say.

Random times depend on the machine: ``--only N`` repeats the choices of run N, not each instant.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.utils.tensorboard  # as all else that a run would import: before the fork

from tests.chaos.cases import draw_case
from tests.chaos.lives import Run, Undisturbed

RUNS_OF_A_CASE = 4


def main() -> None:
    """Print the seed, every problem when it is found, and the sums; the exit code is 1 if there was one."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="how many runs are disturbed")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all choices; drawn by default")
    parser.add_argument("--only", type=int, metavar="N", help="run N alone")
    parser.add_argument("--damage", type=float, default=0.3, help="how often something is damaged after a kill")
    memory = Path("/dev/shm")  # where a sync costs nothing; SIGKILL does not know the difference
    folder = memory if memory.is_dir() else None
    parser.add_argument("--folder", type=Path, default=folder, help="where the runs are made; the bad ones stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer makes torch import for seconds
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=args.folder))
    print(f"seed {args.seed}, in {folder}", flush=True)
    begin = time.monotonic()
    sums = chaos(range(args.runs) if args.only is None else [args.only], args.seed, args.damage, folder)
    names = ("runs", "kills", "aimed", "resumed", "nothing saved", "lost", "differing", "unsafe")
    print(", ".join(f"{sums[name]} {name}" for name in names), f"in {time.monotonic() - begin:.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(sums.items()) if name.startswith("damage")))
    if any(sums[name] for name in ("lost", "differing", "unsafe")):
        sys.exit(1)
    shutil.rmtree(folder)


def chaos(numbers: range | list[int], seed: int, share: float, folder: Path) -> Counter[str]:
    """Make the runs of these numbers; returns what is counted.

    Args:
        numbers: of the runs; a few in a row are of the same training.
        seed: of all choices.
        share: how often something is damaged after a kill.
        folder: where the runs are made; the good ones are deleted.
    """
    sums: Counter[str] = Counter()
    whole = None
    for number in numbers:
        home = folder / f"case{number // RUNS_OF_A_CASE}"
        if whole is None or not home.exists():
            whole = Undisturbed(draw_case(random.Random(f"{seed} case {home.name}")), home)
            _tell(f"{home.name} unsafe", whole.problems, sums, "unsafe")
        run = Run(whole, folder / f"run{number}", random.Random(f"{seed} run {number}"), share)
        run.live()
        sums += run.sums
        sums["runs"] += 1
        for kind, lines in run.problems.items():
            _tell(f"run {number} of {home.name} {kind}", lines, sums, kind)
        if not any(run.problems.values()):
            shutil.rmtree(run.folder)
    return sums


def _tell(label: str, lines: list[str], sums: Counter[str], kind: str) -> None:
    """Print the first lines of a problem, and count it."""
    for line in lines[:5]:
        print(f"{label}: {line}", flush=True)
    if lines[5:]:
        print(f"{label}: {len(lines) - 5} more", flush=True)
    sums[kind] += bool(lines)


if __name__ == "__main__":
    main()

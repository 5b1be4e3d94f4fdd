"""Running a function in two or more processes, for the tests of several ranks."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_two_ranks(folder: Path, work: Callable[[int, Path], Any], ranks: int = 2) -> list[Any]:
    """What ``work(rank, folder)`` returns in each of two processes, or of more; it must be importable."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(rank, folder, work), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    problems = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(problems)
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(ranks)]


def _run(rank: int, folder: Path, work: Callable[[int, Path], Any]) -> None:
    """Leaves its result in ``folder/RANK.pth``, or its traceback in ``folder/RANK.txt``."""
    try:
        torch.save(work(rank, folder), folder / f"{rank}.pth")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def wait_for_the_other(rank: int, folder: Path, name: str) -> None:
    """Until both ranks are here; not through the group, which the first one to leave would close for the other."""
    (folder / f"{name}.{rank}").touch()
    end = time.monotonic() + 30
    while not (folder / f"{name}.{1 - rank}").exists() and time.monotonic() < end:
        time.sleep(0.01)

"""Running a function in two or more processes, for the tests of several ranks."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_two_ranks(folder: Path, work: Callable[[int, Path], Any], ranks: int = 2, in_a_group: bool = False) -> list[Any]:
    """What ``work(rank, folder)`` returns in each of two processes, or of more; it must be importable.

    With ``in_a_group`` a process group is open meanwhile, as one that a script has opened.
    """
    context = multiprocessing.get_context("spawn")
    size = ranks if in_a_group else 0
    processes = [context.Process(target=_run, args=(rank, folder, work, size), daemon=True) for rank in range(ranks)]
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


def _run(rank: int, folder: Path, work: Callable[[int, Path], Any], group_size: int) -> None:
    """Leaves its result in ``folder/RANK.pth``, or its traceback in ``folder/RANK.txt``."""
    try:
        if group_size:
            os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(group_size)})
            dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=group_size)
        torch.save(work(rank, folder), folder / f"{rank}.pth")
        if group_size:
            wait_for_the_others(rank, group_size, folder, "done")
            dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def wait_for_the_others(rank: int, ranks: int, folder: Path, name: str) -> None:
    """Until all ranks are here; not through the group, which the first one to leave would close for the others."""
    (folder / f"{name}.{rank}").touch()
    end = time.monotonic() + 30
    while not all((folder / f"{name}.{i}").exists() for i in range(ranks)) and time.monotonic() < end:
        time.sleep(0.01)

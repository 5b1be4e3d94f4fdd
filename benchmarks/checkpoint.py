"""What saving costs the training: how long the loop stalls for the Trainer's save, against a plain blocking torch.save.

    python benchmarks/checkpoint.py

The state, of a model and AdamW, has 500 MB. Wall-clock time is measured, rounds of both alternate on the same disk, and
the ratio of each pair is taken, so that a machine's changing load hits both alike. What earlier rounds have left to
write is synced before each measurement. Each round measures

    plain       torch.save(state, path), which does not wait for the disk
    stall       trainer.saver.save(), as the loop calls it; it returns when the state is copied
    durable     the same, until the file is checked, synced and renamed, with its SHA-256; nothing is trained meanwhile
    writing     an update while the thread writes
    alone       an update while it does not

The first save, which also gets the memory for the copy, is shown apart. The peak memory is that of the process.
"""

import argparse
import contextlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import DataLoader

from benchmarks.loop import SETTINGS, Batches, Classifier
from trainer import Trainer, TrainerArgs, TrainerConfig
from trainer.checkpoint import state_of

UPDATES = 3  # in a round, while nothing is written


def make_trainer(width: int, folder: str) -> tuple[Trainer, Callable[[], None]]:
    """A Trainer that has made an update, so that the optimizer's state is there, and what makes another one."""
    torch.manual_seed(0)
    data = Batches(width, updates=1)
    config = TrainerConfig(epochs=1, **{**SETTINGS, "save_n_checkpoints": 1})
    trainer = Trainer(
        TrainerArgs(),
        config,
        folder,
        model=Classifier(width),
        train_loader=DataLoader(data, batch_size=None),
        parse_command_line_args=False,
    )
    trainer.open_run()
    trainer.train_epoch()
    return trainer, lambda: trainer.train_step([data[0]])


def seconds(function: Callable[[], None]) -> float:
    """Of wall-clock time."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def save_plainly(trainer: Trainer) -> float:
    """Seconds of torch.save."""
    state, path = state_of(trainer), trainer.output_path / "plain.pth"
    os.sync()
    took = seconds(lambda: torch.save(state, path))
    path.unlink()
    return took


def save_and_train(trainer: Trainer, update: Callable[[], None]) -> tuple[float, list[float]]:
    """Seconds of the stall, and of each update until the file is there."""
    path = trainer.output_path / f"checkpoint_{trainer.total_steps_done}.pth"
    path.unlink(missing_ok=True)  # of the same step, from save_and_wait
    os.sync()
    stall, updates = seconds(trainer.saver.save), []
    while not path.exists():
        updates.append(seconds(update))
    trainer.saver.wait()
    return stall, updates


def save_and_wait(trainer: Trainer) -> float:
    """Seconds until a checkpoint is durable."""
    os.sync()
    return seconds(lambda: (trainer.saver.save(), trainer.saver.wait()))


def measure(width: int, rounds: int, folder: str) -> tuple[float, dict[str, list[float]], list[int]]:
    """Seconds of the first save, all others by what is measured, and the peak memory [MB] before and after them."""
    trainer, update = make_trainer(width, folder)
    save_plainly(trainer)
    peaks = [peak_memory()]
    update()
    first, _ = save_and_train(trainer, update)
    times: dict[str, list[float]] = {"plain": [], "stall": [], "durable": [], "writing": [], "alone": []}
    for _ in range(rounds):
        times["plain"].append(save_plainly(trainer))
        stall, updates = save_and_train(trainer, update)
        times["stall"].append(stall)
        times["writing"] += updates[:-1]  # the last one went on after the write
        times["alone"] += [seconds(update) for _ in range(UPDATES)]
        times["durable"].append(save_and_wait(trainer))
    trainer.close_run()
    return first, times, [*peaks, peak_memory()]


def peak_memory() -> int:
    """Of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6


def spread(values: list[float], digits: int = 3) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return "too few"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=3228, help="of the model's layers; the default makes 500 MB")
    parser.add_argument("--folder", help="where to write: the disk that is measured; the temporary folder by default")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        open(os.devnull, "w") as silence,
        contextlib.redirect_stdout(silence),
    ):
        first, times, peaks = measure(options.width, options.rounds, folder)
    megabytes = 3 * 4 * sum(p.numel() for p in Classifier(options.width).parameters()) / 1e6
    ratios = [stall / plain for stall, plain in zip(times["stall"], times["plain"])]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    print(f"a state of {megabytes:.0f} MB, {options.rounds} rounds; median and quartiles")
    for name, values in times.items():
        print(f"{name:8} {spread(values)} s")
    print(f"stall / plain     {spread(ratios)}; the first save stalls {first:.3f} s")
    slowdowns = [value / statistics.median(times["alone"]) for value in times["writing"]]
    print(f"writing / alone   {spread(slowdowns)}")
    print(f"peak memory       {peaks[0]} MB with plain saves, {peaks[1]} MB with the Trainer's")


if __name__ == "__main__":
    main()

"""What the Trainer costs on two ranks: seconds per update against a loop written by hand around
DistributedDataParallel, and the bytes that each sends.

    python benchmarks/ddp.py

Two processes over gloo on the CPU train the same model on the same samples from memory. Rounds of both alternate in
the same processes, and the ratio of each pair is taken, so that a machine's changing load hits both alike. Evaluation,
checkpoints and dashboards are off. The bytes are those of the collectives that torch's profiler saw in some updates
after the measurement.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.loop import SETTINGS, Classifier
from trainer import Trainer, TrainerArgs, TrainerConfig

RANKS = 2
BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1}


def make_loader(width: int, batch_size: int, updates: int, sampled: bool) -> DataLoader:
    """Samples in memory; split by a DistributedSampler, or left for the Trainer to split."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"x": torch.randn(width, generator=generator), "y": torch.randint(10, (), generator=generator)}
        for _ in range(batch_size * RANKS)
    ] * updates
    sampler = DistributedSampler(samples, shuffle=False) if sampled else None
    return DataLoader(samples, batch_size, sampler=sampler)


def by_hand(width: int, batch_size: int, updates: int) -> Callable[[], None]:
    """An epoch of a loop as one writes it, with the true gradient norm."""
    torch.manual_seed(0)
    model, criterion = DistributedDataParallel(Classifier(width).layers), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = make_loader(width, batch_size, updates, sampled=True)

    def epoch() -> None:
        for batch in loader:
            criterion(model(batch["x"]), batch["y"]).backward()
            nn.utils.get_total_norm([p.grad for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return epoch


def by_trainer(width: int, batch_size: int, updates: int, folder: str) -> Callable[[], None]:
    """An epoch of the Trainer."""
    torch.manual_seed(0)
    config = TrainerConfig(batch_size=batch_size, **SETTINGS)
    loader = make_loader(width, batch_size, updates, sampled=False)
    trainer = Trainer(
        TrainerArgs(), config, folder, model=Classifier(width), train_loader=loader, parse_command_line_args=False
    )
    trainer.open_run()

    def epoch() -> None:
        trainer.train_epoch()
        trainer.epochs_done, trainer.batches_done = trainer.epochs_done + 1, 0

    return epoch


def seconds(epoch: Callable[[], None]) -> float:
    """Of wall-clock time, for the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    epoch()
    dist.barrier()
    return time.perf_counter() - start


def bytes_sent(epoch: Callable[[], None]) -> int:
    """That this rank hands to collectives in an epoch."""
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler writes lines of its own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        epoch()
    os.dup2(stderr, 2)
    total = 0
    for event in profiler.events():
        if event.name.startswith("gloo:"):
            for shape, kind in zip(event.input_shapes, event.input_dtypes):
                total += torch.Size(shape).numel() * BYTES[kind]
    return total


def measure(rank: int, port: int, options: argparse.Namespace, folder: str) -> None:
    """What each of the two processes does; the first prints the table."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for row in rows(options, folder):
        if rank == 0:
            print(row, flush=True)
    dist.barrier()
    time.sleep(1)  # neither rank leaves while the other is still in the barrier
    dist.destroy_process_group()


def rows(options: argparse.Namespace, folder: str) -> Iterator[str]:
    """The table, line by line."""
    yield f"torch {torch.__version__}, {RANKS} ranks of 1 thread, {os.cpu_count()} cores"
    yield "width  batch   by hand [ms]   Trainer [ms]   ratio (median, quartiles)     bytes/update by hand, Trainer"
    for width, batch_size, updates in ((256, 32, 100), (1024, 64, 20), (2048, 64, 10)):
        hand = by_hand(width, batch_size, updates)
        with open(os.devnull, "w") as silence:
            stdout, sys.stdout = sys.stdout, silence
            own = by_trainer(width, batch_size, updates, folder)
            times = [(seconds(hand), seconds(own)) for _ in range(options.rounds + 1)][1:]  # the first warms up
            sent = [bytes_sent(epoch) / updates for epoch in (hand, own)]
            sys.stdout = stdout
        low, middle, high = statistics.quantiles([own / hand for hand, own in times], n=4)
        hand_ms, own_ms = (statistics.median(column) * 1e3 / updates for column in zip(*times))
        yield (
            f"{width:5}  {batch_size:5}   {hand_ms:12.2f}   {own_ms:12.2f}   {middle:.3f} ({low:.3f}-{high:.3f})"
            f"           {sent[0]:14,.0f} {sent[1]:14,.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(measure, (port, options, folder), nprocs=RANKS)


if __name__ == "__main__":
    main()

"""What the Trainer's loop costs: seconds per update against a bare PyTorch loop over the same batches.

    python benchmarks/loop.py

Both train the same model on batches that are in memory, on the CPU. Processor time is measured, rounds alternate, and
the ratio of each pair of rounds is taken, so that a machine's changing load hits both alike. Evaluation, checkpoints
and dashboards are off.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel

LOSSES = 5  # a model like VITS logs about as many
# of the Trainer, which evaluates, saves and shows nothing
SETTINGS = {
    "optimizer": "AdamW",
    "lr": 1e-3,
    "run_eval": False,
    "save_checkpoints": False,
    "dashboard_logger": "none",
    "device": "cpu",
    "print_step": 10**9,
    "plot_step": 10**9,
}


class Classifier(TrainerModel):
    """Layers of equal width; the width decides how long an update takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 10))

    def train_step(self, batch: dict, criterion: nn.Module) -> tuple[dict, dict]:
        loss = criterion(self.layers(batch["x"]), batch["y"])
        return {}, {"loss": loss, **{f"part_{i}": loss.detach() * i for i in range(LOSSES)}}

    def get_criterion(self) -> nn.Module:
        return nn.CrossEntropyLoss()


class Batches(torch.utils.data.Dataset):
    """The same batch again and again: loading takes no time."""

    def __init__(self, width: int, updates: int) -> None:
        torch.manual_seed(0)
        self.batch = {"x": torch.randn(32, width), "y": torch.randint(10, (32,))}
        self.updates = updates

    def __len__(self) -> int:
        return self.updates

    def __getitem__(self, index: int) -> dict:
        return self.batch


def time_bare(width: int, loader: torch.utils.data.DataLoader) -> float:
    """Seconds per update of a loop written by hand, with the true gradient norm."""
    torch.manual_seed(0)
    model, criterion = Classifier(width), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = time.process_time()
    for batch in loader:
        _, losses = model.train_step(batch, criterion)
        losses["loss"].backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.process_time() - start) / len(loader)


def time_trainer(width: int, loader: torch.utils.data.DataLoader) -> float:
    """Seconds per update of the Trainer."""
    torch.manual_seed(0)
    config = TrainerConfig(epochs=1, **SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainerArgs()
        trainer = Trainer(
            args, config, folder, model=Classifier(width), train_loader=loader, parse_command_line_args=False
        )
        trainer.open_run()
        start = time.process_time()
        trainer.train_epoch()
        return (time.process_time() - start) / len(loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=200)
    options = parser.parse_args()
    sys.stdout.flush()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    print("width   bare [ms]   Trainer [ms]   added [us]   ratio (median of rounds, quartiles)")
    for width in (64, 512, 1024):
        loader = torch.utils.data.DataLoader(Batches(width, options.updates), batch_size=None)
        times = []
        for _ in range(options.rounds + 1):
            with open(os.devnull, "w") as silence:
                stdout, sys.stdout = sys.stdout, silence
                times.append((time_bare(width, loader), time_trainer(width, loader)))
                sys.stdout = stdout
        times = times[1:]  # the first round warms up
        ratios = sorted(trainer / bare for bare, trainer in times)
        bare, trained = (statistics.median(column) * 1e3 for column in zip(*times))
        low, middle, high = statistics.quantiles(ratios, n=4)
        added = (trained - bare) * 1e3
        print(f"{width:5}   {bare:9.3f}   {trained:12.3f}   {added:10.0f}   {middle:.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()

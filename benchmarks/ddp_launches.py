"""Whether a training of two ranks ends well every time: starts one again and again, and compares the weights.

    python benchmarks/ddp_launches.py --launches 100

Each launch trains a GAN with outputs shared between its passes, accumulated, with parameters that only one rank uses
and a last batch that leaves one rank without samples, over gloo on the CPU. What hangs for two minutes is stopped.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel, seed_everything

LIMIT = 120  # [s]


class Gan(TrainerModel):
    """The discriminator's pass computes what the generator's pass uses; some samples take a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.disc = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)), nn.Linear(1, 1)
        self.sometimes, self.unused = nn.Linear(8, 1), nn.Linear(8, 1)

    def train_step(self, batch: dict, criterion: None, optimizer_idx: int) -> tuple[dict, dict]:
        if optimizer_idx == 1:
            return {}, {"loss": ((1 - self.disc(batch["fake"])) ** 2).mean()}
        x = batch["x"]
        batch["fake"] = self.generator(x)
        chosen = x[:, :1] > 1
        if chosen.any():
            batch["fake"] = batch["fake"] + torch.where(chosen, self.sometimes(x), 0.0)
        real, fake = self.disc(x.sum(1, keepdim=True)), self.disc(batch["fake"].detach())
        return {}, {"loss": ((1 - real) ** 2).mean() + (fake**2).mean()}

    def get_criterion(self) -> None:
        return None

    def get_optimizer(self) -> list[torch.optim.Optimizer]:
        rest = [*self.generator.parameters(), *self.sometimes.parameters(), *self.unused.parameters()]
        return [torch.optim.AdamW(self.disc.parameters(), lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


def train() -> None:
    """What each rank does; the first leaves a hash of the weights in a file."""
    seed_everything(0)
    samples = [{"x": torch.randn(8)} for _ in range(41)]
    config = TrainerConfig(epochs=5, batch_size=2, run_eval=False, dashboard_logger="none", print_step=1000)
    loader = DataLoader(samples, batch_size=2, shuffle=True)
    trainer = Trainer(TrainerArgs(grad_accum_steps=2), config, "output", model=Gan(), train_loader=loader)
    trainer.fit()
    state = trainer.model.state_dict()
    found = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
    Path(f"weights_{os.environ['RANK']}.txt").write_text(found)


def launch() -> str:
    """One launch: ``ok`` and a hash of the weights, or what went wrong."""
    command = [sys.executable, "-m", "trainer.distribute", "--nproc", "2", "--device", "cpu", __file__, "--train"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"did not end within {LIMIT} s"
        if done.returncode:
            return f"exit code {done.returncode}: {done.stderr[-2000:]}"
        weights = {(Path(folder) / f"weights_{rank}.txt").read_text() for rank in range(2)}
        return f"ok, weights {weights.pop()[:12]}" if len(weights) == 1 else "the ranks' weights differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--train", action="store_true", help="be a rank")
    options = parser.parse_args()
    if options.train:
        sys.argv = sys.argv[:1]
        train()
        return
    begin, found = time.perf_counter(), Counter(launch() for _ in range(options.launches))
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, 2 gloo ranks, {options.launches} launches")
    print(f"{(time.perf_counter() - begin) / options.launches:.1f} s for each")
    for result, count in found.most_common():
        print(f"{count:5}  {result}")


if __name__ == "__main__":
    main()

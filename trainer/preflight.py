"""Whether ranks can work together, and how fast: what one runs before a week of training.

    python -m trainer.distribute --gpus 0,1
    python -m trainer.distribute --nproc 2 --device cpu

Every check has its own verdict. The ranks tell each other what they found through a store of their own, which works
when the group that is checked does not; a check that hangs ends after a minute, and who did not answer is named.
"""

import concurrent.futures
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.config import TrainerArgs, TrainerConfig
from trainer.device import pick_device
from trainer.distributed import Ranks

PATIENCE = 60.0  # seconds for one check
_GRACE = 5.0  # seconds more for the answers of the others


class CheckError(RuntimeError):
    """A check has found something wrong."""


@dataclass
class Verdict:
    """What came of one check.

    Attributes:
        name: of the check.
        ok: whether all ranks passed.
        found: what was measured, or what is wrong.
    """

    name: str
    ok: bool
    found: str


class Board:
    """Where the ranks tell each other how a check went.

    Args:
        ranks: this process among the others.
        store: to write to; a new one at MASTER_ADDR:MASTER_PORT by default, which the group then shares.
        patience: seconds for one check.
    """

    def __init__(self, ranks: Ranks, store: dist.Store | None = None, patience: float = PATIENCE) -> None:
        self.ranks, self.patience = ranks, patience
        self._store = dist.PrefixStore("preflight", store or _new_store(ranks, patience))

    def tell(self, check: str, answer: dict[str, Any]) -> None:
        """This rank's answer."""
        self._store.set(f"{check}/{self.ranks.rank}", json.dumps(answer))

    def ask(self, check: str, who: int | str, seconds: float) -> dict[str, Any] | None:
        """A rank's answer, or what ``conclude`` said; None when there is none in time."""
        key = f"{check}/{who}"
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError:  # that is how it says that time is up
            return None
        return json.loads(self._store.get(key))

    def conclude(self, check: str, verdict: Verdict) -> None:
        """Rank 0 tells the others what the verdict is."""
        self._store.set(f"{check}/all", json.dumps(vars(verdict)))


def _new_store(ranks: Ranks, patience: float) -> dist.TCPStore:
    # torch's launcher hosts one at this address, unless it says that it does not
    hosts = ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=hosts,
        timeout=timedelta(seconds=patience),
        wait_for_workers=False,
        multi_tenant=True,  # the group's own store then joins this one
    )


# ---- the checks: each returns what it found, or raises a RuntimeError, after the last thing that others wait for ----


def name_device(device: torch.device) -> dict[str, str]:
    """What a rank is: its host, the kind of its device, and which one."""
    host = platform.node()
    if device.type != "cuda":
        return {"host": host, "device": device.type, "id": ""}
    found = torch.cuda.get_device_properties(device)
    return {"host": host, "device": found.name, "id": str(getattr(found, "uuid", device.index))}


def check_devices(whos: list[dict[str, str]]) -> str:
    """Every rank has a device of its own.

    Args:
        whos: what name_device says on each rank.

    Raises:
        CheckError: two ranks share a GPU.
    """
    owners: dict[tuple[str, str], int] = {}
    for rank, who in enumerate(whos):
        other = owners.setdefault((who["host"], who["id"]), rank)
        if who["id"] and other != rank:
            raise CheckError(f"ranks {other} and {rank} on {who['host']} have the same GPU ({who['device']})")
    counts = Counter((who["host"], who["device"]) for who in whos)
    return "\n".join(f"{host}: {count} x {device}" for (host, device), count in counts.items())


def check_group(ranks: Ranks, device: torch.device) -> str:
    """The process group opens."""
    ranks.open(device)
    return f"{ranks.world_size} ranks over {dist.get_backend()}"


def check_hosts(ranks: Ranks, device: torch.device) -> str:
    """What the hosts tell each other arrives."""
    expected = [{"rank": rank} for rank in range(ranks.world_size)]
    found, value = ranks.gather({"rank": ranks.rank}), ranks.broadcast(f"from {ranks.rank}")
    if found != expected:
        raise CheckError(f"gathered {found} instead of {expected}")
    if value != "from 0":
        raise CheckError(f"broadcast gave {value!r} instead of 'from 0'")
    return "gathered and broadcast"


def check_all_reduce(ranks: Ranks, device: torch.device) -> str:
    """Sums over the ranks are exact, of one value and of a million."""
    n, sizes = ranks.world_size, (1, 1_000_003)
    indices = [torch.arange(size, device=device, dtype=torch.float32) % 97 for size in sizes]
    sums = [index + ranks.rank for index in indices]
    for values in sums:
        dist.all_reduce(values)
    for index, values in zip(indices, sums):
        _compare(values, index * n + n * (n - 1) // 2)  # whole numbers below 2^24: exact in any order
    return f"{' and '.join(f'{size:,}' for size in sizes)} values, exact"


def check_broadcast(ranks: Ranks, device: torch.device) -> str:
    """Every rank's values reach all others unchanged."""
    index = torch.arange(1000, device=device)
    received = [index + 1000 * ranks.rank for _ in range(ranks.world_size)]
    for source, values in enumerate(received):
        dist.broadcast(values, src=source)
    for source, values in enumerate(received):
        _compare(values, index + 1000 * source)
    return f"from each of {ranks.world_size} ranks, exact"


def check_all_gather(ranks: Ranks, device: torch.device) -> str:
    """Every rank gets the values of all, in their order."""
    mine = torch.arange(1000, device=device) * (ranks.rank + 1)
    found = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(found, mine)
    _compare(torch.stack(found), torch.stack([mine // (ranks.rank + 1) * (r + 1) for r in range(ranks.world_size)]))
    return "in the order of the ranks, exact"


def check_step(ranks: Ranks, device: torch.device) -> str:
    """One update of a small net by DDP is that of one process on the joint batch, and the same on all ranks."""
    each = 4
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(each * ranks.world_size, size, generator=generator).to(device) for size in (8, 1))
    alone = _update(_small_net(0, device), x, y)
    # from weights of its own: those of rank 0 are to arrive
    wrapped = nn.parallel.DistributedDataParallel(
        _small_net(ranks.rank, device), device_ids=[device.index] if device.type == "cuda" else None
    )
    together = _update(wrapped, x[ranks.rank :: ranks.world_size], y[ranks.rank :: ranks.world_size])
    all_ranks = [torch.empty_like(together) for _ in range(ranks.world_size)]
    dist.all_gather(all_ranks, together)
    # fp32: sums over the samples in another order, a few roundings of 6e-8 relative to values around 1
    difference = float((alone - together).abs().max())
    if not difference <= 1e-5:
        raise CheckError(f"weights after one update differ from those of one process by {difference:.2g}")
    for other, weights in enumerate(all_ranks):
        if not torch.equal(weights, together):
            raise CheckError(f"weights after one update are not those of rank {other}")
    return f"within {difference:.1g} of one process; bitwise equal on all ranks"


def measure_latency(ranks: Ranks, device: torch.device) -> str:
    """How long the sum of one value takes: the median of 50."""
    value = torch.ones(1, device=device)
    return f"{_seconds_of_all_reduce(value, 50) * 1e6:,.0f} us for the sum of one value"


def measure_bandwidth(ranks: Ranks, device: torch.device) -> str:
    """How many bytes each link carries in a large sum: the bus bandwidth, as nccl-tests count it."""
    values = torch.ones((64 if device.type == "cuda" else 16) * 2**18, device=device)
    seconds = _seconds_of_all_reduce(values, 5)
    speed = 2 * (ranks.world_size - 1) / ranks.world_size * values.nbytes / seconds
    return f"{speed / 1e9:.2f} GB/s bus bandwidth; {values.nbytes / 2**20:.0f} MiB summed in {seconds * 1e3:.1f} ms"


CHECKS: dict[str, Callable[[Ranks, torch.device], str]] = {
    "process group": check_group,
    "values of the hosts": check_hosts,
    "all-reduce": check_all_reduce,
    "broadcast": check_broadcast,
    "all-gather": check_all_gather,
    "one DDP step": check_step,
    "latency": measure_latency,
    "bandwidth": measure_bandwidth,
}


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = int((found != expected).sum())
    if wrong:
        first = int((found != expected).flatten().nonzero()[0])
        raise CheckError(
            f"{wrong:,} of {found.numel():,} values are wrong; the first is {found.flatten()[first].item():g} "
            f"instead of {expected.flatten()[first].item():g}"
        )


def _small_net(seed: int, device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)


def _update(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The weights after one update of SGD, flat."""
    nn.functional.mse_loss(net(x), y).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def _seconds_of_all_reduce(values: torch.Tensor, times: int) -> float:
    """The median, after one that does not count; the values may become infinite, which costs no time."""
    taken = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        dist.all_reduce(values)
        if values.device.type == "cuda":
            torch.cuda.synchronize(values.device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


# ---- running them ----


def run_checks(
    ranks: Ranks, device: torch.device, board: Board, checks: dict[str, Callable[[Ranks, torch.device], str]] = CHECKS
) -> list[Verdict]:
    """Run the checks on all ranks together, up to the first that fails.

    Args:
        ranks: this process among the others; its group is opened here.
        device: where this rank trains.
        board: where the ranks tell each other how it went.
        checks: what to run, by name.

    Returns:
        The verdicts, the same on all ranks; only where rank 0 does not answer, each rank has its own.
    """
    verdicts = [_conclude(board, "devices", {"found": name_device(device)}, combine=check_devices)]
    # a thread can be left behind when it hangs
    pool = concurrent.futures.ThreadPoolExecutor(1)
    for name, check in checks.items():
        if not verdicts[-1].ok:
            break
        future = pool.submit(check, ranks, device)
        try:
            answer = {"found": future.result(board.patience)}
        except concurrent.futures.TimeoutError:
            answer = {"hangs": True}
        except RuntimeError as error:
            answer = {"wrong": (str(error).strip() or repr(error)).splitlines()[0]}
        verdicts.append(_conclude(board, name, answer))
    pool.shutdown(wait=False)
    return verdicts


def _conclude(
    board: Board, name: str, mine: dict[str, Any], combine: Callable[[list], str] = lambda found: found[0]
) -> Verdict:
    """Tell what this rank found, and hear the verdict; rank 0 gives it."""
    board.tell(name, mine)
    if not board.ranks.is_main:
        told = board.ask(name, "all", board.patience + 2 * _GRACE)
        return Verdict(**told) if told else Verdict(name, False, f"rank 0 does not answer ({board.patience:g} s)")
    end, answers = time.monotonic() + board.patience + _GRACE, []
    if "hangs" in mine:
        end = time.monotonic() + _GRACE
    for rank in range(board.ranks.world_size):
        answers.append(board.ask(name, rank, max(0.1, end - time.monotonic())))
    try:
        verdict = Verdict(name, True, combine(_all_found(answers, board.patience)))
    except CheckError as error:
        verdict = Verdict(name, False, str(error))
    board.conclude(name, verdict)
    return verdict


def _all_found(answers: list[dict[str, Any] | None], patience: float) -> list[Any]:
    """What the ranks found.

    Raises:
        CheckError: a rank found something wrong, hangs, or does not answer; the worst of these is named.
    """
    silent = [str(rank) for rank, answer in enumerate(answers) if answer is None]
    wrong = [f"rank {rank}: {answer['wrong']}" for rank, answer in enumerate(answers) if answer and "wrong" in answer]
    hanging = [str(rank) for rank, answer in enumerate(answers) if answer and "hangs" in answer]
    if silent:
        raise CheckError(f"no answer from rank {', '.join(silent)} within {patience:g} s")
    if wrong:
        raise CheckError(wrong[0])
    if hanging:
        raise CheckError(f"does not end within {patience:g} s on rank {', '.join(hanging)}")
    return [answer["found"] for answer in answers]


def show(verdicts: list[Verdict]) -> None:
    """Print them as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "verdict", "found")
    for verdict in verdicts:
        table.add_row(verdict.name, "[green]ok" if verdict.ok else "[bold red]FAILED", verdict.found)
    for name in list(CHECKS)[len(verdicts) - 1 :]:
        table.add_row(name, "not run", "", style="dim")
    Console(width=100).print(table)


def main(patience: float = PATIENCE) -> int:
    """Check, and print the table on rank 0; returns the exit code, that of rank 0 being the verdict.

    Args:
        patience: seconds for one check.
    """
    ranks = Ranks.from_environment(TrainerConfig(), TrainerArgs())
    if ranks.world_size == 1:
        raise ValueError("one rank: start two or more, with python -m trainer.distribute --nproc 2 --device cpu")
    device = pick_device("auto", None, ranks.local_rank)
    verdicts = run_checks(ranks, device, Board(ranks, patience=patience))
    ok = all(verdict.ok for verdict in verdicts)
    if ranks.is_main:
        show(verdicts)
    if not ok:
        sys.stdout.flush()
        # not through python's end, which waits for threads that hang; rank 0 alone says it, so that it is reported
        os._exit(int(ranks.is_main or "rank 0 does not answer" in verdicts[-1].found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

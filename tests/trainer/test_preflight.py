"""The check before a training: that it passes, and that it finds what is broken."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.trainer.launching import CPU, finish, start
from tests.trainer.two_ranks import on_two_ranks, wait_for_the_others
from trainer import preflight
from trainer.distributed import Ranks
from trainer.preflight import Board, CheckError, Verdict, check_devices, run_checks, show

DEVICE = torch.device("cpu")
# one rank hangs in a check of its own
HANGS = """
import os, sys, time
from trainer import preflight
def hang(ranks, device):
    time.sleep(600)
if os.environ["RANK"] == "1":
    preflight.CHECKS["broadcast"] = hang
sys.exit(preflight.main(patience=2))
"""


class Scenarios:
    """Runs checks on this rank, with something broken on rank 1, one scenario after the other."""

    def __init__(self, rank, folder):
        self.ranks, self.rank, self.folder, self.found = Ranks(rank, 2, rank), rank, folder, {}
        self.store = dist.TCPStore(
            "localhost", int(os.environ["MASTER_PORT"]), is_master=rank == 0, wait_for_workers=False, multi_tenant=True
        )

    def run(self, name, *checks, patience=20.0, takes_part=True, **broken):
        """The verdicts of these checks (all by default); names of preflight are replaced on rank 1."""
        wait_for_the_others(self.rank, 2, self.folder, name.replace(" ", "_"))
        before = {part: getattr(preflight, part) for part in broken}
        if self.rank == 1:
            for part, value in broken.items():
                setattr(preflight, part, value)
        board = Board(self.ranks, dist.PrefixStore(name, self.store), patience)
        chosen = {check: preflight.CHECKS[check] for check in checks or preflight.CHECKS}
        if takes_part:
            begin = time.monotonic()
            self.found[name] = run_checks(self.ranks, DEVICE, board, chosen)
            self.found[f"{name} took"] = time.monotonic() - begin
        for part, value in before.items():
            setattr(preflight, part, value)


class Dist:
    """torch.distributed with a function that is broken."""

    def __init__(self, **broken):
        self.__dict__.update(broken)

    def __getattr__(self, name):
        return getattr(dist, name)


def sum_and_one(values):
    """An all-reduce that gives one value too much."""
    dist.all_reduce(values)
    values[-1] += 1


def broadcast_nothing(values, src):
    """A broadcast that is heard but not received."""
    dist.broadcast(values.clone(), src=src)


def gather_in_reverse(found, mine):
    """An all-gather of the wrong order."""
    dist.all_gather(found[::-1], mine)


def raise_error(found, mine):
    """A collective that fails, after the others have got their answer."""
    dist.all_gather(found, mine)
    raise RuntimeError("NCCL error: unhandled system error\nmore")


def sum_late(values):
    """An all-reduce that others wait for."""
    time.sleep(2.5)
    dist.all_reduce(values)


class Unsynced(nn.Module):
    """What Coqui's Trainer makes of DDP: the model is entered past its wrapper."""

    def __init__(self, module, device_ids):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def run_scenarios(rank, folder):
    """All of them in one process group."""
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": (folder / "port").read_text()})
    scenarios = Scenarios(rank, folder)
    scenarios.run("good")
    scenarios.run("sums", "all-reduce", dist=Dist(all_reduce=sum_and_one))
    scenarios.run("broadcasts", "broadcast", "latency", dist=Dist(broadcast=broadcast_nothing))
    scenarios.run("gathers", "all-gather", dist=Dist(all_gather=gather_in_reverse))
    before, nn.parallel.DistributedDataParallel = nn.parallel.DistributedDataParallel, Unsynced
    scenarios.run("unsynced", "one DDP step")
    nn.parallel.DistributedDataParallel = before
    update = preflight._update
    scenarios.run("drifted", "one DDP step", _update=lambda *args: update(*args) + 2**-20)
    scenarios.run("error", "all-gather", "latency", dist=Dist(all_gather=raise_error))
    preflight._GRACE = 0.5
    scenarios.run("late", "all-reduce", patience=0.5, dist=Dist(all_reduce=sum_late))
    time.sleep(3)  # until it has come
    for silent in range(2):
        scenarios.run(f"silent {silent}", "all-reduce", patience=0.2, takes_part=rank != silent)
    wait_for_the_others(rank, 2, folder, "done")
    return {"verdicts": scenarios.found}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What both ranks concluded, by scenario."""
    folder = tmp_path_factory.mktemp("preflight")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    return [found["verdicts"] for found in on_two_ranks(folder, run_scenarios)]


class TestVerdicts:
    def test_all_is_well(self, verdicts):
        assert verdicts[0]["good"] == verdicts[1]["good"]
        assert [verdict.name for verdict in verdicts[0]["good"]] == ["devices", *preflight.CHECKS]
        assert all(verdict.ok for verdict in verdicts[0]["good"])

    @pytest.mark.parametrize(
        ("scenario", "name", "found"),
        [
            ("sums", "all-reduce", "rank 1: 1 of 1 values are wrong; the first is 2 instead of 1"),
            ("broadcasts", "broadcast", "rank 1: 1,000 of 1,000 values are wrong; the first is 1000 instead of 0"),
            ("gathers", "all-gather", "rank 1: 1,998 of 2,000 values are wrong; the first is 2 instead of 1"),
            ("unsynced", "one DDP step", "rank 0: weights after one update differ from those of one process by "),
            ("drifted", "one DDP step", "rank 0: weights after one update are not those of rank 1"),
            ("error", "all-gather", "rank 1: NCCL error: unhandled system error"),
            ("late", "all-reduce", "does not end within 0.5 s on rank 0, 1"),
        ],
    )
    def test_what_is_broken_is_found_by_all(self, verdicts, scenario, name, found):
        for mine in verdicts:
            first, last = mine[scenario]  # nothing is run after it
            assert first.ok
            assert (last.name, last.ok) == (name, False)
            assert last.found.startswith(found)
            assert last.found.endswith(found[-10:]) or scenario == "unsynced"

    def test_who_does_not_answer_is_named(self, verdicts):
        assert verdicts[0]["silent 1"] == [Verdict("devices", False, "no answer from rank 1 within 0.2 s")]
        assert verdicts[1]["silent 0"] == [Verdict("devices", False, "rank 0 does not answer (0.2 s)")]
        for found in verdicts:
            took = [found[name] for name in ("silent 0 took", "silent 1 took") if name in found]
            assert [0.2 < seconds < 5 for seconds in took] == [True]


def test_ranks_that_share_a_gpu_are_found():
    apart = [{"host": host, "device": "H200", "id": number} for host in "ab" for number in "12"]
    assert check_devices(apart) == "a: 2 x H200\nb: 2 x H200"
    cpus = [{"host": "a", "device": "cpu", "id": ""}] * 3
    assert check_devices(cpus) == "a: 3 x cpu"
    with pytest.raises(CheckError, match="ranks 1 and 4 on a have the same GPU"):
        check_devices([*apart, apart[1]])


def test_the_bandwidth_is_that_of_the_bus(monkeypatch):
    monkeypatch.setattr(preflight, "_seconds_of_all_reduce", lambda values, times: 0.004)
    # 16 MiB in 4 ms, of which a ring of four sends each byte 1.5 times
    assert preflight.measure_bandwidth(Ranks(0, 4), DEVICE).startswith(
        "6.29 GB/s bus bandwidth; 16 MiB summed in 4.0 ms"
    )


def test_the_table(capsys):
    show([Verdict("devices", True, "a: 2 x cpu"), Verdict("process group", False, "no way")])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row][:3] == [
        ["devices", "ok", "a: 2 x cpu"],
        ["process group", "FAILED", "no way"],
        ["values of the hosts", "not run", ""],
    ]


class TestLaunched:
    """As its users start it."""

    def test_it_passes(self, tmp_path):
        code, output, errors = finish(start(tmp_path, "", *CPU))
        assert code == 0, errors
        for name in ("devices", *preflight.CHECKS):
            assert [line.split("│")[2].strip() for line in output.splitlines() if f"│ {name} " in line] == ["ok"]
        assert "GB/s bus bandwidth" in output

    def test_a_rank_that_hangs_ends_it(self, tmp_path):
        begin = time.monotonic()
        code, output, errors = finish(start(tmp_path, HANGS, "script.py", *CPU))
        assert code == 1
        assert time.monotonic() - begin < 30
        assert "does not end within 2 s on rank 0, 1" in output
        assert "rank 0 failed (exit code 1)" in errors


def test_one_rank_has_nothing_to_check(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="one rank: start two or more"):
        preflight.main()

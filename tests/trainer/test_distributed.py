"""Several ranks: what two processes find together, over gloo, against one process that sees everything."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.trainer.two_ranks import on_two_ranks, wait_for_the_others
from trainer import TrainerArgs, TrainerConfig, distributed, seed_everything
from trainer.distributed import Agreement, Ranks, rank_seed

CPU = torch.device("cpu")
# samples of rank 0 and rank 1 in each update; none of its own: the rank repeats the other's, with weight 0
SHARES = [(3, 2), (4, 4), (1, 0), (2, 5)]


class Net(nn.Module):
    """A small net with a layer that nobody uses, and one that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.unused, self.sometimes = nn.Linear(2, 2), nn.Linear(3, 1)

    def loss(self, x):
        out = self.second(torch.tanh(self.first(x)))
        chosen = x[:, 0] > 10
        if chosen.any():
            out = out + torch.where(chosen[:, None], self.sometimes(x), 0.0)
        return ((out - x.sum(1, keepdim=True)) ** 2).mean()


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of both ranks, one pair for each update; in two of them, rank 1 alone uses ``sometimes``."""
    generator = torch.Generator().manual_seed(3)
    batches = [tuple(torch.randn(n, 3, generator=generator) for n in shares) for shares in SHARES]
    batches[1][1][:, 0] = 11.0
    batches[3][1][0, 0] = 12.0
    return batches


def train(ranks: Ranks, updates: list[list[tuple[torch.Tensor, int]]]) -> dict:
    """Train on windows of (batch, samples that count), as the Trainer does."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    gradients, missing = [], []
    for window in updates:
        total = ranks.agree(sum(n for _, n in window)).samples
        for x, n in window:
            (model.loss(x) * (n / total)).backward()
        assert ranks.sum_gradients(model.parameters())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        missing.append(sorted(name for name, p in model.named_parameters() if p.grad is None))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"weights": model.state_dict(), "gradients": gradients, "missing": missing}


def train_a_share(ranks: Ranks, rank: int) -> dict:
    own = []
    for pair in make_batches():
        x = pair[rank]
        own.append([(x, len(x)) if len(x) else (pair[0], 0)])
    return train(ranks, own)


def sum_special_gradients(ranks: Ranks, rank: int) -> dict:
    """Gradients of several types, a view that is not contiguous, large ones in buckets of 1 kB, and an extra tensor."""
    generator = torch.Generator().manual_seed(rank)
    parameters = [
        nn.Parameter(torch.zeros(10_007)),
        nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16)),
        nn.Parameter(torch.zeros(2, 3, 4).transpose(0, 2)),
        nn.Parameter(torch.zeros(7, dtype=torch.float64)),
        nn.Parameter(torch.zeros(2), requires_grad=False),
        nn.Parameter(torch.zeros(())),
    ]
    own = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]
    summed = []
    for size in (2**26, 1000):
        distributed._BUCKET_BYTES = size
        for parameter, gradient in zip(parameters, own):
            parameter.grad = gradient.clone() if parameter.requires_grad else None
        extra = torch.tensor([1.0 + rank, 10.0])
        ranks.sum_gradients(parameters, extra)
        summed.append([None if p.grad is None else p.grad.clone() for p in parameters] + [extra])
    return {"own": own, "summed": summed}


def ask_who_has_a_loss(ranks: Ranks, rank: int) -> dict:
    parameter, extra = nn.Parameter(torch.ones(2)), torch.ones(1)
    nobody = ranks.sum_gradients([parameter], extra, used=False)
    after = (parameter.grad, extra.item())
    somebody = ranks.sum_gradients([parameter], extra, used=rank == 1)
    return {"nobody": nobody, "after": after, "somebody": (somebody, parameter.grad, extra.item())}


def told(agreement: Agreement) -> tuple:
    return agreement.samples, agreement.signal


def exchange(ranks: Ranks, rank: int) -> dict:
    return {
        "agree": told(ranks.agree(3.5 * rank + 1)),
        "agree on a signal": told(ranks.agree(2, 15 if rank == 1 else None)),
        "gather": ranks.gather({"rank": rank}),
        "broadcast": ranks.broadcast(f"from {rank}"),
        "any": (ranks.any(rank == 1), ranks.any(False)),
    }


def spread_model(ranks: Ranks, rank: int) -> dict:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("mask", torch.tensor([rank == 0, True]))
    model.register_buffer("halves", torch.randn(5).bfloat16())
    model.register_buffer("count", torch.tensor(2**60 + 7 + rank))  # as a float it would be another number
    model[0].weight.requires_grad_(False)
    mine = {name: value.clone() for name, value in model.state_dict().items()}
    ranks.broadcast_model(model)
    spread = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.fill_(rank)
        model.count.fill_(rank + 20)
    ranks.broadcast_buffers(model)
    return {"mine": mine, "spread": spread, "then": {name: value.clone() for name, value in model.state_dict().items()}}


def draw(ranks: Ranks, rank: int) -> dict:
    seed_everything(8)
    ranks.seed(8)
    return {"drawn": (random.random(), float(np.random.rand()), torch.rand(3))}


def use_the_scripts_group(rank: int, folder: Path) -> dict:
    """A group that the script opened counts, and stays."""
    dist.init_process_group("gloo", f"file://{folder}/script", rank=rank, world_size=2)
    args = TrainerArgs()
    ranks = Ranks.from_environment(TrainerConfig(distributed_backend="auto"), args)
    ranks.open(CPU)
    found = ranks.gather(rank)
    ranks.close()
    still_there = dist.is_initialized()
    wait_for_the_others(rank, 2, folder, "gathered")
    dist.destroy_process_group()
    return {"args": (args.use_ddp, args.rank), "gathered": found, "still there": still_there}


def all_parts(rank: int, folder: Path) -> dict:
    """All that a rank does."""
    found = {"script": use_the_scripts_group(rank, folder)}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
    ranks = Ranks.from_environment(TrainerConfig(distributed_url=f"file://{folder}/trainer"), TrainerArgs())
    ranks.open(CPU)
    ranks.open(CPU)
    for part in (train_a_share, sum_special_gradients, ask_who_has_a_loss, exchange, spread_model, draw):
        found[part.__name__] = part(ranks, rank)
    ranks.barrier()
    wait_for_the_others(rank, 2, folder, "done")
    ranks.close()
    return {**found, "closed": not dist.is_initialized()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What rank 0 and rank 1 found."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), all_parts)


class TestTwoRanks:
    """Two processes."""

    def test_two_ranks_compute_what_one_computes_on_the_joint_batch(self, results):
        joint = [torch.cat(pair) for pair in make_batches()]
        expected = train(Ranks(), [[(x, len(x))] for x in joint])
        for found in results:
            found = found["train_a_share"]
            assert found["missing"] == expected["missing"]
            for name, weight in expected["weights"].items():
                # fp32: a sum of at most eight terms in another order, through four updates of Adam
                torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-6)
            for step, gradients in enumerate(expected["gradients"]):
                torch.testing.assert_close(found["gradients"][step], gradients, rtol=1e-5, atol=1e-6)

    def test_two_ranks_are_bitwise_equal(self, results):
        first, second = (found["train_a_share"]["weights"] for found in results)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_gradient_missing_everywhere_stays_none_and_one_missing_here_is_zero(self, results):
        for found in results:
            unused, sometimes = ["unused.bias", "unused.weight"], ["sometimes.bias", "sometimes.weight"]
            missing = found["train_a_share"]["missing"]
            assert missing == [sorted(sometimes + unused), unused, sorted(sometimes + unused), unused]

    def test_gradients_of_every_type_are_summed(self, results):
        own = [found["sum_special_gradients"]["own"] for found in results]
        for found in results:
            large, small = found["sum_special_gradients"]["summed"]
            for i in (0, 1, 2, 3, 5):
                assert torch.equal(large[i], own[0][i] + own[1][i])  # of two numbers: exact in any order
                assert torch.equal(small[i], large[i])
            assert large[4] is None
            assert torch.equal(large[-1], torch.tensor([3.0, 20.0]))
            assert torch.equal(small[-1], large[-1])

    def test_whether_any_rank_has_a_loss(self, results):
        for found in results:
            found = found["ask_who_has_a_loss"]
            assert found["nobody"] is False
            assert found["after"] == (None, 1.0)
            assert found["somebody"] == (True, None, 2.0)

    def test_what_is_exchanged(self, results):
        for found in results:
            assert found["exchange"] == {
                "agree": (5.5, None),
                "agree on a signal": (4.0, 15),
                "gather": [{"rank": 0}, {"rank": 1}],
                "broadcast": "from 0",
                "any": (True, False),
            }

    def test_the_model_of_rank_0_is_everybodys(self, results):
        first, second = (found["spread_model"] for found in results)
        assert not torch.equal(first["mine"]["0.weight"], second["mine"]["0.weight"])
        for name, value in first["mine"].items():
            assert torch.equal(first["spread"][name], value)
            assert torch.equal(second["spread"][name], value)

    def test_buffers_alone_are_broadcast(self, results):
        for rank, found in enumerate(results):
            then = found["spread_model"]["then"]
            assert then["count"] == 20
            assert bool((then["0.weight"] == rank).all())

    def test_ranks_draw_differently_and_rank_0_as_a_single_process(self, results):
        seed_everything(8)
        alone = random.random(), float(np.random.rand()), torch.rand(3)
        first, second = (found["draw"]["drawn"] for found in results)
        assert first[:2] == alone[:2]
        assert torch.equal(first[2], alone[2])
        for mine, other in zip(first, second):
            assert not torch.equal(torch.as_tensor(mine), torch.as_tensor(other))
        seed_everything(rank_seed(8, 1))
        assert second[:2] == (random.random(), float(np.random.rand()))

    def test_a_group_of_the_script_is_used_and_left_alone(self, results):
        for rank, found in enumerate(results):
            assert found["script"] == {"args": (True, rank), "gathered": [0, 1], "still there": True}

    def test_a_group_of_its_own_is_closed(self, results):
        assert [found["closed"] for found in results] == [True, True]


class TestOneRank:
    """One process: nothing is opened, and everything returns at once."""

    def test_everything_is_free(self, monkeypatch):
        def forbidden(*args, **kwargs):
            raise AssertionError("one rank communicates")

        for name in ("init_process_group", "all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"):
            monkeypatch.setattr(dist, name, forbidden)
        ranks = Ranks()
        ranks.open(CPU)
        value, parameter, extra = {"a": 1}, nn.Parameter(torch.ones(2)), torch.ones(1)
        assert told(ranks.agree(3, None)) == (3, None)
        assert told(ranks.agree(3, 2)) == (3, 2)
        assert ranks.sum_gradients([parameter], extra) is True
        assert ranks.sum_gradients([parameter], extra, used=False) is False
        assert parameter.grad is None
        assert ranks.gather(value) == [value]
        assert ranks.broadcast(value) is value
        assert ranks.any(True) is True
        assert ranks.any(False) is False
        ranks.broadcast_model(nn.Linear(1, 1))
        ranks.broadcast_buffers(nn.BatchNorm1d(1))
        ranks.barrier()
        before = torch.get_rng_state()
        ranks.seed(1)
        assert torch.equal(torch.get_rng_state(), before)
        ranks.close()


class TestFromEnvironment:
    """Who this process is."""

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)

    def find(self, monkeypatch, use_ddp=False, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        args = TrainerArgs(use_ddp=use_ddp)
        ranks = Ranks.from_environment(TrainerConfig(), args)
        return ranks, args

    def test_without_a_launcher(self, monkeypatch):
        ranks, args = self.find(monkeypatch)
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main, ranks.group_id) == (0, 1, 0, True, "")
        assert (args.use_ddp, args.rank, args.group_id) == (False, 0, "")

    def test_with_a_launcher(self, monkeypatch):
        environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "group-a"}
        ranks, args = self.find(monkeypatch, **environment)
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main) == (5, 8, 1, False)
        assert (args.use_ddp, args.rank, args.group_id) == (True, 5, "group-a")

    def test_a_launcher_of_one_rank(self, monkeypatch):
        ranks, args = self.find(monkeypatch, use_ddp=True, RANK="0", WORLD_SIZE="1")
        assert (ranks.world_size, ranks.local_rank, args.use_ddp) == (1, 0, False)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"use_ddp": True}, "use_ddp=True.*python -m trainer.distribute"),
            ({"RANK": "1"}, "of RANK and WORLD_SIZE only one is set"),
            ({"WORLD_SIZE": "2"}, "of RANK and WORLD_SIZE only one is set"),
            ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
            ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one': must be a whole number"),
        ],
    )
    def test_what_is_refused(self, monkeypatch, settings, message):
        with pytest.raises(ValueError, match=message):
            self.find(monkeypatch, **settings)

    def test_nccl_on_the_cpu_is_refused(self):
        with pytest.raises(ValueError, match="distributed_backend='nccl' on cpu"):
            Ranks(0, 2, backend="nccl").open(CPU)
        assert not dist.is_initialized()


def test_seeds_of_ranks_differ_and_that_of_rank_0_is_the_seed():
    assert rank_seed(54321, 0) == 54321
    seeds = [rank_seed(seed, rank) for seed in (0, 1) for rank in range(50)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_what_ends_a_rank_is_left_for_the_launcher(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    before = sys.excepthook
    distributed._record_what_ends_the_process()
    assert sys.excepthook is before
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    distributed._record_what_ends_the_process()
    error = KeyError("gone")
    sys.excepthook(KeyError, error, None)
    assert shown == [(KeyError, error, None)]
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "KeyError: 'gone'"
    assert message["extraInfo"]["py_callstack"] == "KeyError: 'gone'\n"

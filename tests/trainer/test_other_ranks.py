"""A run that goes on with another number of ranks, or another batch size: the rest of its epoch, and its weights."""

import functools
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from tests.trainer.test_order_over_ranks import Buckets, Parts, Reads, global_batches, our_loader, plain_loader
from tests.trainer.toys import build
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs
from trainer.batches import Batches
from trainer.checkpoint import load_checkpoint, save_checkpoint

SEED = 5


class Rank(Batches):
    """A rank of a training, as far as its batches go."""

    def __init__(self, loader, rank, world_size, epoch=1, batches_done=0, position=None, accumulate=1):
        self.ranks = SimpleNamespace(rank=rank, world_size=world_size, gather=lambda value: [value] * world_size)
        self.config = SimpleNamespace(training_seed=SEED)
        self.args = SimpleNamespace(overfit_batch=False, grad_accum_steps=accumulate)
        self.train_loader = loader
        self.epochs_done, self.batches_done, self.restored_position = epoch, batches_done, position
        self.told = []
        self._signals = SimpleNamespace(heard=lambda: False, received=None)
        self.c_logger = SimpleNamespace(print=self.told.append, warn=self.told.append)

    def run(self, batches=None):
        """The next batches; all that are left by default."""
        loader = self.get_loader(is_eval=False)
        self.length = self.epoch_length(loader)
        windows = self.windows(loader)
        done = list(itertools.chain.from_iterable(itertools.islice(windows, batches)))
        self.batches_done += len(done)
        return done


def leg(make, world_size, batches=None, before=None, epoch=1, accumulate=1):
    """A part of an epoch on so many ranks, from where the leg before has left it: its ranks, and its global batches."""
    state = {"batches_done": before[0].batches_done, "position": before[0].position()} if before else {}
    ranks = [Rank(make(), rank, world_size, epoch, accumulate=accumulate, **state) for rank in range(world_size)]
    found = global_batches([rank.run(batches) for rank in ranks])
    assert len({(rank.batches_done, rank.length, str(rank.position())) for rank in ranks}) == 1
    return ranks, found


KINDS = {
    "bucketed": lambda n, size, drop: our_loader(n, size, True, drop, True),
    "ours": lambda n, size, drop: our_loader(n, size, True, drop, False),
    "in order": lambda n, size, drop: plain_loader("in order", n, size, drop),
    "shuffled": lambda n, size, drop: plain_loader("shuffled", n, size, drop),
    "weighted": lambda n, size, drop: plain_loader("weighted", n, size, drop),
    "custom": lambda n, size, drop: plain_loader("custom", n, size, drop),
}
legs = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))  # ranks, batch_size, batches


class TestTheRestOfAnEpoch:
    @settings(max_examples=80, deadline=None)
    @given(
        samples=st.integers(12, 60),
        kind=st.sampled_from(sorted(KINDS)),
        drop_last=st.booleans(),
        parts=st.lists(legs, min_size=2, max_size=4),
    )
    def test_no_sample_is_lost_or_repeated(self, samples, kind, drop_last, parts):
        make = KINDS[kind]
        world_size, batch_size, _ = parts[0]
        _, (*planned,) = leg(lambda: make(samples, batch_size * world_size, drop_last), 1)
        order, seen, ranks, size = [i for batch in planned for i in batch], [], None, 0
        for number, (world_size, batch_size, batches) in enumerate(parts):
            batches = None if number == len(parts) - 1 else batches  # the last one goes to the end
            size = batch_size * world_size
            ranks, found = leg(lambda n=batch_size: make(samples, n, drop_last), world_size, batches, ranks)
            seen += [i for batch in found for i in batch]
            position = ranks[0].position()
            assert (position["samples"], position["global_size"]) == (len(seen), size)
        assert ranks[0].batches_done == ranks[0].length
        assert seen == order[: len(seen)]
        assert len(order) - len(seen) < (size if drop_last else 1)
        ranks[0].epochs_done, ranks[0].batches_done = 2, 0  # from here on as if nothing had been
        fresh, next_epoch = leg(lambda: make(samples, batch_size, drop_last), world_size, epoch=2)
        assert ranks[0].run() == Rank(make(samples, batch_size, drop_last), 0, world_size, epoch=2).run()
        assert ranks[0].position() == fresh[0].position()
        assert next_epoch == leg(lambda: make(samples, size, drop_last), 1, epoch=2)[1]

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_stopped_once_more_it_is_the_same(self, kind):
        """1 rank, then 3, which are stopped in the same epoch and go on as 3: bitwise what they would have done."""

        def make(size):
            return lambda: KINDS[kind](50, size, False)

        first, _ = leg(make(8), 1, 2)
        whole, expected = leg(make(2), 3, None, first)
        second, found = leg(make(2), 3, 3, first)
        third, rest = leg(make(2), 3, None, second)
        assert found + rest == expected
        assert third[0].batches_done == whole[0].batches_done == third[0].length
        assert third[0].told == []
        assert second[0].told == [
            "this epoch had 8 samples in a batch of all ranks, and goes on with 6: each of its other samples still "
            "comes once"
        ]

    def test_the_same_global_batch_needs_no_cut(self):
        """A batch in the middle that is not full stays where it is."""

        def make(size):
            return lambda: our_loader(21, size, True, False, True)

        for start in range(1, 6):
            ranks, found = leg(make(4), 1, start)
            more, rest = leg(make(2), 2, None, ranks)
            assert found + rest == leg(make(4), 1)[1]
            assert (more[0].position()["cut"], more[0].told) == (None, [])

    def test_batches_that_stay_whole(self):
        """Of a batch sampler of one's own, the places are counted in its batches."""

        def make():
            return DataLoader(Reads(range(40)), batch_sampler=Buckets(range(40), 3, False), collate_fn=list)

        first, one = leg(make, 1, 3)
        second, two = leg(make, 2, 2, first)
        third, three = leg(make, 3, None, second)
        whole = leg(make, 1)[1]
        parts = [sorted(i for batch in part for i in batch) for part in (one, two, three)]
        cuts = [sorted(i for batch in part for i in batch) for part in (whole[:3], whole[3:7], whole[7:])]
        assert parts == cuts
        assert third[0].batches_done == third[0].length == 3 + 2 + -(-(len(whole) - 7) // 3)

    def test_accumulated(self):
        def make(size):
            return lambda: plain_loader("shuffled", 50, size)

        ranks, found = leg(make(8), 1, 1, accumulate=2)
        _, rest = leg(make(2), 3, None, ranks, accumulate=3)
        assert [i for batch in found + rest for i in batch] == [i for batch in leg(make(8), 1)[1] for i in batch]
        assert [len(batch) for batch in rest] == [6, 6, 6, 6, 6, 4]

    def test_the_end_of_an_epoch(self):
        """Stopped while it was evaluated: nothing is left to train."""
        ranks, _ = leg(lambda: plain_loader("shuffled", 20, 4), 1)
        more, rest = leg(lambda: plain_loader("shuffled", 20, 3), 3, None, ranks)
        assert rest == []
        assert more[0].length == more[0].batches_done == 5

    @pytest.mark.parametrize("kind", ["split by the script", "iterable"])
    def test_an_order_of_the_loaders_own_is_told_of(self, kind):
        def make(rank, world_size):
            if kind == "iterable":
                return DataLoader(Parts(range(48)), batch_size=4, collate_fn=list)
            sampler = DistributedSampler(range(48), world_size, rank)
            return DataLoader(Reads(range(48)), batch_size=4, sampler=sampler, collate_fn=list)

        before = Rank(make(0, 2), 0, 2, batches_done=3)
        before.get_loader(is_eval=False)
        position = before.position()
        assert position == {"samples": 24, "global_size": 8, "cut": None}
        after = Rank(make(0, 3), 0, 3, batches_done=3, position=position)
        after.get_loader(is_eval=False)
        assert after.batches_done == 2
        (line,) = after.told
        assert line.startswith("this epoch had 8 samples in a batch of all ranks, and goes on with 12: its loader has")


def train(folder: Path, world_size=1, size=4, continued=None, accumulate=1, **options):
    """A Toy on 13 samples; ``continued`` is the folder of a run, of which a copy goes on."""
    if continued is not None:
        folder = folder / f"copy of {Path(continued).name} on {world_size} by {size}"
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.copytree(continued, folder)
        if dist.is_initialized():
            dist.barrier()
    args = TrainerArgs(continue_path=str(folder) if continued else "", grad_accum_steps=accumulate)
    options = {"epochs": 3, "optimizer": "AdamW", "lr": 0.03, "print_step": 1, **options}
    trainer = build(train=13, args=args, batch_size=size, output_path=str(folder), **options)
    trainer.fit()
    if dist.is_initialized():
        dist.barrier()  # until the first rank has written
    return {
        "steps": trainer.total_steps_done,
        "epochs": trainer.epochs_done,
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "seen": trainer.model.seen,
        "mean": trainer.keep_avg_train.means["loss"],
        "folder": str(trainer.output_path),
        "log": (trainer.output_path / f"trainer_{trainer.ranks.rank}_log.txt").read_text(),
        "state": load_checkpoint(max(trainer.output_path.glob("checkpoint_*.pth"), key=lambda p: p.stat().st_mtime)),
    }


def on_two(parents: dict, rank: int, folder: Path) -> dict:
    """Runs of one rank that go on as two, and the beginnings of two."""
    return {
        "same batch": train(folder, 2, 2, parents["plain"]),
        "same batch, accumulated": train(folder, 2, 1, parents["accumulated"], accumulate=2),
        "same batch size": train(folder, 2, 4, parents["plain"], max_steps=6),
        "to one": train(folder / "to one", 2, 2, max_steps=5),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed and stopped runs of one rank, and what became of them on two."""
    folder = tmp_path_factory.mktemp("runs")
    found = {
        "whole": train(folder / "whole"),
        "whole, accumulated": train(folder / "whole, accumulated", size=2, accumulate=2),
        "plain": train(folder / "plain", max_steps=5),
        "accumulated": train(folder / "accumulated", size=2, accumulate=2, max_steps=5),
    }
    parents = {name: found[name]["folder"] for name in ("plain", "accumulated")}
    ranks = folder / "ranks"
    ranks.mkdir()
    found["ranks"] = on_two_ranks(ranks, functools.partial(on_two, parents), in_a_group=True)
    return found


def assert_close(found, expected):
    assert (found["steps"], found["epochs"]) == (expected["steps"], expected["epochs"]) == (12, 3)
    for name, weight in expected["weights"].items():
        # fp32: gradients summed in another order, through at most twelve updates of AdamW
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
    assert found["mean"] == pytest.approx(expected["mean"], rel=1e-4)


class TestRuns:
    def test_from_one_rank_to_two(self, runs):
        for rank in runs["ranks"]:
            assert_close(rank["same batch"], runs["whole"])
            assert_close(rank["same batch, accumulated"], runs["whole, accumulated"])
            assert "goes on with" not in rank["same batch"]["log"]
            line = "the checkpoint holds no random states of rank 1: it draws from the start of its own stream"
            assert line in rank["same batch"]["log"]

    def test_from_two_ranks_to_one(self, runs, tmp_path):
        found = train(tmp_path, continued=runs["ranks"][0]["to one"]["folder"])
        assert_close(found, runs["whole"])
        assert "random states" not in found["log"]

    def test_with_the_same_batch_size_on_two_ranks_and_back(self, runs, tmp_path):
        """Stopped after 5 updates, with a batch of the second epoch done: 8 samples on two ranks, one on one rank."""
        first, second = (rank["same batch size"] for rank in runs["ranks"])
        assert (first["steps"], first["epochs"], first["state"]["batches_done"]) == (6, 1, 2)
        expected = {"epoch": 1, "global_size": 4, "samples": 4, "batches": 1}
        assert first["state"]["position"] == {"samples": 12, "global_size": 8, "cut": expected}
        assert "this epoch had 4 samples in a batch of all ranks, and goes on with 8" in first["log"]
        back = train(tmp_path, continued=first["folder"], size=4)
        whole = [x for batch in runs["whole"]["seen"][4:8] for x in batch]
        joint = [x for pair in itertools.zip_longest(*first["seen"], *second["seen"]) for x in pair]
        assert [x for batch in runs["plain"]["seen"][4:] for x in batch] + joint + back["seen"][0] == whole
        assert back["seen"][1:] == runs["whole"]["seen"][8:]
        assert (back["steps"], back["epochs"]) == (6 + 1 + 4, 3)

    def test_another_batch_size_on_one_rank(self, runs, tmp_path):
        found = train(tmp_path, continued=runs["plain"]["folder"], size=5)
        rest = [x for batch in runs["whole"]["seen"][4:8] for x in batch][4:]
        assert found["seen"][:2] == [rest[:5], rest[5:]]
        assert found["steps"] == 5 + 2 + 3
        assert "epoch 2/3: 3 updates, 1 of them done before" in found["log"]

    def test_an_older_checkpoint_goes_on_by_its_batches(self, runs, tmp_path):
        older = tmp_path / "older"
        shutil.copytree(runs["plain"]["folder"], older)
        for path in older.glob("*.pth"):
            state = load_checkpoint(path)
            del state["position"]
            save_checkpoint(state, path)
        found = train(tmp_path, continued=older)
        for name, weight in runs["whole"]["weights"].items():
            assert torch.equal(found["weights"][name], weight)
        assert found["steps"] == 12

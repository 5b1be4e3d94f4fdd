"""The order of samples, and what is drawn for them, on any number of ranks and workers; each sample counts once."""

import collections
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from tests.trainer.toys import Toy, build, collate, make_samples
from tests.trainer.two_ranks import on_two_ranks
from trainer.data.loader import DistributedSamplerWrapper, Repeated, build_loader, rest_of_epoch, shard

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SEED = 5


class Shuffled:
    """A sampler of one's own, which draws from python's generator while it is asked."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __iter__(self):
        left = list(range(self.samples))
        while left:
            yield left.pop(random.randrange(len(left)))


class Buckets(BatchSampler):
    """Batches of neighbours in an order of one's own; says that there are fewer than it gives."""

    def __len__(self):
        return max(1, super().__len__() // 2)

    def __iter__(self):
        batches = list(super().__iter__())
        return iter([batches[i] for i in torch.randperm(len(batches))])


class Reads(list):
    """A data set that may draw, as far as the loader knows."""


SAMPLERS = {
    "in order": lambda n: {"shuffle": False},
    "shuffled": lambda n: {"shuffle": True},
    "generator": lambda n: {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "own generator": lambda n: {"sampler": RandomSampler(range(n), generator=torch.Generator().manual_seed(3))},
    "weighted": lambda n: {"sampler": WeightedRandomSampler([1.0 + i for i in range(n)], n + 3)},
    "subset": lambda n: {"sampler": SubsetRandomSampler(range(n // 2, n))},
    "custom": lambda n: {"sampler": Shuffled(n)},
}


def plain_loader(kind, samples, batch_size, drop_last=False, **options):
    """A DataLoader as scripts make it."""
    chosen = {**SAMPLERS[kind](samples), **options}
    return DataLoader(Reads(range(samples)), batch_size, drop_last=drop_last, collate_fn=list, **chosen)


def our_loader(samples, batch_size, shuffle, drop_last, bucketed, num_workers=0):
    """A loader of build_loader."""
    lengths = np.random.default_rng(0).integers(1, 50, samples) if bucketed else None
    return build_loader(
        list(range(samples)),
        batch_size,
        collate_fn=list,
        seed=3,
        shuffle=shuffle,
        lengths=lengths,
        drop_last=drop_last,
        num_workers=num_workers,
    )


def on_ranks(make, world_size, epoch=0, start=0):
    """The batches of every rank, which are as many on all of them."""
    ranks = []
    for rank in range(world_size):
        torch.rand(rank)  # ranks are in other random states
        random.random()
        ranks.append(list(rest_of_epoch(shard(make(), rank, world_size, SEED), epoch, start, SEED)))
    assert len({len(batches) for batches in ranks}) == 1
    return ranks


def global_batches(ranks):
    """What counts in each step, on all ranks together, in the order in which the ranks share it."""
    steps = zip(*[[[] if isinstance(batch, Repeated) else batch for batch in batches] for batches in ranks])
    columns = [itertools.chain(*itertools.zip_longest(*step)) for step in steps]
    return [[sample for sample in column if sample is not None] for column in columns]


sizes = {
    "samples": st.integers(1, 40),
    "batch_size": st.integers(1, 4),
    "world_size": st.integers(1, 5),
    "epoch": st.integers(0, 3),
    "drop_last": st.booleans(),
}


class TestOrder:
    @settings(max_examples=150, deadline=None)
    @given(**sizes, shuffle=st.booleans(), bucketed=st.booleans())
    def test_ours(self, samples, batch_size, world_size, epoch, drop_last, shuffle, bucketed):
        size = batch_size * world_size
        drop_last = drop_last and size <= samples

        def make(size):
            return our_loader(samples, size, shuffle, drop_last, bucketed)

        found = global_batches(on_ranks(lambda: make(batch_size), world_size, epoch))
        (alone,) = on_ranks(lambda: make(size), 1, epoch)
        assert found == alone
        seen = [i for batch in found for i in batch]
        kept = samples // size * size if drop_last else samples
        assert len(seen) == len(set(seen)) == kept
        if not shuffle:
            assert seen == list(range(kept))
        if not bucketed and not drop_last:  # the same order whatever the size
            (other,) = on_ranks(lambda: make(batch_size), 1, epoch)
            assert [i for batch in other for i in batch] == seen

    @settings(max_examples=150, deadline=None)
    @given(**sizes, kind=st.sampled_from(sorted(SAMPLERS)))
    def test_plain_loaders(self, samples, batch_size, world_size, epoch, drop_last, kind):
        size = batch_size * world_size
        found = global_batches(on_ranks(lambda: plain_loader(kind, samples, batch_size, drop_last), world_size, epoch))
        alone = plain_loader(kind, samples, size, drop_last)
        if kind == "custom":  # by itself it would draw when a batch is asked for, from whatever state there is then
            alone = shard(alone, 0, 1, SEED)
        assert found == list(rest_of_epoch(alone, epoch, 0, SEED))
        seen = [i for batch in found for i in batch]
        given_by_sampler = {"weighted": samples + 3, "subset": samples - samples // 2}.get(kind, samples)
        assert len(seen) == (given_by_sampler // size * size if drop_last else given_by_sampler)
        if kind == "in order":
            assert seen == list(range(len(seen)))
        elif kind != "weighted":
            assert len(set(seen)) == len(seen)

    @settings(max_examples=60, deadline=None)
    @given(**sizes)
    def test_a_batch_sampler_of_ones_own_keeps_its_batches_whole(
        self, samples, batch_size, world_size, epoch, drop_last
    ):
        drop_last = drop_last and batch_size <= samples

        def make():
            sampler = Buckets(range(samples), batch_size, drop_last)
            return DataLoader(Reads(range(samples)), batch_sampler=sampler, collate_fn=list)

        ranks = on_ranks(make, world_size, epoch)
        alone = list(rest_of_epoch(make(), epoch, 0, SEED))
        steps = [[batch for batch in step if not isinstance(batch, Repeated)] for step in zip(*ranks)]
        assert list(itertools.chain(*steps)) == alone
        assert all(len(step) == world_size for step in steps[:-1])
        (loader,) = [shard(make(), 0, 1, SEED)]
        loader.batch_sampler.set_epoch(epoch)
        assert len(loader) == len(alone)  # though its own sampler says half

    @forks
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("kind", ["shuffled", "weighted", "ours"])
    def test_workers_change_nothing(self, kind, world_size):
        def make(num_workers):
            if kind == "ours":
                return our_loader(17, 2, True, False, True, num_workers)
            return plain_loader(kind, 17, 2, num_workers=num_workers)

        assert on_ranks(lambda: make(2), world_size, 1) == on_ranks(lambda: make(0), world_size, 1)

    @settings(max_examples=60, deadline=None)
    @given(**sizes, kind=st.sampled_from(sorted(SAMPLERS)), data=st.data())
    def test_the_rest_of_an_epoch(self, samples, batch_size, world_size, epoch, drop_last, kind, data):
        def make():
            return plain_loader(kind, samples, batch_size, drop_last)

        whole = on_ranks(make, world_size, epoch)
        start = data.draw(st.integers(0, len(whole[0])))
        assert on_ranks(make, world_size, epoch, start) == [batches[start:] for batches in whole]

    @forks
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_loaders_without_batches_of_their_own(self, num_workers):
        """batch_size=None: the data set gives batches."""

        def make():
            return DataLoader([[0, 1], [2], [3, 4, 5]], batch_size=None, shuffle=True, num_workers=num_workers)

        def gather(own):
            return [own, (True, True)] if isinstance(own, tuple) else own

        first, second = (list(rest_of_epoch(shard(make(), r, 2, SEED), 4, 0, SEED)) for r in range(2))
        assert (len(first), len(second)) == (2, 2)
        assert second[1] == Repeated(first[1])
        assert sorted([*first, second[0]]) == [[0, 1], [2], [3, 4, 5]]

    def test_a_rank_that_was_done_when_the_run_stopped(self):
        """Others had more batches, of a data set that each rank reads in its own way."""
        dataset = Parts([])
        dataset.__class__ = type("Short", (Parts,), {"__iter__": lambda self: iter([7, 8, 9])})
        loader, others = DataLoader(dataset, batch_size=2, collate_fn=list), iter([True, True, False])
        batches = rest_of_epoch(loader, 0, 3, SEED, gather=lambda own: [own, (next(others), True)])
        assert list(batches) == [Repeated([9]), Repeated([9])]

    def test_a_sampler_that_was_changed_before_the_epoch(self):
        """By a callback, say, after it was asked for its length."""
        sampler = WeightedRandomSampler([1.0, 0.0], 4)
        loader = shard(DataLoader(Reads(range(2)), batch_size=2, sampler=sampler, collate_fn=list), 0, 1, SEED)
        assert len(loader) == 2
        sampler.weights = torch.tensor([0.0, 1.0])
        assert list(rest_of_epoch(loader, 0, 0, SEED)) == [[1, 1], [1, 1]]

    def test_a_sampler_without_end_is_refused(self):
        class Endless(Shuffled):
            def __iter__(self):
                return itertools.cycle(range(self.samples))

        loader = DataLoader(Reads(range(4)), batch_size=2, sampler=Endless(4))
        with pytest.raises(ValueError, match=r"BatchSampler gives 10200 batches or more.*a sampler must end"):
            len(shard(loader, 0, 1, SEED))


class Drawing(Dataset):
    """Draws from every generator for each sample."""

    def __init__(self, samples=9):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return index, (random.random(), float(np.random.rand()), float(torch.rand(())))


class Letters(Drawing):
    """With keys that are no numbers."""

    def __getitem__(self, key):
        return ord(key), super().__getitem__(0)[1]


class Batchwise(Drawing):
    """Reads batches, and looks at all indices first."""

    def __getitems__(self, indices):
        return [(i, self[i][1]) for i in np.asarray(indices).tolist()]


def drawn(make, world_size, epoch=1, start=0):
    """What was drawn for each sample, in the order of its appearances."""
    found = collections.defaultdict(list)
    for batch in global_batches(on_ranks(make, world_size, epoch, start)):
        for index, values in batch:
            found[index].append(values)
    return dict(found)


class TestRandomChoices:
    """Of a plain loader's data set: a function of (seed, epoch, index)."""

    def loader(self, dataset=None, **options):
        return DataLoader(dataset or Drawing(), **{"batch_size": 2, "collate_fn": list, **options})

    @forks
    @pytest.mark.parametrize(
        "options",
        [
            {"num_workers": 0},
            {"num_workers": 2},
            {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1},
            {"num_workers": 1, "worker_init_fn": lambda worker: torch.manual_seed(0)},
        ],
        ids=["none", "two", "persistent", "seeding"],
    )
    def test_whoever_reads_a_sample(self, options):
        expected = drawn(lambda: self.loader(batch_size=3), 1)
        assert sorted(expected) == list(range(9))
        assert len({value for (values,) in expected.values() for value in values}) == 3 * 9
        for world_size in (1, 2):
            assert drawn(lambda: self.loader(shuffle=True, **options), world_size) == expected
        assert drawn(lambda: self.loader(**options), 2, epoch=2) != expected
        ours = build_loader(Drawing(), 4, collate_fn=list, seed=SEED, shuffle=True)
        assert drawn(lambda: ours, 1) == expected

    def test_epochs_differ_and_resumes_do_not(self):
        loader = shard(self.loader(shuffle=True), 0, 1, SEED)
        first, second = (list(rest_of_epoch(loader, epoch, 0, SEED)) for epoch in (0, 1))
        values = {value for batch in first + second for _, values in batch for value in values}
        assert len(values) == 2 * 9 * 3
        assert list(rest_of_epoch(loader, 1, 3, SEED)) == second[3:]

    def test_a_sample_that_comes_again_is_drawn_for_again(self):
        def make(size):
            sampler = WeightedRandomSampler([1.0] * 9, 40)
            return self.loader(batch_size=size, sampler=sampler)

        expected = drawn(lambda: make(4), 1)
        assert sum(map(len, expected.values())) == len(set(itertools.chain(*expected.values()))) == 40
        assert drawn(lambda: make(2), 2) == expected

    def test_the_process_keeps_its_random_state(self):
        def state():
            numbers = [str(part) for part in np.random.get_state()]
            return random.getstate(), numbers, torch.get_rng_state().tolist(), generator.get_state().tolist()

        generator = torch.Generator()
        loader, before = shard(self.loader(shuffle=True, generator=generator), 0, 1, SEED), state()
        list(rest_of_epoch(loader, 0, 0, SEED))
        next(rest_of_epoch(loader, 1, 1, SEED))
        assert state() == before

    @forks
    def test_the_data_set_stays_the_scripts(self):
        """For whoever looks at it, in workers too."""
        found = []

        class Opened(Drawing):
            def __getitem__(self, index):
                return self.file, type(get_worker_info().dataset).__name__

        def open_file(worker):
            get_worker_info().dataset.file = "open"

        dataset = Opened()
        loader = shard(self.loader(dataset, num_workers=1, worker_init_fn=open_file), 0, 2, SEED)
        assert loader.dataset is dataset
        found = [item for batch in rest_of_epoch(loader, 0, 0, SEED) for item in batch]
        assert found == [("open", "Opened")] * 5

    def test_what_the_script_has_split_is_seeded_too(self):
        def make(rank):
            sampler = DistributedSamplerWrapper(range(9), num_replicas=2, rank=rank)
            return shard(self.loader(sampler=sampler), rank, 2, SEED)

        ranks = [list(rest_of_epoch(make(rank), 1, 0, SEED)) for rank in range(2)]
        found = {index: [values] for batch in itertools.chain(*ranks) for index, values in batch}
        assert found == drawn(self.loader, 1)

    @forks
    @pytest.mark.parametrize("kind", ["torch's generator", "its own", "split by the script", "batches"])
    def test_every_worker_has_a_seed_of_its_own(self, kind):
        """From which scripts make generators for their data sets."""

        class Seeds(Drawing):
            def __getitem__(self, index):
                return get_worker_info().seed

        def seeds(epoch, rank):
            split = DistributedSamplerWrapper(range(8), num_replicas=2, rank=rank)
            options = {
                "torch's generator": {"shuffle": True},
                "its own": {"shuffle": True, "generator": torch.Generator().manual_seed(1)},
                "split by the script": {"sampler": split},
                "batches": {"batch_size": None, "collate_fn": lambda seed: [seed]},
            }[kind]
            loader = shard(self.loader(Seeds(8), num_workers=2, **options), rank, 2, SEED)
            return {seed for batch in rest_of_epoch(loader, epoch, 0, SEED) for seed in batch}

        found = [seeds(epoch, rank) for epoch in (0, 1) for rank in (0, 1)]
        assert [len(of_rank) for of_rank in found] == [2, 2, 2, 2]
        assert len(set.union(*found)) == 8
        assert seeds(1, 1) == found[-1]

    def test_subsets_and_other_keys(self):
        subset = drawn(lambda: self.loader(Subset(Drawing(), [8, 3, 5])), 2)
        assert subset == drawn(lambda: self.loader(Subset(Drawing(), [8, 3, 5]), batch_size=3), 1)
        letters = drawn(lambda: self.loader(Letters(), sampler=list("hello"[:4])), 2)
        assert letters == drawn(lambda: self.loader(Letters(), batch_size=3, sampler=list("hello"[:4])), 1)
        assert sorted(letters) == sorted({ord(letter) for letter in "hell"})
        assert len(set(itertools.chain(*letters.values()))) == 4

    @forks
    def test_what_draws_for_a_batch_is_the_same_for_any_number_of_workers(self):
        def augment(items):
            return [(index, (random.random(), float(torch.rand(())))) for index, _ in items]

        for options in ({"collate_fn": augment}, {"dataset": Batchwise()}):
            one, two = (drawn(lambda n=n, options=options: self.loader(num_workers=n, **options), 1) for n in (1, 2))
            assert one == two
            rest = drawn(lambda options=options: self.loader(num_workers=2, **options), 1, start=2)
            assert rest == {index: one[index] for index in rest}
            assert len(rest) == 5

    def test_data_in_memory_is_not_seeded_for(self):
        """Which would cost more than reading it."""
        samples = [torch.tensor([i]) for i in range(4)]
        for dataset in (samples, Subset(samples, [1, 2]), torch.utils.data.TensorDataset(torch.zeros(4, 1))):
            sampler = shard(DataLoader(dataset, batch_size=2), 0, 1, SEED).batch_sampler
            assert type(next(iter(sampler))) is list
        assert type(next(iter(shard(self.loader(), 0, 1, SEED).batch_sampler))) is not list


# ---- two processes ----


class Parts(IterableDataset):
    """Reads its rank's part alone: two thirds of the samples for rank 0; len() is an estimate."""

    splits_itself = True

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return 6

    def __iter__(self):
        part = (0, 1) if dist.get_rank() == 0 else (2,)
        return iter([sample for i, sample in enumerate(self.samples) if i % 3 in part])


class Recording(Toy):
    """Keeps what it is evaluated on."""

    def eval_step(self, batch, criterion):
        self.evaluated = [*getattr(self, "evaluated", []), batch["x"][:, 0].tolist()]
        return super().eval_step(batch, criterion)


EVALUATIONS = [1, 2, 3, 7, 8, 9]


def evaluate(samples: int, size: int, folder: Path, **options) -> dict:
    data = [(x.double(), y.double()) for x, y in make_samples(samples)]
    loader = DataLoader(data, batch_size=size, collate_fn=collate)
    trainer = build(Recording, eval_loader=loader, output_path=str(folder / "evaluations"), **options)
    trainer.model.double()
    return {"mean": trainer.evaluate()["loss"], "weight": dict(trainer.keep_avg_eval.state_dict()["weights"])}


def train(loader: DataLoader, folder: Path, **options) -> dict:
    """One that ends where the longest rank does."""
    trainer = build(train_loader=loader, eval_loader=loader, epochs=2, output_path=str(folder / "trainings"), **options)
    trainer.fit()
    return {
        "steps": trainer.total_steps_done,
        "seen": trainer.model.seen,
        "train": trainer.keep_avg_train.means["loss"],
        "eval": trainer.keep_avg_eval.means["loss"],
        "eval weight": trainer.keep_avg_eval.state_dict()["weights"]["loss"],
        "weight": trainer.keep_avg_train.state_dict()["weights"]["loss"],
    }


def split_loaders(rank: int) -> dict:
    """Loaders that the script splits by itself, into parts that last longer on one rank."""
    samples = make_samples(13)
    batches = DistributedSamplerWrapper(Buckets(range(13), 2, False), num_replicas=2, rank=rank)
    return {
        "an iterable data set": DataLoader(Parts(samples), batch_size=2, collate_fn=collate),
        "batches": DataLoader(samples, batch_sampler=batches, collate_fn=collate),
    }


def work_on_two_ranks(rank: int, folder: Path) -> dict:
    results = {f"{n} samples": evaluate(n, 2, folder) for n in EVALUATIONS}
    for name, loader in split_loaders(dist.get_rank()).items():
        results[name] = train(loader, folder, lr=0.01)
    empty = DataLoader(Parts(make_samples(2)), batch_size=2, collate_fn=collate)  # none for rank 1
    try:
        train(empty, folder)
    except ValueError as error:
        results["empty"] = str(error)
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes found."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), work_on_two_ranks, in_a_group=True)


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
class TestTwoRanks:
    @pytest.mark.parametrize("samples", EVALUATIONS)
    def test_each_evaluation_sample_counts_once(self, two_ranks, samples, tmp_path):
        alone = evaluate(samples, 4, tmp_path)
        assert alone["weight"] == {"loss": samples}
        for found in two_ranks:
            assert found[f"{samples} samples"]["weight"] == {"loss": samples}
            # float64: sums of at most nine terms in another order
            assert found[f"{samples} samples"]["mean"] == pytest.approx(alone["mean"], rel=1e-14)

    @pytest.mark.parametrize(("name", "own"), [("an iterable data set", (5, 2)), ("batches", (4, 3))])
    def test_ranks_that_run_out_at_different_steps(self, two_ranks, name, own):
        first, second = (found[name] for found in two_ranks)
        assert first["steps"] == second["steps"] == 2 * own[0]
        assert first["weight"] == second["weight"] == first["eval weight"] == 13
        assert first["eval"] == second["eval"]
        values = sorted(float(x[0]) for x, _ in make_samples(13))
        seen = itertools.chain(*first["seen"][: own[0]], *second["seen"][: own[1]])
        assert sorted(seen) == pytest.approx(values)
        repeated = second["seen"][own[1] : own[0]]  # of no weight
        assert repeated == [second["seen"][own[1] - 1]] * (own[0] - own[1])

    def test_a_rank_without_any_batch_is_named(self, two_ranks):
        for found in two_ranks:
            assert found["empty"] == "rank 1 has no batch, and others have: give its loader more samples"

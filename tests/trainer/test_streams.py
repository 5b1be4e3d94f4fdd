"""IterableDatasets and loaders with a state: a run that was stopped goes on with the samples it would have seen."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.trainer.toys import assert_same_weights, build, collate, make_samples, weights_of
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SAMPLES = make_samples(23)


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Reads(IterableDataset):
    """Its worker's part of the samples in an order of the epoch, with noise from all generators; parts differ in size.

    Without a state, and without a length.
    """

    def __init__(self):
        self.epoch = self.first = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def part(self):
        """The indices that this worker reads: the last worker 2 of 23, the first most of them."""
        order = np.random.default_rng(self.epoch).permutation(len(SAMPLES)).tolist()
        info = get_worker_info()
        if info is None:
            return order
        return [order[i] for i in range(len(order)) if min(int(i**0.7) % 5, info.num_workers - 1) == info.id]

    def __iter__(self):
        first, self.first = self.first, 0
        for place, index in enumerate(self.part()[first:], start=first + 1):
            x, y = SAMPLES[index]
            self.place = place
            yield x + random.random() + float(np.random.rand()) + torch.rand(()), y


class Resumable(Reads):
    def state_dict(self):
        return {"place": self.place, "epoch": self.epoch}

    def load_state_dict(self, state):
        assert state["epoch"] == self.epoch
        self.first = state["place"]


def loader_of(dataset, workers=0, persistent=False, **settings):
    settings = {"batch_size": 2, "collate_fn": collate, **settings}
    return DataLoader(dataset, num_workers=workers, persistent_workers=persistent, **settings)


def trained(make, stops=(), epochs=3, **settings):
    """The trainers of a training that is stopped after so many updates, each of which begins with a new loader."""
    trainers = []
    for stop in [*stops, None]:
        args = TrainerArgs(continue_path=str(trainers[0].output_path) if trainers else "")
        options = {"epochs": epochs, "max_steps": stop, "dropout": 0.3, "run_eval": False, **settings}
        trainers.append(build(args=args, seed=len(trainers), train_loader=make(), **options))
        trainers[-1].fit()
        # else persistent workers live until the trainer is collected as garbage, where each takes five seconds to end
        reader = getattr(trainers[-1]._train_stream, "reader", trainers[-1].train_loader)
        if isinstance(reader, DataLoader):
            vars(reader).update(_iterator=None)
    return trainers


def seen(trainers):
    """What the model has seen, batch by batch."""
    return [batch for trainer in trainers for batch in trainer.model.seen]


def assert_same(found, expected):
    assert seen(found) == seen(expected)
    assert_same_weights(weights_of(found[-1].model), weights_of(expected[-1].model))
    assert found[-1].total_steps_done == expected[-1].total_steps_done
    assert found[-1].epochs_done == expected[-1].epochs_done


class Once(Reads):
    """Draws its order from a global generator when it is iterated, and keeps no state."""

    def __iter__(self):
        info = get_worker_info()
        order = np.random.permutation(23)[: 23 if info is None else 5 + info.id].tolist()
        return ((SAMPLES[i][0] + torch.rand(()), SAMPLES[i][1]) for i in order)


class GoesOn(IterableDataset):
    """Where the epoch before has ended, with a generator of its own; an epoch has 11 samples, and 5 of a second worker.

    At its end it is at its beginning again.
    """

    def __init__(self):
        self.random, self.place = random.Random(1), 0

    def __iter__(self):
        info = get_worker_info()
        worker = 0 if info is None else info.id
        while self.place < (11, 5)[worker]:
            self.place += 1
            x, y = SAMPLES[self.random.randrange(23)]
            yield x + self.random.random() + worker, y
        self.place = 0

    def state_dict(self):
        return {"random": self.random.getstate(), "place": self.place}

    def load_state_dict(self, state):
        self.random.setstate(state["random"])
        self.place = state["place"]


@pytest.mark.parametrize(
    ("dataset", "workers", "persistent", "settings"),
    [
        pytest.param(Resumable, 0, False, {}, id="state, no workers"),
        pytest.param(Resumable, 2, False, {}, id="state, 2 workers", marks=forks),
        pytest.param(Resumable, 2, True, {"prefetch_factor": 3}, id="state, 2 persistent workers", marks=forks),
        pytest.param(Resumable, 4, False, {"drop_last": True}, id="state, 4 workers, drop_last", marks=forks),
        pytest.param(Reads, 0, False, {}, id="no state, no workers"),
        pytest.param(Reads, 2, True, {}, id="no state, 2 persistent workers", marks=forks),
        pytest.param(Once, 0, False, {}, id="an order of iter(), no workers"),
        pytest.param(Once, 2, True, {}, id="an order of iter(), 2 persistent workers", marks=forks),
        pytest.param(GoesOn, 0, False, {}, id="goes on, no workers"),
        pytest.param(GoesOn, 2, True, {}, id="goes on, 2 persistent workers", marks=forks),
    ],
)
def test_a_run_that_was_stopped_sees_what_it_would_have_seen(dataset, workers, persistent, settings):
    """Twice in an epoch, before its last batches, at its end, and one batch after it."""

    def make():
        return loader_of(dataset(), workers, persistent, **settings)

    whole = trained(make)
    length = whole[0].total_steps_done // 3
    assert (whole[0].epochs_done, len(seen(whole))) == (3, 3 * length)
    values = [value for batch in seen(whole) for value in batch]
    assert len(set(values)) == len(values) > 3 * 8  # every sample, and every epoch, has noise of its own
    stops = [2, 5, length - 1, length, length + 1, 2 * length + length // 2]
    assert_same(trained(make, stops), whole)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_of_all_workers_and_epochs(workers):
    """In turn a batch of each worker, of parts that the epoch decides on; each batch has noise of its own."""
    found = trained(lambda: loader_of(Resumable(), workers, workers > 0), epochs=2)
    expected = []
    for epoch in range(2):
        order, n = np.random.default_rng(epoch).permutation(23).tolist(), max(1, workers)
        parts = [[order[i] for i in range(23) if min(int(i**0.7) % 5, n - 1) == worker] for worker in range(n)]
        rounds = itertools.zip_longest(*[[part[i : i + 2] for i in range(0, len(part), 2)] for part in parts])
        expected += [batch for batches in rounds for batch in batches if batch]
    noise = [
        value - float(SAMPLES[i][0][0])
        for batch, indices in zip(seen(found), expected, strict=True)
        for value, i in zip(batch, indices, strict=True)
    ]
    assert all(0 < value < 3 for value in noise)
    assert len({round(value, 5) for value in noise}) == 2 * 23


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_in_the_middle_of_a_window_of_accumulated_batches(workers, caplog):
    """Saved when the batches of the next window were read: what they were is not lost."""

    def make():
        return loader_of(Resumable(), workers)

    class Stop(Exception):
        pass

    def stop(trainer):
        if trainer.total_steps_done == 3:  # before its fourth update, whose batches are here
            trainer.save_checkpoint()
            raise Stop

    args = {"grad_accum_steps": 2}
    options = {"epochs": 2, "dropout": 0.3, "run_eval": False}
    whole = build(args=TrainerArgs(**args), train_loader=make(), **options)
    whole.fit()
    first = build(args=TrainerArgs(**args), train_loader=make(), callbacks={"on_train_step_start": stop}, **options)
    with pytest.raises(Stop):
        first.fit()
    args["continue_path"] = str(first.output_path)
    second = build(args=TrainerArgs(**args), seed=7, train_loader=make(), **options)
    second.fit()
    assert "read again" not in caplog.text
    assert first.model.seen == whole.model.seen[:6]
    assert_same([first, second], [whole])


@forks
def test_batches_that_the_data_set_makes():
    """batch_size=None, of an IterableDataset and of one with indices."""

    class Batches(Resumable):
        def __iter__(self):
            return (collate([sample]) for sample in super().__iter__())

    class Indexed(list):
        def __getitem__(self, index):
            batch = collate(super().__getitem__(index))
            return {"x": batch["x"] + torch.rand(()), "y": batch["y"]}

    parts = [SAMPLES[i : i + 3] for i in range(0, 23, 3)]
    for dataset, settings in ((Batches, {}), (lambda: Indexed(parts), {"shuffle": True})):
        for workers in (0, 2):

            def make(dataset=dataset, workers=workers, settings=settings):
                return loader_of(dataset(), workers, workers > 0, batch_size=None, collate_fn=None, **settings)

            assert_same(trained(make, [3], epochs=2), trained(make, epochs=2))


class Counting:
    """A loader that is no DataLoader, and keeps its own state."""

    def __init__(self, samples=SAMPLES):
        self.samples, self.first, self.place = samples, 0, 0

    def __iter__(self):
        first, self.first = self.first, 0
        for place in range(first, len(self.samples), 2):
            self.place = place + 2
            x, y = zip(*self.samples[place : place + 2])
            yield {"x": torch.stack(x) + torch.rand(()), "y": torch.stack(y)}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.first = state["place"]


def test_loaders_that_are_no_dataloaders(caplog):
    batches = [collate(SAMPLES[i : i + 2]) for i in range(0, 23, 2)]
    for make in (Counting, lambda: batches):
        assert_same(trained(make, [3, 12, 14], epochs=2), trained(make, epochs=2))
    # a list is read again after 3 and after 14 of 12 batches an epoch
    assert caplog.text.count("list has no state_dict() and load_state_dict(): the 3 batches of this epoch") == 1
    assert caplog.text.count("list has no state_dict() and load_state_dict()") == 2
    assert "Counting has" not in caplog.text


def test_what_is_lost_is_said_once(caplog):
    class Sized(Reads):
        def __len__(self):
            return 23

    trained(lambda: loader_of(Sized()), [12], epochs=2)
    assert "state_dict" not in caplog.text  # at an epoch's end nothing is read again
    trained(lambda: loader_of(Sized()), [3], epochs=1)
    warning = (
        "Sized has no state_dict() and load_state_dict(): the 3 batches of this epoch that are done are read again"
    )
    assert caplog.text.count(warning) == 1


@forks
def test_another_number_of_workers_is_told_of(caplog):
    workers = iter([2, 0, 0])
    trainers = trained(lambda: loader_of(Resumable(), next(workers)), [3, 5], epochs=1)
    assert trainers[-1].epochs_done == 1
    assert caplog.text.count("Resumable was read by 2 workers, and is by 0 now: the 3 batches of this epoch") == 1
    assert "in the rest of the epoch samples may come twice or be left out" in caplog.text


def test_another_batch_size_is_told_of(caplog):
    sizes = iter([4, 3])
    trainers = trained(lambda: loader_of(Resumable(), batch_size=next(sizes)), [2], epochs=1)
    assert "this epoch had 4 samples in a batch of all ranks, and goes on with 3: its loader has" in caplog.text
    assert caplog.text.count("come twice") == 1
    # of the 8 samples that were done, 6 are two batches
    assert [len(batch) for batch in trainers[1].model.seen] == [3] * 5 + [2]


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_that_no_checkpoint_may_hold_is_an_error_at_the_first_batch(workers):
    class Numpy(Resumable):
        def state_dict(self):
            return {"place": [np.int64(self.place)]}

    trainer = build(train_loader=loader_of(Numpy(), workers))
    with pytest.raises(TypeError, match=r"Numpy\.state_dict\(\)\['place'\]\[0\] is a int64, which no checkpoint may"):
        trainer.fit()
    assert trainer.model.seen == []


def test_without_a_length(caplog):
    """Nobody knows how many updates there will be; evaluations read an IterableDataset as well."""
    caplog.set_level("INFO")
    options = {"run_eval": True, "eval_loader": loader_of(Reads()), "print_step": 1, "epochs": 2}
    trainer = build(train_loader=loader_of(Reads()), **options)
    trainer.fit()
    assert (trainer.total_steps_done, trainer.epochs_done) == (24, 2)
    assert trainer.keep_avg_eval.state_dict()["weights"]["loss"] == 23
    assert trainer.evaluate() == trainer.evaluate()  # the same noise
    assert "epoch 1/2: until its data ends" in caplog.text
    assert "left unknown" in caplog.text
    limited = build(train_loader=loader_of(Reads()), max_steps=7, **options)
    limited.fit()
    assert limited.total_steps_done == 7
    debugged = build(args=TrainerArgs(overfit_batch=True), train_loader=loader_of(Reads()), **options)
    debugged.fit()
    assert debugged.total_steps_done == 2


def test_the_training_draws_what_it_would_without_noise_in_the_data():
    """What is read in the training's process has generators of its own."""

    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    trainer = build(train_loader=loader_of(Reads()), run_eval=False)
    batches = trainer.windows(trainer.get_loader(is_eval=False))
    before = state()
    read = [batch["x"] for (batch,) in batches]
    order = np.random.default_rng(0).permutation(23).tolist()
    noise = [float(x[0, 0] - SAMPLES[order[2 * i]][0][0]) for i, x in enumerate(read)]
    assert len({round(value, 5) for value in noise}) == len(read) == 12
    assert state() == before


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_fit_again_goes_on_where_it_was(workers):
    whole = trained(lambda: loader_of(Resumable(), workers, workers > 0), epochs=2)
    loader = loader_of(Resumable(), workers, workers > 0)
    again = build(train_loader=loader, epochs=2, dropout=0.3, run_eval=False, max_steps=5)
    again.fit()
    again.config.max_steps = None
    again.fit()
    vars(again._train_stream.reader).update(_iterator=None)
    assert_same([again], whole)


@forks
def test_batches_in_any_order_are_told_of(caplog):
    trained(lambda: loader_of(Resumable(), 2, in_order=False), [3], epochs=1)
    assert caplog.text.count("in_order=False: its batches come as the workers get ready") == 1


# ---- data sets with indices ----


class Noise:
    """A collate_fn that draws."""

    def __call__(self, samples):
        batch = collate(samples)
        return {"x": batch["x"] + torch.rand(()) + random.random(), "y": batch["y"]}


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_function_that_draws(workers):
    """Of samples in memory, for which nothing else draws."""

    def make():
        return loader_of(SAMPLES, workers, workers > 0, collate_fn=Noise(), shuffle=True)

    whole = trained(make, epochs=2)
    assert len({value for batch in seen(whole) for value in batch}) == 2 * 23
    assert_same(trained(make, [3, 12, 14], epochs=2), whole)


@pytest.mark.parametrize(("kind", "warnings"), [("its own generator", 1), ("global generator", 0)])
def test_a_sampler_that_keeps_something_is_told_of(caplog, kind, warnings):
    class Order(list):
        own = random.Random(1)

        def __iter__(self):
            return iter((self.own if kind == "its own generator" else random).sample(range(23), 23))

    trained(lambda: loader_of(SAMPLES, sampler=Order(range(23))), [3], epochs=1)
    assert caplog.text.count("the sampler gives another order each time") == warnings


class Augmented(list):
    """Noise from a generator of its own, or of a transform's."""

    def __init__(self, kind):
        super().__init__(SAMPLES)
        rng = {"numpy": np.random.default_rng(0), "python": random.Random(0), "torch": torch.Generator()}.get(kind)
        self.transforms = [SimpleNamespace(rng=rng)]

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        rng = self.transforms[0].rng
        noise = torch.rand((), generator=rng) if isinstance(rng, torch.Generator) else (rng or random).random()
        return x + float(noise), y


@pytest.mark.parametrize(("kind", "warnings"), [("numpy", 1), ("python", 1), ("torch", 1), ("global", 0)])
def test_a_data_set_with_generators_of_its_own_is_told_of(caplog, kind, warnings):
    def make():
        return loader_of(Augmented(kind), shuffle=True)

    whole, stopped = trained(make, epochs=2), trained(make, [3, 15], epochs=2)
    assert (seen(whole) == seen(stopped)) is not bool(warnings)
    text = "Augmented keeps random generators of its own (transforms.rng), whose states no checkpoint holds"
    assert caplog.text.count(text) == 2 * warnings  # in each start that goes on


# ---- two processes ----


class Shares(Resumable):
    """Two thirds of the samples for rank 0, which then has more batches than rank 1."""

    splits_itself = True
    beginnings = 0  # how often the first sample was read

    def part(self):
        rank = dist.get_rank()
        return [index for i, index in enumerate(super().part()) if (i % 3 == 2) == rank]

    def __iter__(self):
        Shares.beginnings += self.first == 0
        return super().__iter__()


def train_on_two_ranks(rank, folder):
    # 8 batches of rank 0, 4 of rank 1: stopped before and after rank 1 has come to its end, at the end, and after it
    found = {}
    for name, stops in {"whole": [], "stopped": [2, 6, 8, 10]}.items():
        Shares.beginnings = 0
        run = trained(lambda: loader_of(Shares()), stops, epochs=2, output_path=str(folder))
        weights, steps = weights_of(run[-1].model), run[-1].total_steps_done
        found[name] = {"seen": seen(run), "weights": weights, "steps": steps, "beginnings": Shares.beginnings}
    return found


def test_two_ranks_that_read_parts_of_other_sizes(tmp_path):
    ranks = on_two_ranks(tmp_path, train_on_two_ranks, in_a_group=True)
    for found in ranks:
        assert found["whole"]["steps"] == found["stopped"]["steps"] == 2 * 8
        assert found["whole"]["seen"] == found["stopped"]["seen"]
        assert found["stopped"]["beginnings"] == 2  # of the epochs: nothing else was read again
        assert_same_weights(found["whole"]["weights"], found["stopped"]["weights"])
    assert_same_weights(ranks[0]["whole"]["weights"], ranks[1]["whole"]["weights"])

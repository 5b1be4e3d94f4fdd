"""Gradients through DistributedDataParallel: every way of training on two ranks against one rank, and what is sent."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from tests.trainer.toys import Toy, ToyConfig, ToyGan, build, collate, make_samples
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs
from trainer.distributed import Ranks
from trainer.reducer import Reducers


class Wide(Toy):
    """With a layer that some samples use, one that is used in every other step only, and one that nobody uses."""

    def __init__(self, config):
        super().__init__(config)
        self.unused, self.sometimes, self.even = (nn.Linear(config.features, 1) for _ in range(3))
        self.calls = 0

    def train_step(self, batch, criterion):
        self.calls += self.training
        x = batch["x"]
        prediction = self.layer(x)
        chosen = x[:, :1] > 0.8
        if chosen.any():  # on one rank, or on both, or on none
            prediction = prediction + torch.where(chosen, self.sometimes(x), 0.0)
        if self.calls % 2:  # accumulated by two: in the first of the two batches
            prediction = prediction + self.even(x)
        return {}, {"loss": criterion(prediction.squeeze(1), batch["y"])}


class Deep(Toy):
    """Recomputes its middle in the backward pass."""

    def __init__(self, config):
        super().__init__(config)
        self.first, self.middle = nn.Linear(config.features, 8), nn.Linear(8, config.features)

    def train_step(self, batch, criterion):
        x = checkpoint(lambda x: self.middle(torch.tanh(self.first(x))), batch["x"], use_reentrant=False)
        return {}, {"loss": criterion(self.layer(x).squeeze(1), batch["y"])}


class Reentrant(Deep):
    """Recomputes in a backward pass inside of the backward pass, one layer several times."""

    def train_step(self, batch, criterion):
        x = batch["x"].requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda x: self.middle(torch.tanh(self.first(x))), x, use_reentrant=True)
        return {}, {"loss": criterion(self.layer(x).squeeze(1), batch["y"])}

    def eval_step(self, batch, criterion):
        return super().train_step(batch, criterion)


class Thawing(Deep):
    """Its last layer is frozen in the first epoch, its first from the second on."""

    def on_epoch_start(self, trainer):
        self.layer.requires_grad_(trainer.epochs_done > 0)
        self.first.requires_grad_(trainer.epochs_done == 0)


class FrozenInside(ToyGan):
    """Each pass freezes what it does not train, as GANs often do."""

    def train_step(self, batch, criterion, optimizer_idx):
        self.generator.requires_grad_(optimizer_idx == 1)
        self.disc.requires_grad_(optimizer_idx == 0)
        if optimizer_idx == 1:
            batch["fake"] = self.generator(batch["x"])
        return super().train_step(batch, criterion, optimizer_idx)

    def eval_step(self, batch, criterion, optimizer_idx):
        return super().train_step({**batch, "fake": self.generator(batch["x"])}, criterion, optimizer_idx)


class Choosy(ToyGan):
    """Skips batches, and the generator in some of them; what it skips depends on the samples."""

    def train_step(self, batch, criterion, optimizer_idx):
        first = batch["x"][0, 0]
        if self.training and (first > 0.7 or (optimizer_idx == 1 and first > 0.0)):
            batch["fake"] = None
            return None, None
        if optimizer_idx == 1:
            batch["fake"] = self.generator(batch["x"])
        return super().train_step(batch, criterion, optimizer_idx)


ADAM = {"optimizer": "AdamW", "optimizer_params": {"weight_decay": 0.3}, "lr": 0.02}  # decay tells None from zero
CASES = {
    "unused": {"model_class": Wide, **ADAM},
    "unused, accumulated": {"model_class": Wide, "args": {"grad_accum_steps": 2}, **ADAM},
    "clipped": {"model_class": Wide, "grad_clip": 0.2},
    "recomputed": {"model_class": Deep, **ADAM},
    "recomputed, reentrant": {"model_class": Reentrant, "overlap_gradients": False, **ADAM},
    "thawing": {"model_class": Thawing, **ADAM},
    "gan": {"model_class": ToyGan, **ADAM},
    "gan, frozen by itself": {"model_class": FrozenInside, "args": {"grad_accum_steps": 2}, **ADAM},
    "bf16": {"model_class": Wide, "mixed_precision": True, "precision": "bf16", **ADAM},
    "fp16": {"model_class": ToyGan, "mixed_precision": True, "precision": "fp16", **ADAM},
}
# fp32: an update adds up at most 4 samples in another order, an error of about 4 * 2^-24 of the largest term, of which
# Adam makes up to lr * 1e-2 where a gradient is nearly zero; through 9 updates. bf16 rounds to 2^-9, fp16 to 2^-11.
TOLERANCES = {"bf16": {"rtol": 2e-2, "atol": 1e-2}, "fp16": {"rtol": 5e-3, "atol": 2e-3}}
FP32 = {"rtol": 1e-4, "atol": 1e-5}


def train(name: str, world_size: int, folder: Path, **settings) -> dict:
    """Train on 11 samples in global batches of 4; of the last batch, rank 0 has two samples and rank 1 one."""
    size = 4 // world_size
    args = TrainerArgs(**settings.pop("args", {}))
    trainer = build(
        settings.pop("model_class"),
        train=11,
        evaluation=5,
        args=args,
        config=ToyConfig(epochs=3, batch_size=size, eval_batch_size=size, print_step=1, output_path=str(folder / name)),
        **settings,
    )
    if trainer.precision.scaling:  # with torch's 2^16, half of these few updates overflow
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer.fit()
    return result_of(trainer)


def result_of(trainer) -> dict:
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizer],
        "losses": trainer.keep_avg_train.means,
        "steps": trainer.total_steps_done,
    }


def train_choosy(rank: int | None, folder: Path) -> dict:
    """Batches of two samples: one for each rank, or two that one rank accumulates."""
    samples = make_samples(24)
    batches = [collate(samples[i : i + 2]) for i in range(0, 24, 2)]
    own = batches if rank is None else batches[rank::2]
    sampler = DistributedSampler(own, num_replicas=1, rank=0, shuffle=False)  # it is split already
    loader = DataLoader(own, batch_size=1, sampler=sampler, collate_fn=lambda batches: dict(batches[0]))
    args = TrainerArgs(grad_accum_steps=2 if rank is None else 1)
    trainer = build(
        Choosy,
        args=args,
        train_loader=loader,
        run_eval=False,
        epochs=3,
        output_path=str(folder / f"choosy{rank}"),
        **ADAM,
    )
    trainer.fit()
    return result_of(trainer)


def profile(trainer) -> list[tuple[str, float, float, int]]:
    """(name, start, end, bytes) of all that happens in an epoch, in the order of the starts."""
    trainer.open_run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        trainer.train_epoch()
    events = []
    for event in profiler.events():
        size = sum(torch.Size(shape).numel() for shape in event.input_shapes) if "gloo:" in event.name else 0
        events.append((event.name, event.time_range.start, event.time_range.end, 4 * size))
    return sorted(events, key=lambda event: event[1])


def bytes_sent(model_class, accumulated: int, folder: Path) -> int:
    """What a rank hands to the sums of gradients in an epoch of two updates."""
    args = TrainerArgs(grad_accum_steps=accumulated)
    settings = {"features": 500, "epochs": 3, "batch_size": 2, "lr": 0.0, "output_path": str(folder)}
    samples = {"train_samples": make_samples(8 * accumulated, 500), "eval_samples": make_samples(4, 500)}
    trainer = build(model_class, args=args, config=ToyConfig(**settings), **samples)
    trainer.open_run()
    trainer.train_epoch()  # in which the reducers are built
    trainer.epochs_done, trainer.batches_done = 1, 0
    events = profile(trainer)
    assert trainer.total_steps_done == 4
    return sum(size for name, _, _, size in events if name == "gloo:all_reduce")


class Stack(Toy):
    """Layers of 1 MB each: several buckets."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(64)))
        self.layer = nn.Linear(512, 1)

    def train_step(self, batch, criterion):
        x = self.layers(nn.functional.pad(batch["x"], (0, 509)))
        return {}, {"loss": criterion(self.layer(x).squeeze(1), batch["y"])}


def overlap(folder: Path) -> tuple[float, float]:
    """When the first sum of gradients began, and when the last layer's backward pass did."""
    trainer = build(Stack, train=4, config=ToyConfig(epochs=1, batch_size=2, lr=1e-5, output_path=str(folder)))
    events = profile(trainer)
    sums = [start for name, start, _, size in events if name == "gloo:all_reduce" and size > 10**6]
    backward = [start for name, start, _, _ in events if name == "AddmmBackward0"]
    return sums[0], backward[-1]


def repeat(folder: Path) -> list[float]:
    """A hundred trainings in this process, with GANs, accumulation, unused parameters and a short last batch."""
    found = []
    for i in range(100):
        model_class, k = ((ToyGan, 1), (ToyGan, 2), (Wide, 2), (FrozenInside, 1))[i % 4]
        settings = {"epochs": 1, "batch_size": 2, "run_eval": False, "save_checkpoints": False, **ADAM}
        args = TrainerArgs(grad_accum_steps=k)
        trainer = build(model_class, train=11, args=args, output_path=str(folder / "repeated"), **settings)
        trainer.fit()
        found.append(sum(float(p.double().sum()) for p in trainer.model.parameters()))
    return found


def on_a_rank(rank: int, folder: Path) -> dict:
    results = {name: train(name, 2, folder, **settings) for name, settings in CASES.items()}
    results["choosy"] = train_choosy(rank, folder)
    results["bytes"] = {
        name: bytes_sent(model_class, k, folder)
        for name, model_class, k in (("plain", Toy, 1), ("accumulated", Toy, 4), ("gan", ToyGan, 1))
    }
    results["overlap"] = overlap(folder)
    results["repeated"] = repeat(folder)
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What both ranks found, case by case."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), on_a_rank, in_a_group=True)


def assert_equal(first: dict, second: dict) -> None:
    """Bitwise, optimizer states too."""
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    for states, others in zip(first["optimizers"], second["optimizers"]):
        assert states.keys() == others.keys()
        for key, state in states.items():
            assert all(torch.equal(value, others[key][name]) for name, value in state.items() if value is not None)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank_with_the_joint_batch(two_ranks, name, tmp_path):
    alone = train(name, 1, tmp_path, **CASES[name])
    first, second = (found[name] for found in two_ranks)
    assert_equal(first, second)
    assert first["steps"] == alone["steps"] == (9 if "args" not in CASES[name] else 6)
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, **TOLERANCES.get(name, FP32))
    # a parameter that nobody uses has no gradient, and no state
    assert [states.keys() for states in first["optimizers"]] == [states.keys() for states in alone["optimizers"]]


def test_batches_that_a_rank_skips(two_ranks, tmp_path):
    alone = train_choosy(None, tmp_path)
    first, second = (found["choosy"] for found in two_ranks)
    assert_equal(first, second)
    assert first["steps"] == alone["steps"] == 18
    for key, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, **FP32)


def test_only_the_last_of_accumulated_batches_is_sent_and_each_gradient_once(two_ranks):
    layer, disc = 501, 2
    for found in two_ranks:
        sent = found["bytes"]
        # two updates; besides the gradients, the loss, and a map of which parameters were used
        assert sent["plain"] == 2 * 4 * (layer + 1 + 3)
        assert sent["accumulated"] == sent["plain"]
        assert sent["gan"] == 2 * 4 * (layer + disc + 2 * (1 + 3))


def test_sums_begin_before_the_backward_pass_ends(two_ranks):
    for found in two_ranks:
        first_sum, last_layer = found["overlap"]
        assert first_sum < last_layer


def test_a_hundred_trainings(two_ranks):
    first, second = (found["repeated"] for found in two_ranks)
    assert first == second
    assert all(len(set(first[kind::4])) == 1 for kind in range(4))


def train_on_three(rank: int, folder: Path) -> dict:
    trainer = build(Wide, train=13, config=ToyConfig(epochs=2, batch_size=2, output_path=str(folder / "three")), **ADAM)
    trainer.fit()
    return result_of(trainer)


def test_three_ranks(tmp_path):
    first, second, third = on_two_ranks(tmp_path, train_on_three, ranks=3, in_a_group=True)
    assert_equal(first, second)
    assert_equal(first, third)
    config = ToyConfig(epochs=2, batch_size=6, output_path=str(tmp_path / "one"))
    alone = build(Wide, train=13, config=config, **ADAM)
    alone.fit()
    for key, weight in alone.model.state_dict().items():
        torch.testing.assert_close(first["weights"][key], weight, **FP32)


class Detached(Toy):
    """Forgets the graph."""

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        return outputs, {"loss": losses["loss"].detach()}


def fail(rank: int, folder: Path) -> str:
    with pytest.raises(RuntimeError) as error:
        build(Detached, output_path=str(folder / "detached")).fit()
    return str(error.value)


def test_a_loss_without_a_graph_is_an_error_as_on_one_rank(tmp_path):
    found = on_two_ranks(tmp_path, fail, in_a_group=True)
    assert all("does not require grad" in text for text in found)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Reducers(model, [optimizer], Ranks(), torch.device("cpu"))
    with pytest.raises(ValueError, match="1: sparse=True: its gradients cannot be summed over ranks"):
        Reducers(model, [optimizer], Ranks(0, 2), torch.device("cpu"))

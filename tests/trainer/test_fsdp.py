"""strategy: fsdp on two ranks, against one rank on the joint batch and against ddp: weights, checkpoints and memory."""

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.trainer import test_several_ranks as several_ranks
from tests.trainer.toys import Toy, ToyConfig, ToyGan, build
from tests.trainer.two_ranks import on_two_ranks
from trainer import TrainerArgs, fsdp, sharded
from trainer.checkpoint import check_finite, load_checkpoint, state_of
from trainer.optimizers import build_optimizers


class Deep(Toy):
    """Blocks that are gathered one by one, tied and unused weights, and a recurrent layer."""

    width = 5  # of which one rank has three, and the other two

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(config.features, self.width)
        self.blocks = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(3))
        self.again = nn.Linear(self.width, self.width)
        self.again.weight = self.blocks[2].weight
        self.unused = nn.Linear(self.width, self.width)
        self.rnn = nn.GRU(self.width, self.width, batch_first=True)
        self.last = nn.Linear(self.width, 1)

    def fsdp_modules(self):
        return [self.blocks[0], self.blocks[1], self.rnn]

    def inference(self, x):
        hidden = self.first(self.dropout(x))
        for block in (*self.blocks, self.again):
            hidden = hidden + torch.tanh(block(hidden))
        return {"prediction": self.last(self.rnn(hidden.unsqueeze(1))[0]).flatten()}

    def train_step(self, batch, criterion):
        prediction = self.inference(batch["x"])["prediction"]
        return {"prediction": prediction}, {"loss": criterion(prediction, batch["y"])}


class Shown(Deep):
    """Is run by hooks, on rank 0 alone."""

    def eval_log(self, batch, outputs, logger, steps):
        self.inference(batch["x"])

    def test_run(self, trainer):
        for _ in range(3):
            self.said = self.inference(torch.ones(2, 3))["prediction"]


class Thawing(Deep):
    """Trains a layer from the second epoch on, skips every fifth batch, and is called by a hook in between."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks[0].requires_grad_(False)

    def on_epoch_start(self, trainer):
        self.blocks[0].requires_grad_(trainer.epochs_done > 0)
        self.steps = 0

    def forward(self, x):
        return self.inference(x)["prediction"] + self.last.bias

    def train_step(self, batch, criterion):
        self.steps += self.training
        found = super().train_step(batch, criterion)
        return (None, None) if self.training and self.steps % 5 == 2 else found

    @torch.no_grad()
    def before_gradient_clipping(self):
        self(torch.ones(2, 3))


class DeepGan(ToyGan):
    """Its generator is gathered by itself, its discriminator with the rest."""

    def fsdp_modules(self):
        return [self.generator]


class Wide(Deep):
    """Large enough for its odd values not to count."""

    width = 64


class Sometimes(Deep):
    """One of its weights is used on rank 1 alone."""

    def inference(self, x):
        found = super().inference(x)["prediction"]
        return {"prediction": found + (self.unused.bias.sum() if os.environ["RANK"] == "1" else 0.0)}


class Deferred(several_ranks.Spoiled):
    """As on a GPU: the device decides about an update, and the host hears of it later."""

    def on_init_end(self, trainer):
        trainer.guard.reads_are_free = False


class Skipping(Toy):
    """Skips a batch on rank 1 alone."""

    def train_step(self, batch, criterion):
        return (None, None) if os.environ["RANK"] == "1" else super().train_step(batch, criterion)


class Wandering(Deep):
    """Runs other blocks on rank 1."""

    def inference(self, x):
        block = self.blocks[int(os.environ["RANK"])]
        return {"prediction": self.last(block(self.first(x))).flatten()}


# the global batch is the same for any number of ranks; of 13 samples in batches of 4, the last leaves rank 1 with none
CASES = {
    "thawing": {"model_class": Thawing, "args": {"grad_accum_steps": 2}},
    "accumulated": {"model_class": Deep, "optimizer": "AdamW", "grad_clip": 0.3, "args": {"grad_accum_steps": 2}},
    "shown": {"model_class": Shown, "ema_decay": 0.5, "use_grad_scaler": True, "args": {"start_with_eval": True}},
    "gan": {"model_class": DeepGan, "lr": 0.02, "optimizer": "AdamW", "args": {"grad_accum_steps": 2}},
}
# what two ranks compute in the same way
AS_DDP = {
    # nothing but the training comes after an evaluation
    "averaged": {"model_class": Deep, "dropout": 0.5, "optimizer": "AdamW", "ema_decay": 0.5, "save_best_after": 100},
    "bf16": {"model_class": Sometimes, "optimizer": "AdamW", "mixed_precision": True, "precision": "bf16"},
}
FAILING = {
    "skipping": ({"model_class": Skipping}, "Skipping.train_step skipped a batch on some ranks only"),
    "wandering": ({"model_class": Wandering}, "Wandering.train_step ran other blocks on some ranks"),
    "manual": ({"model_class": several_ranks.Manual}, "strategy='fsdp' with Manual.optimize"),
    "optimizer": ({"optimizer": "Adafactor"}, "strategy='fsdp' with Adafactor"),
    "fused": ({"optimizer": "SGD", "optimizer_params": {"fused": True}}, "strategy='fsdp' with SGD, fused"),
}


def train(name: str, world_size: int, folder: Path, **settings) -> dict:
    """What is found, without weights: these are in the checkpoint."""
    found = several_ranks.train(name, world_size, folder, **settings)
    del found["weights"]
    return found


def state(found: dict) -> dict:
    """The last checkpoint of a run."""
    return load_checkpoint(Path(found["folder"]) / f"checkpoint_{found['steps']}.pth")


def train_cases(rank: int, folder: Path) -> dict:
    """All cases, on one of two ranks."""
    run = functools.partial(train, world_size=2, folder=folder, strategy="fsdp")
    results = {name: run(name, **settings) for name, settings in CASES.items()}
    for name, settings in AS_DDP.items():
        results[name] = run(name, **settings)
        results[f"{name} ddp"] = train(f"{name} ddp", 2, folder, **settings)
    dropping = {"model_class": Deep, "dropout": 0.5, "optimizer": "AdamW", "ema_decay": 0.5}
    results["whole"] = run("whole", **dropping)
    first = run("parts", max_steps=6, **dropping)
    dist.barrier()  # until the checkpoint is written
    results["parts"] = run("parts", args={"continue_path": first["folder"]}, **dropping)
    results["nan"] = run("nan", model_class=several_ranks.Spoiled)
    results["nan skipped"] = run("nan skipped", model_class=several_ranks.Spoiled, nan_policy="skip")
    fused = {"optimizer": "AdamW", "optimizer_params": {"fused": True}, "print_step": 100}
    results["nan deferred"] = run("nan deferred", model_class=Deferred, **fused)
    results["handed over"] = run("handed over", max_steps=3, **HANDED_OVER)
    results["parts of it"] = look_inside(folder)
    for name, (settings, _) in FAILING.items():
        with pytest.raises(ValueError, match="strategy='fsdp'") as error:
            run(name, **settings)
        results[name] = str(error.value)
    return results


def look_inside(folder: Path) -> dict:
    """How large a rank's part is, and what rank 0 has when it is alone."""
    rank = int(os.environ["RANK"])
    settings = {"optimizer": "AdamW", "output_path": str(folder), "train": 4, "epochs": 1}
    trainer = build(Wide, strategy="fsdp", seed=rank, **settings)
    whole = sum(p.numel() for p in trainer.model.parameters())
    with trainer.gathered():
        alone = [p.detach().clone() for p in trainer.model.parameters() if not sharded.is_sharded(p)]
    fused = {
        name: build_optimizers(trainer.model, ToyConfig(optimizer=name), torch.device("cuda"))[0].defaults["fused"]
        for name in ("SGD", "AdamW")
    }
    trainer.fit()
    own = sum(sharded.local(p).numel() for p in trainer.model.parameters())
    states = trainer.optimizer[0].state.values()
    moments = sum(sharded.local(s[name]).numel() for s in states for name in ("exp_avg", "exp_avg_sq"))
    saved = state_of(trainer)["model"]["last.weight"]
    if rank == 1:
        sharded.local(trainer.model.first.bias)[-1] = float("inf")
    state = state_of(trainer)
    if rank == 0:  # which writes
        with pytest.raises(FloatingPointError, match=r"weight first.bias: 1 of 64 values"):
            check_finite(state, {"first.bias"})
    return {"whole": whole, "own": own, "moments": moments, "alone": alone, "fused": fused, "saved": saved}


HANDED_OVER = {"model_class": Deep, "optimizer": "AdamW", "lr": 0.01, "ema_decay": 0.5, "grad_clip": 1.0}


def continued(run: str, steps: int, world_size: int = 2, **settings) -> tuple[bool, Path]:
    """Loads a run and trains it on; whether what was loaded is what the file holds, bit for bit."""
    args, size = TrainerArgs(continue_path=run), 4 // world_size
    options = {"batch_size": size, "eval_batch_size": size, "epochs": 3, "max_steps": steps}
    trainer = build(train=13, evaluation=7, args=args, **options, **HANDED_OVER, **settings)
    trainer.open_run()
    file = load_checkpoint(Path(run) / f"checkpoint_{trainer.total_steps_done}.pth")
    loaded = state_of(trainer)
    same = not trainer.ranks.is_main or all(_equal(file[part], loaded[part]) for part in ("model", "optimizer", "ema"))
    trainer.fit()
    trainer.ranks.barrier()  # until the checkpoint is written
    return same


def _equal(a: object, b: object) -> bool:
    """The same types, keys, and tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def continue_on_two_ranks(rank: int, folder: Path, run: str, restored: str) -> dict:
    """With ddp, then with fsdp; and a new run from weights of another size."""
    found = [continued(run, 9), continued(run, 12, strategy="fsdp")]
    trainer = build(Toy, strategy="fsdp", args=TrainerArgs(restore_path=restored), output_path=str(folder))
    trainer.open_run()
    return {"loaded": found, "restored": sharded.full_state(dict(trainer.model.state_dict()))}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What both ranks found, case by case."""
    return on_two_ranks(tmp_path_factory.mktemp("fsdp"), train_cases, in_a_group=True)


@pytest.mark.parametrize("name", CASES)
def test_two_sharded_ranks_are_one_rank_with_the_joint_batch(two_ranks, name, tmp_path):
    alone = train(name, 1, tmp_path, **CASES[name])
    first, second = (found[name] for found in two_ranks)
    expected, found = state(alone), state(first)
    for key, weight in expected["model"].items():
        # fp32: sums of at most twelve terms in another order, through at most twelve updates
        torch.testing.assert_close(found["model"][key], weight, rtol=1e-4, atol=1e-5)
    for part in ("train", "eval"):
        assert first[part] == second[part] == pytest.approx(alone[part], rel=1e-4, abs=1e-6)
    assert first["steps"] == second["steps"] == alone["steps"]


@pytest.mark.parametrize("name", AS_DDP)
def test_sharded_is_ddp_bit_for_bit(two_ranks, name):
    found, expected = (state(two_ranks[0][key]) for key in (name, f"{name} ddp"))
    for part in ("model", "optimizer", "scaler", "averages", *["ema"] * ("ema" in expected)):
        assert _equal(found[part], expected[part]), part
    assert found["model"]._metadata == expected["model"]._metadata
    assert found["config"] == {**expected["config"], "strategy": "fsdp", "output_path": found["config"]["output_path"]}


def test_unused_weights_are_left_alone(two_ranks):
    config = ToyConfig()
    torch.manual_seed(0)
    fresh = Deep(config).unused
    found = state(two_ranks[0]["accumulated"])["model"]
    # AdamW would shrink it, with gradients of zero
    assert torch.equal(found["unused.weight"], fresh.weight)
    assert not torch.equal(state(two_ranks[0]["bf16"])["model"]["unused.bias"], fresh.bias)


def test_a_continued_run_is_the_whole_one(two_ranks):
    parts, whole = (state(two_ranks[0][name]) for name in ("parts", "whole"))
    assert parts["step"] == whole["step"] == 12
    for part in ("model", "optimizer", "ema", "rng", "averages"):
        assert _equal(parts[part], whole[part]), part


def test_nan_on_one_rank_stops_or_is_skipped_by_all(two_ranks):
    for rank in two_ranks:
        assert rank["nan"]["error"].startswith("step 3: loss is nan")
        assert rank["nan"]["steps"] == 2
        assert rank["nan deferred"]["error"].startswith("step 3: ")
        assert "gradient of layer.weight" in rank["nan deferred"]["error"]
        assert rank["nan skipped"]["skipped"] == 1
        assert rank["nan skipped"]["steps"] == 12
    assert "first in the gradient of layer.weight" in two_ranks[1]["nan"]["error"]


def test_a_rank_has_half_of_weights_and_moments(two_ranks):
    first, second = (rank["parts of it"] for rank in two_ranks)
    unused = 64 * 64 + 64 + 3 + 1  # Wide.unused and Toy.layer have no moments
    assert first["own"] + second["own"] == first["whole"]
    assert first["moments"] + second["moments"] == 2 * (first["whole"] - unused)
    for part in ("own", "moments"):
        assert second[part] <= first[part] < 1.01 * second[part]


def test_rank_0_has_the_whole_model_inside_gathered(two_ranks):
    first, second = (rank["parts of it"] for rank in two_ranks)
    expected = build(Wide, seed=0).model.parameters()
    assert all(torch.equal(p, q) for p, q in zip(first["alone"], expected, strict=True))
    assert second["alone"] == []
    assert first["saved"].shape == (1, 64)
    assert second["saved"] is None


def test_only_what_torch_computes_on_shards_is_fused(two_ranks):
    assert two_ranks[0]["parts of it"]["fused"] == {"SGD": None, "AdamW": True}


@pytest.mark.parametrize("name", FAILING)
def test_what_cannot_be_sharded_is_said_on_all_ranks(two_ranks, name):
    for rank in two_ranks:
        assert FAILING[name][1] in rank[name]
        assert "strategy='ddp'" in rank[name]


def test_a_run_goes_from_fsdp_to_one_process_to_ddp_to_fsdp(two_ranks, tmp_path):
    run = two_ranks[0]["handed over"]["folder"]
    assert continued(run, 6, world_size=1)
    small = build(Toy, features=2, epochs=1, output_path=str(tmp_path))
    small.save_checkpoint()
    restored = str(small.output_path / "checkpoint_0.pth")
    work = functools.partial(continue_on_two_ranks, run=run, restored=restored)
    found = on_two_ranks(tmp_path, work, in_a_group=True)
    assert [rank["loaded"] for rank in found] == [[True, True]] * 2
    undisturbed = train("alone", 1, tmp_path, **HANDED_OVER)
    handed = load_checkpoint(Path(run) / "checkpoint_12.pth")
    for key, weight in state(undisturbed)["model"].items():
        torch.testing.assert_close(handed["model"][key], weight, rtol=1e-4, atol=1e-5)
    for rank in found:
        assert torch.equal(rank["restored"]["layer.weight"][:, :2], small.model.layer.weight)


def test_one_rank_has_nothing_to_shard(tmp_path):
    found = train("alone", 1, tmp_path, strategy="fsdp", model_class=Deep)
    expected = train("plain", 1, tmp_path, model_class=Deep)
    assert _equal(state(found)["model"], state(expected)["model"])


def test_large_entries_of_module_lists_are_blocks_unless_they_share_weights(monkeypatch):
    model = Toy(ToyConfig())
    model.blocks = nn.ModuleList([nn.Linear(9, 9), nn.Sequential(nn.Linear(9, 9), nn.ReLU()), nn.Linear(2, 2)])
    model.shared = nn.Sequential(nn.Linear(9, 9))
    model.again = nn.Linear(9, 9)
    model.again.weight = model.shared[0].weight
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(20, 20))
    assert fsdp.blocks_of(model) == []
    monkeypatch.setattr(fsdp, "MIN_BLOCK", 90)
    assert fsdp.blocks_of(model) == [model.blocks[1][0], model.blocks[0]]
    monkeypatch.setattr(Toy, "fsdp_modules", lambda self: [self.layer, self.blocks[2]], raising=False)
    assert fsdp.blocks_of(model) == [model.blocks[2], model.layer]

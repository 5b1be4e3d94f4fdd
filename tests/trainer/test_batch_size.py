"""The largest batch size: what is found, and that the search leaves no trace in the training that follows."""

import gc
import json
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, weights_of
from trainer import TrainerArgs
from trainer.batch_size import _Trials, find_largest, fit_with_largest_batch_size, is_out_of_memory
from trainer.data.loader import build_loader
from trainer.loggers.base import DashboardLogger
from trainer.seeding import capture_rng_state, seed_everything

MEMORY = {"limit": 0, "tried": []}  # not on the model: there the search would put it back


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    MEMORY.update(limit=10**9, tried=[])
    gc.freeze()  # every trial ends with a garbage collection, which need not look at all that is imported
    yield
    gc.unfreeze()


def allocate(size: int) -> None:
    """What the device does when so many samples come."""
    MEMORY["tried"].append(size)
    if size > MEMORY["limit"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")


class Limited(Toy):
    """Draws from all generators, and has all that a model may have beside its weights."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.features)
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.steps, self.cache = 0, None

    def train_step(self, batch, criterion):
        if self.training:
            self.steps += 1
            self.hidden = self.hidden + random.random() + float(np.random.rand())
            self.cache = torch.rand(len(batch["x"]))
            allocate(len(batch["x"]))
        x = batch["x"] if len(batch["x"]) == 1 else self.norm(batch["x"])  # of one sample there is no variance
        prediction = self.layer(self.dropout(x)).squeeze(1) + 0 * self.hidden
        return {"prediction": prediction}, {"loss": criterion(prediction, batch["y"])}


class LimitedGan(ToyGan):
    """Two optimizers; the memory goes in the second's pass."""

    def train_step(self, batch, criterion, optimizer_idx):
        if self.training and optimizer_idx == 1:
            allocate(len(batch["x"]))
        return super().train_step(batch, criterion, optimizer_idx)


class LimitedManual(Limited):
    """Optimizes by itself."""

    def optimize(self, batch, trainer):
        outputs, losses = self.train_step(batch, trainer.criterion[0])
        self.scaled_backward(losses["loss"], trainer)
        trainer.optimizer[0].step()
        trainer.optimizer[0].zero_grad()
        return outputs, losses


class TestTheSearch:
    @pytest.mark.parametrize("start", [1, 3, 64, 200, 2048])
    def test_finds_every_size_up_to_256_exactly(self, start):
        for limit in range(257):
            assert find_largest(lambda size, limit=limit: size <= limit, start, 10**6) == limit

    @given(limit=st.integers(1, 10**6), start=st.integers(1, 10**5), samples=st.integers(1, 10**6))
    def test_finds_others_within_an_eighth_of_a_thousandth(self, limit, start, samples):
        tried = []

        def fits(size):
            tried.append(size)
            return size <= limit

        found, best = find_largest(fits, start, samples), min(limit, samples)
        assert best - best / 128 < found + 1 <= best + 1
        assert found == samples or limit < samples
        assert len(tried) == len(set(tried)) <= 30
        assert min(tried) >= 1
        assert max(tried) <= samples

    @pytest.mark.parametrize(
        ("start", "limit", "samples", "expected"),
        [
            (8, 20, 100, [8, 16, 32, 24, 20, 22, 21]),
            (64, 5, 100, [64, 32, 16, 8, 4, 6, 5]),
            (8, 100, 20, [8, 16, 20]),
            (2048, 100, 20, [20]),
            (2, 0, 20, [2, 1]),
        ],
    )
    def test_doubles_halves_and_bisects(self, start, limit, samples, expected):
        tried = []
        find_largest(lambda size: tried.append(size) or size <= limit, start, samples)
        assert tried == expected

    @pytest.mark.parametrize("limit", [1, 2, 37, 64, 99, 100, 150])
    def test_tries_real_updates(self, limit):
        MEMORY["limit"] = limit
        trainer = build(Limited, train=100, epochs=1, eval_batch_size=3, lr=0.01)
        fit_with_largest_batch_size(trainer, 16)
        assert trainer.config.batch_size == min(limit, 100)
        assert trainer.config.eval_batch_size == 3
        assert trainer.total_steps_done == -(-100 // min(limit, 100))
        assert set(MEMORY["tried"][-trainer.total_steps_done :]) <= {min(limit, 100), 100 % limit}

    def test_a_size_is_tried_by_two_updates_of_accumulated_batches(self):
        MEMORY["limit"] = 8
        trainer = build(Limited, train=100, epochs=1, args=TrainerArgs(grad_accum_steps=3))
        fit_with_largest_batch_size(trainer, 8)
        # 9 is tried between 8, which fits, and 16; what does not fit fails at once
        assert MEMORY["tried"][:11] == [8] * 6 + [16, 12, 10, 9] + [8]

    def test_an_epoch_of_one_batch_is_tried_by_two_updates_too(self):
        trainer = build(Limited, train=5, epochs=1, args=TrainerArgs(grad_accum_steps=3))
        fit_with_largest_batch_size(trainer)
        assert MEMORY["tried"] == [5, 5] + [5]

    def test_counts_the_samples_of_the_loader(self):
        class Choosy(Limited):
            def get_data_loader(self, config, is_eval, samples, verbose):
                return super().get_data_loader(config, is_eval, samples[:7], verbose)

        trainer = build(Choosy, train=100, epochs=1)
        fit_with_largest_batch_size(trainer)
        assert trainer.config.batch_size == 7

    def test_incomplete_batches_that_are_dropped(self):
        class Dropping(Limited):
            def get_data_loader(self, config, is_eval, samples, verbose):
                loader = super().get_data_loader(config, is_eval, samples, verbose)
                size = config.eval_batch_size if is_eval else config.batch_size
                options = {"collate_fn": loader.collate_fn, "seed": 0, "shuffle": False, "drop_last": True}
                return build_loader(samples, size, **options)

        trainer = build(Dropping, train=50, epochs=1)
        fit_with_largest_batch_size(trainer)
        assert (trainer.config.batch_size, trainer.total_steps_done) == (50, 1)

    @pytest.mark.parametrize("budget", [40, 100, 137])
    def test_the_longest_samples_are_tried_together(self, budget):
        """In another epoch than the first they may come together, and nothing else needs as much memory."""
        lengths = [1 + i % 10 for i in range(60)]

        class Speech(Toy):
            def train_step(self, batch, criterion):
                if self.training and batch["x"].numel() > budget:
                    raise torch.OutOfMemoryError("out of memory")
                prediction = self.layer(batch["x"].sum(1, keepdim=True).expand(-1, 3)).squeeze(1)
                return {}, {"loss": criterion(prediction, batch["y"])}

            def get_data_loader(self, config, is_eval, samples, verbose):
                return build_loader(
                    [torch.ones(n) for n in lengths],
                    config.batch_size,
                    collate_fn=lambda xs: {"x": pad_sequence(xs, batch_first=True), "y": torch.zeros(len(xs))},
                    seed=0,
                    shuffle=not is_eval,
                    lengths=lengths,
                )

        trainer = build(Speech, epochs=30, lr=0.001)
        fit_with_largest_batch_size(trainer)
        # six samples have the greatest length of 10, and six each have 9, 8 ...: the longest is among any choice
        assert trainer.config.batch_size == budget // 10

    def test_other_loaders_are_tried_as_they_are(self):
        class Plain(Limited):
            def get_data_loader(self, config, is_eval, samples, verbose):
                collate = super().get_data_loader(config, is_eval, samples, verbose).collate_fn
                return torch.utils.data.DataLoader(samples, config.batch_size, shuffle=True, collate_fn=collate)

        MEMORY["limit"] = 13
        trainer = build(Plain, train=40, epochs=1)
        fit_with_largest_batch_size(trainer)
        assert trainer.config.batch_size == 13


STEP_LR = {"lr_scheduler": "StepLR", "lr_scheduler_params": {"step_size": 2}}
CASES = {
    "dropout": (Limited, {"dropout": 0.5}, {}),
    "momentum": (Limited, {"optimizer_params": {"momentum": 0.9}, "lr": 0.01}, {}),
    "adamw and a schedule": (
        Limited,
        {"optimizer": "AdamW", **STEP_LR},
        {"scheduler_after_epoch": False},
    ),
    "averaged weights": (Limited, {"ema_decay": 0.9, "early_stopping_patience": 2}, {}),
    "loss scaling": (Limited, {"optimizer": "AdamW", "use_grad_scaler": True}, {}),
    "skipping": (Limited, {"nan_policy": "skip"}, {}),
    "gan": (LimitedGan, {"optimizer": "AdamW"}, {}),
    "own optimize": (
        LimitedManual,
        {"optimizer": "AdamW", "lr_scheduler": "StepLR"},
        {"lr_scheduler_params": {"step_size": 1}},
    ),
}


def make(case: str, **values):
    """A freshly seeded trainer of a case."""
    model_class, first, more = CASES[case]
    seed_everything(5)
    return build(model_class, train=30, epochs=3, args=TrainerArgs(grad_accum_steps=2), **{**first, **more, **values})


class TestNoTrace:
    @pytest.mark.parametrize("case", CASES)
    def test_the_fit_is_that_of_a_training_with_this_size(self, case):
        MEMORY["limit"] = 7
        searched, plain, ends = make(case), make(case, batch_size=7), []
        for trainer, fit in ((searched, fit_with_largest_batch_size), (plain, lambda trainer: trainer.fit())):
            seed_everything(6)
            fit(trainer)
            ends.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        assert searched.config.batch_size == 7
        assert ends[0] == ends[1]
        assert_same_weights(weights_of(searched.model), weights_of(plain.model))
        assert searched.keep_avg_train.means == plain.keep_avg_train.means
        assert searched.keep_avg_eval.means == plain.keep_avg_eval.means
        assert searched.best_loss == plain.best_loss
        first, second = ([o.state_dict() for o in trainer.optimizer] for trainer in (searched, plain))
        assert str(first) == str(second)  # with all tensors: they are small
        if case != "gan":
            assert searched.model.steps == plain.model.steps > 0
            assert torch.equal(searched.model.hidden, plain.model.hidden)

    @pytest.mark.parametrize("case", CASES)
    def test_before_the_fit_all_is_as_it_was(self, case, monkeypatch):
        MEMORY["limit"] = 7
        trainer = make(case)
        trainer.open_run()
        before, buffers = weights_of(trainer.model), dict(trainer.model.named_buffers())
        rng = capture_rng_state()
        attributes = {name: value for name, value in vars(trainer).items() if isinstance(value, int | float | dict)}
        attributes = dict(attributes, best_loss=dict(trainer.best_loss))
        seen = []

        def fit():
            seen.append(True)
            assert [len(o.state) for o in trainer.optimizer] == [0] * len(trainer.optimizer)
            assert all(p.grad is None for p in trainer.model.parameters())
            assert all(value is buffers[name] for name, value in trainer.model.named_buffers())
            assert_same_weights(before, weights_of(trainer.model))
            assert {name: vars(trainer)[name] for name in attributes} == attributes
            assert not hasattr(trainer, "_rates")
            assert (trainer.keep_avg_train.means, trainer.train_loader) == ({}, None)
            if trainer.ema is not None:
                assert_same_weights(before, trainer.ema.state_dict()["weights"])
                assert trainer.ema.updates == 0
            assert [s and s.last_epoch for s in trainer.scheduler] in ([None], [0], [None, None])
            assert str(capture_rng_state()) == str(rng)
            if case != "gan":
                assert (trainer.model.steps, trainer.model.cache, trainer.model.seen) == (0, None, [])

        monkeypatch.setattr(trainer, "fit", fit)
        fit_with_largest_batch_size(trainer)
        assert seen == [True]

    def test_what_did_not_fit_is_freed(self):
        """A failed update leaves its tensors in the frames of the error, in the model, and in cycles."""
        alive, last = [], [lambda: None]

        class Hoarder(Toy):
            def train_step(self, batch, criterion):
                if self.training:
                    alive.append(last[0]() is not None)
                    self.cache = torch.rand(len(batch["x"]))
                    last[0] = weakref.ref(self.cache)
                    cycle = [self.cache]
                    cycle.append(cycle)
                    allocate(len(batch["x"]))
                return super().train_step(batch, criterion)

        MEMORY["limit"] = 3
        fit_with_largest_batch_size(build(Hoarder, train=30, epochs=1), 16)
        assert MEMORY["tried"][:8] == [16, 8, 4, 2, 2, 3, 3, 3]
        # only the second update of a trial finds what the first has left
        assert alive[:8] == [False, False, False, False, True, False, True, False]

    def test_gradients_of_a_failed_update_are_gone(self, monkeypatch):
        class Late(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                if self.training and len(self.seen) % 2 == 0:  # the first batch of the window has its gradients
                    allocate(len(batch["x"]))
                return outputs, losses

        MEMORY["limit"] = 7
        trainer, seen = build(Late, train=30, args=TrainerArgs(grad_accum_steps=2)), []
        # the last trial is of 8 samples and fails
        monkeypatch.setattr(trainer, "fit", lambda: seen.extend(p.grad for p in trainer.model.parameters()))
        fit_with_largest_batch_size(trainer)
        assert (MEMORY["tried"][-1], seen) == (8, [None, None])

    def test_a_size_that_works_only_once_does_not_fit(self):
        """The optimizer's state comes with the first update."""

        class Growing(Toy):
            def on_train_step_start(self, trainer):
                state = sum(len(entry) for entry in trainer.optimizer[0].state.values())
                MEMORY["limit"] = 10 if state else 100

            def train_step(self, batch, criterion):
                if self.training:
                    allocate(len(batch["x"]))
                return super().train_step(batch, criterion)

        trainer = build(Growing, train=40, epochs=1, optimizer="AdamW", use_grad_scaler=True)
        fit_with_largest_batch_size(trainer)
        assert trainer.config.batch_size == 10

    def test_loss_scaling_does_not_skip_the_updates_of_a_trial(self):
        states = []

        class Steep(Toy):
            def train_step(self, batch, criterion):
                prediction = self.layer(batch["x"]).squeeze(1).half().float()  # gradients overflow at the first scale
                return {}, {"loss": 10 * criterion(prediction, batch["y"])}

            def on_train_step_end(self, trainer):
                states.append(len(trainer.optimizer[0].state))

        trainer = build(Steep, train=4, epochs=1, optimizer="AdamW", use_grad_scaler=True)
        fit_with_largest_batch_size(trainer)
        assert states == [2, 2] + [0]  # of the trial, which has an update with the optimizer's state; of the fit

    def test_functions_and_dashboards_hear_nothing_of_trials(self):
        class Talkative(Limited):
            def on_train_step_end(self, trainer):
                trainer.dashboard_logger.add_text("step", "", trainer.total_steps_done)

        class Recorder(DashboardLogger):
            def add_text(self, title, text, step):
                heard.append((title, step))

        heard = []
        callbacks = {"on_train_step_end": lambda trainer: heard.append(("function", trainer.total_steps_done))}
        trainer = build(Talkative, train=10, epochs=1, callbacks=callbacks)
        trainer._given_dashboard = trainer.dashboard_logger = Recorder()
        fit_with_largest_batch_size(trainer)
        assert [entry for entry in heard if entry[0] != "config"] == [("step", 1), ("function", 1)]
        assert len(MEMORY["tried"]) == 3

    def test_files(self):
        MEMORY["limit"] = 5
        trainer = build(Limited, train=10, epochs=1, save_checkpoints=False)
        fit_with_largest_batch_size(trainer)
        assert sorted(path.name for path in trainer.output_path.iterdir()) == ["config.json", "trainer_0_log.txt"]
        assert json.loads((trainer.output_path / "config.json").read_text())["batch_size"] == 5
        log = (trainer.output_path / "trainer_0_log.txt").read_text()
        for line in ("batch_size 10: out of memory", "batch_size 5: fits", "batch_size 5 is the largest that fits"):
            assert line in log


class TestErrors:
    def test_others_are_raised_as_they_are_and_all_is_put_back(self):
        class Broken(Limited):
            def train_step(self, batch, criterion):
                if self.steps == 1:
                    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
                return super().train_step(batch, criterion)

        trainer = build(Broken, train=20, batch_size=4)
        before = weights_of(trainer.model)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            fit_with_largest_batch_size(trainer)
        assert (trainer.config.batch_size, trainer.total_steps_done, trainer.model.steps) == (4, 0, 0)
        assert_same_weights(before, weights_of(trainer.model))
        assert trainer.train_loader is None
        assert "run folder: " in (trainer.output_path / "trainer_0_log.txt").read_text().splitlines()[-2]

    def test_not_even_one_sample(self):
        MEMORY["limit"] = 0
        trainer = build(Limited, train=20, batch_size=4)
        message = r"^batch_size=1 does not fit into the memory of cpu \(CUDA out of memory. .* 20.00 MiB.\): take "
        with pytest.raises(MemoryError, match=message):
            fit_with_largest_batch_size(trainer)
        assert trainer.config.batch_size == 4

    def test_a_given_loader_cannot_be_built_again(self, tmp_path):
        trainer = build(train_samples=None, train_loader=torch.utils.data.DataLoader([1, 2]))
        with pytest.raises(ValueError, match="train_loader has its batch size already: hand train_samples over"):
            fit_with_largest_batch_size(trainer)
        assert list(tmp_path.iterdir()) == []

    def test_a_wrong_start(self):
        with pytest.raises(ValueError, match="starting_batch_size=0: at least 1 is needed"):
            fit_with_largest_batch_size(build(), 0)

    def test_several_ranks(self):
        trainer = build()
        trainer.args.use_ddp = True
        with pytest.raises(ValueError, match="several ranks cannot search"):
            fit_with_largest_batch_size(trainer)


def test_a_continued_run_keeps_its_size():
    MEMORY["limit"] = 5
    first = build(Limited, train=12, epochs=4, max_steps=4, save_step=4)
    fit_with_largest_batch_size(first)
    assert (first.config.batch_size, first.batches_done) == (5, 1)
    MEMORY.update(limit=4, tried=[])
    config = ToyConfig()
    config.load_json(first.output_path / "config.json")
    config.max_steps = 5
    second = build(Limited, train=12, config=config, args=TrainerArgs(continue_path=str(first.output_path)))
    MEMORY["limit"] = 100
    fit_with_largest_batch_size(second)
    assert (second.config.batch_size, second.total_steps_done, MEMORY["tried"]) == (5, 5, [5])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.cuda.OutOfMemoryError("anything"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("HIP out of memory. Tried to allocate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.77 GB, max allowed: 18.13 GB)"), True),
        (RuntimeError("Invalid buffer size: 14.90 GB"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_refused_allocation_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_twentieth_of_a_gpu_is_left(monkeypatch):
    trainer, made = build(), []
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2000, 4000))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append((*size, str(options["device"]))))
    _Trials(trainer)
    assert made == [(100, "cuda")]

"""NaN never reaches the weights: stopped or skipped before the update, named, saved, counted."""

import math

import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import TrainerArgs
from trainer.checkpoint import list_checkpoints
from trainer.nan_guard import NanGuard, _Pending
from trainer.precision import Precision


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class BadLoss(Toy):
    """Its loss is ``bad`` in the third update (and in every one after it, with ``lasting``)."""

    bad, lasting = math.nan, False

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        n = len(self.seen)
        if self.training and (n == 3 or (self.lasting and n > 3)):
            losses["loss"] = losses["loss"] * self.bad
        return outputs, losses


class InfiniteLoss(Toy):
    """An infinite loss in the third update whose gradients are finite."""

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        bad = self.training and len(self.seen) == 3
        return outputs, {"loss": losses["loss"] + (math.inf if bad else 0.0)}


class BadGradient(Toy):
    """A finite loss in the third update whose gradient is not: sqrt'(0) is infinite."""

    def train_step(self, batch, criterion):
        outputs, losses = super().train_step(batch, criterion)
        if self.training and len(self.seen) == 3:
            losses["loss"] = losses["loss"] + (self.layer.bias * 0.0).sqrt().sum()
        return outputs, losses


def stopped(trainer) -> tuple[str, dict]:
    """Fit until the guard stops it; its message, and the weights after the last sound update."""
    trainer.callbacks.add("on_train_step_end", lambda t: sound.update(weights_of(t.model)))
    sound: dict = {}
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit()
    return str(caught.value), sound


class TestRaise:
    @pytest.mark.parametrize(
        ("model", "what"),
        [
            (BadLoss, "step 3: loss is nan, first in the gradient of layer.weight;"),
            (BadGradient, "step 3: gradient norm is nan, first in the gradient of layer.bias;"),
        ],
    )
    @pytest.mark.parametrize("settings", [{}, {"mixed_precision": True, "precision": "bf16"}, {"grad_clip": 1.0}])
    def test_stops_before_the_update_with_step_loss_and_parameter(self, model, what, settings):
        trainer = build(model, **settings)
        message, sound = stopped(trainer)
        assert message.startswith(what)
        assert "nan_policy=skip" in message
        assert_same_weights(weights_of(trainer.model), sound)  # of the second update
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())

    def test_the_batches_are_saved_as_the_loader_gave_them(self):
        trainer = build(BadLoss, args=TrainerArgs(grad_accum_steps=2), train=20)
        trainer.callbacks.add("on_train_step_start", lambda t: None)
        message, _ = stopped(trainer)
        path = trainer.output_path / "bad_batch_2.pth"
        assert str(path) in message
        saved = torch.load(path, weights_only=True)
        assert (saved["step"], saved["parameter"]) == (2, "gradient of layer.weight")
        assert [batch["x"][:, 0].tolist() for batch in saved["batches"]] == trainer.model.seen[2:4]

    def test_a_batch_that_cannot_be_saved_is_said(self):
        class Odd(BadLoss):
            def format_batch(self, batch):
                return {"x": batch["x"], "y": batch["y"]}

        def collate_odd(samples):
            return {**collate(samples), "f": lambda: 0}

        loader = torch.utils.data.DataLoader(make_samples(12), batch_size=4, collate_fn=collate_odd)
        message, _ = stopped(build(Odd, train_loader=loader))
        assert "its batches cannot be saved" in message

    def test_nothing_is_saved_and_older_checkpoints_stay(self):
        trainer = build(BadLoss, save_step=1)
        stopped(trainer)
        assert [step for step, _ in list_checkpoints(trainer.output_path)] == [1, 2]
        for _, path in list_checkpoints(trainer.output_path):
            state = torch.load(path, weights_only=True)
            assert all(value.isfinite().all() for value in state["model"].values())

    def test_a_weight_that_is_already_bad_is_named(self):
        trainer = build()

        def spoil(t):
            if t.total_steps_done == 1:
                with torch.no_grad():
                    t.model.layer.bias.fill_(math.inf)

        trainer.callbacks.add("on_train_step_end", spoil)
        message, _ = stopped(trainer)
        assert message.startswith("step 2: loss is inf, first in the weight layer.bias;")

    def test_a_loss_that_is_infinite_while_its_gradients_are_not(self):
        trainer = build(InfiniteLoss)
        message, sound = stopped(trainer)
        assert message.startswith("step 3: loss is inf;")
        assert_same_weights(weights_of(trainer.model), sound)

    def test_the_second_of_two_optimizers_stops_too(self):
        class Bad(ToyGan):
            def train_step(self, batch, criterion, optimizer_idx):
                outputs, losses = super().train_step(batch, criterion, optimizer_idx)
                if self.training and optimizer_idx == 1 and self.forwards == 2:
                    losses["loss"] = losses["loss"] / 0
                return outputs, losses

        message, _ = stopped(build(Bad, lr=0.01))
        assert message.startswith("step 2: loss is inf")

    def test_a_logged_loss_that_is_not_minimised_stops_at_the_log_point(self):
        class Bad(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                return outputs, {**losses, "ratio": losses["loss"] * math.nan}

        message, _ = stopped(build(Bad))
        assert message == "step 1: ratio is nan"

    def test_an_evaluation_loss(self):
        class Bad(Toy):
            def eval_step(self, batch, criterion):
                return {}, {"loss": torch.tensor(math.nan)}

        message, _ = stopped(build(Bad))
        assert message == "evaluation batch 1: loss is nan"


class TestSkip:
    @pytest.mark.parametrize("model", [BadLoss, BadGradient])
    def test_the_update_is_left_out_and_the_run_goes_on(self, model, caplog):
        trainer = build(model, nan_policy="skip", optimizer="AdamW", train=20, epochs=1, print_step=1)
        weights, states = [], []

        def note(t):
            weights.append(weights_of(t.model))
            states.append(str(t.optimizer[0].state_dict()))

        trainer.callbacks.add("on_train_step_end", note)
        trainer.fit()
        assert_same_weights(weights[1], weights[2])
        assert states[1] == states[2]
        assert not torch.equal(weights[3]["layer.weight"], weights[2]["layer.weight"])
        assert trainer.guard.skipped == 1
        assert "step 3: " in caplog.text
        assert "this update is skipped" in caplog.text
        assert "skipped_updates 1" in caplog.text
        assert math.isfinite(trainer.keep_avg_train.means["loss"])

    def test_the_rest_is_bitwise_a_run_that_never_saw_the_batch(self):
        samples = make_samples(20)
        bad = build(BadLoss, nan_policy="skip", train_samples=samples, epochs=1)
        bad.fit()
        order = bad.model.seen
        plain = torch.nn.Linear(3, 1)
        torch.manual_seed(0)
        plain = Toy(bad.config).layer
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        by_first = {x[0].item(): (x, y) for x, y in samples}
        for i, firsts in enumerate(order):
            if i == 2:
                continue
            x = torch.stack([by_first[f][0] for f in firsts])
            y = torch.stack([by_first[f][1] for f in firsts])
            optimizer.zero_grad()
            nn.functional.mse_loss(plain(x).squeeze(1), y).backward()
            optimizer.step()
        assert torch.equal(plain.weight, bad.model.layer.weight)

    def test_schedulers_wait(self):
        trainer = build(
            BadLoss, nan_policy="skip", lr_scheduler="StepLR", lr_scheduler_params={"step_size": 100}, epochs=2,
            scheduler_after_epoch=False,
        )  # fmt: skip
        trainer.fit()
        assert (trainer.total_steps_done, trainer.scheduler[0].last_epoch) == (6, 5)

    def test_stops_after_so_many_in_a_row(self):
        class Lasting(BadLoss):
            lasting = True

        trainer = build(Lasting, nan_policy="skip", nan_skip_limit=3)
        message, _ = stopped(trainer)
        assert message.startswith("step 5: loss is nan (bad update number 3 in a row)")
        assert trainer.guard.skipped == 2

    def test_a_good_update_in_between_begins_the_count_anew(self):
        class EveryOther(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                bad = self.training and len(self.seen) % 2 == 0
                return outputs, {"loss": losses["loss"] * (math.nan if bad else 1.0)}

        trainer = build(EveryOther, nan_policy="skip", nan_skip_limit=2)
        trainer.fit()
        assert trainer.guard.skipped == 9

    def test_batch_norm_does_not_remember_a_bad_batch(self):
        class Normed(BadLoss):
            def __init__(self, config):
                super().__init__(config)
                self.norm = nn.BatchNorm1d(3)

            def train_step(self, batch, criterion):
                x = batch["x"] * (math.nan if self.training and len(self.seen) == 2 else 1.0)
                return super().train_step({**batch, "x": self.norm(x)}, criterion)

        trainer = build(Normed, nan_policy="skip", epochs=2)
        trainer.fit()
        assert trainer.guard.skipped == 1
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
        assert trainer.model.norm.num_batches_tracked == 5

    def test_the_count_goes_on_in_a_continued_run(self):
        first = build(BadLoss, nan_policy="skip", max_steps=4)
        first.fit()
        second = build(nan_policy="skip", args=TrainerArgs(continue_path=str(first.output_path)))
        second.fit()
        assert second.guard.skipped == 1

    def test_so_many_in_a_row_are_counted_over_a_stop(self):
        class Lasting(BadLoss):
            lasting = True

        def build_one(**changes):
            return build(Lasting, nan_policy="skip", nan_skip_limit=3, **changes)

        first = build_one(max_steps=4)
        first.fit()
        second = build_one(args=TrainerArgs(continue_path=str(first.output_path)))
        second.model.seen = [[]] * 4
        message, _ = stopped(second)
        assert message.startswith("step 5: loss is nan (bad update number 3 in a row)")


class TestScaling:
    def test_overflows_are_counted_and_logged_and_are_no_nan(self, caplog):
        class Overflowing(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                return outputs, {"loss": losses["loss"] * (1e35 if len(self.seen) == 2 else 1.0)}

        trainer = build(Overflowing, mixed_precision=True, precision="fp16", epochs=1, print_step=1)
        trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trainer.fit()
        assert (trainer.precision.overflows, trainer.guard.skipped) == (1, 0)
        assert "amp_skipped 1" in caplog.text
        assert "amp_scaler 8 " in caplog.text

    def test_a_loss_that_is_nan_is_not_taken_for_an_overflow(self):
        message, _ = stopped(build(BadLoss, mixed_precision=True, precision="fp16"))
        assert message.startswith("step 3: loss is nan, first in the gradient of layer.weight")

    def test_overflows_without_end_stop(self):
        class Always(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                return outputs, {"loss": losses["loss"] + (self.layer.bias * 0.0).sqrt().sum()}

        message, _ = stopped(build(Always, mixed_precision=True, precision="fp16", epochs=100))
        assert message.startswith("step 51: gradient norm is nan, first in the gradient of layer.bias")

        first = build(Always, mixed_precision=True, precision="fp16", epochs=100, max_steps=20)
        first.fit()
        args = TrainerArgs(continue_path=str(first.output_path))
        message, _ = stopped(build(Always, args=args, mixed_precision=True, precision="fp16", epochs=100))
        assert message.startswith("step 51: ")


class TestDeferred:
    """On a GPU a fused optimizer asks the device itself; here the CPU plays the device."""

    @staticmethod
    def build(model, **settings):
        params = {"fused": True, **settings.pop("optimizer_params", {})}
        trainer = build(model, optimizer_params=params, **settings)
        trainer.guard.reads_are_free = False
        return trainer

    @pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
    def test_no_update_after_the_bad_one_changes_anything(self, optimizer):
        trainer = self.build(BadLoss, optimizer=optimizer)
        message, _ = stopped(trainer)
        assert message.startswith("step 3: loss is nan, first in the gradient of layer.weight;")
        sound = build(optimizer=optimizer, optimizer_params={"fused": True}, max_steps=2)
        sound.fit()
        assert_same_weights(weights_of(trainer.model), weights_of(sound.model))
        assert torch.load(trainer.output_path / "bad_batch_3.pth", weights_only=True)["step"] == 3

    @pytest.mark.parametrize(("model", "loss"), [(BadLoss, "nan"), (InfiniteLoss, "inf")])
    def test_no_update_changes_anything_until_the_host_hears_of_it(self, model, loss):
        trainer = self.build(model, optimizer="AdamW", optimizer_params={"weight_decay": 0.1})
        look = trainer.guard._look_at_pending
        trainer.guard._look_at_pending = lambda wait: look(wait) if wait else None  # a device that is far behind
        seen = []
        trainer.callbacks.add("on_train_step_end", lambda t: seen.append(weights_of(t.model)))
        trainer.config.batch_size = 2  # six updates in the epoch
        with pytest.raises(FloatingPointError, match=f"step 3: loss is {loss}"):
            trainer.fit()
        assert len(seen) == 6
        for weights in seen[2:]:
            assert_same_weights(weights, seen[1])

    def test_a_sound_run_is_bitwise_the_same(self):
        deferred, plain = self.build(Toy, optimizer="AdamW"), build(optimizer="AdamW", optimizer_params={"fused": True})
        deferred.fit()
        plain.fit()
        assert_same_weights(weights_of(deferred.model), weights_of(plain.model))

    def test_it_is_heard_of_before_anything_is_saved(self):
        trainer = self.build(BadLoss, optimizer="AdamW", save_step=3)
        message, _ = stopped(trainer)
        assert message.startswith(
            "step 3: loss is nan, first in the gradient of layer.weight; its batches are saved in"
        )
        assert list_checkpoints(trainer.output_path) == []

    def test_an_update_reads_nothing_back(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        class NoReading(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                assert "_local_scalar_dense" not in str(function), "the host waited for the device"
                return function(*args, **(kwargs or {}))

        for trainer in (self.build(Toy, optimizer="AdamW", grad_clip=1.0), build(grad_clip=1.0)):
            trainer.open_run()
            windows = trainer.windows(trainer.get_loader(is_eval=False))
            trainer.train_step(next(windows))  # makes the optimizer's state
            batches = next(windows)
            trainer.guard._pending.clear()  # values that have arrived may be read
            with NoReading():
                trainer.train_step(batches)
            trainer.close_run()


class Copied:
    """A copy from a device that is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


@pytest.mark.parametrize(("in_step", "told_at"), [(False, 2), (True, 6)])
def test_on_several_ranks_a_deferred_verdict_is_told_in_the_same_update_on_all(in_step, told_at):
    """Whichever device is ahead: not as soon as the copy is there, but when four more updates have been made."""
    config, cpu = ToyConfig(), torch.device("cpu")
    guard = NanGuard(config, Toy(config), Precision(config, cpu), cpu, in_step=in_step)
    for step in range(1, told_at):
        guard.begin(step, [])
        guard._pending.append(_Pending(step, [], torch.tensor([math.nan if step == 1 else 1.0]), [], Copied()))
    with pytest.raises(FloatingPointError, match="step 1: loss is nan"):
        guard.begin(told_at, [])

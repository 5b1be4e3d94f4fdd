"""Models with their own ``optimize``: what the automatic path does happens inside their plain-looking code."""

import functools
import math

import pytest
import torch
from torch import nn

from tests.trainer.test_loop import epoch_batches
from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, make_samples, weights_of
from trainer import TrainerArgs, TrainerModel


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Manual(Toy):
    """Toy, with the update written out: zero_grad, backward, step."""

    def optimize(self, batch, trainer):
        trainer.optimizer[0].zero_grad()
        outputs, losses = self.train_step(batch, trainer.criterion)
        self.scaled_backward(losses["loss"], trainer)
        trainer.optimizer[0].step()
        return outputs, losses


class ManualAfter(Toy):
    """As Coqui's README writes it: the trainer as third argument, modulo, zero_grad after the step."""

    def optimize(self, batch, trainer):
        outputs, losses = self.train_step(batch, trainer.criterion)
        self.scaled_backward(losses["loss"], None, trainer)
        if trainer.total_steps_done % trainer.grad_accum_steps == 0:
            trainer.optimizer[0].step()
            trainer.optimizer[0].zero_grad()
        return outputs, losses


class ManualGan(ToyGan):
    """Both optimizers in one function; the losses have names of their own, and eval_step has no optimizer_idx."""

    def optimize(self, batch, trainer):
        fake = self.generator(batch["x"])
        loss_disc = ((1 - self.disc(batch["y"].unsqueeze(1))) ** 2).mean() + (self.disc(fake.detach()) ** 2).mean()
        trainer.optimizer[0].zero_grad()
        self.scaled_backward(loss_disc, trainer)
        trainer.optimizer[0].step()
        loss_gen = ((1 - self.disc(fake)) ** 2).mean()
        trainer.optimizer[1].zero_grad()
        self.scaled_backward(loss_gen, trainer)
        trainer.optimizer[1].step()
        return {"fake": fake}, {"loss_gen": loss_gen, "loss_disc": loss_disc}

    def eval_step(self, batch, criterion):
        return {}, {"loss_gen": ((1 - self.disc(self.generator(batch["x"]))) ** 2).mean()}


SETTINGS = {
    "plain": {},
    "adamw": {"optimizer": "AdamW"},
    "clipped": {"grad_clip": 0.5},
    "bf16": {"mixed_precision": True, "precision": "bf16"},
    "fp16": {"mixed_precision": True, "precision": "fp16"},
    "fp16, clipped": {"mixed_precision": True, "precision": "fp16", "grad_clip": 0.5},
    "scheduler by step": {
        "lr_scheduler": "StepLR",
        "lr_scheduler_params": {"step_size": 2},
        "scheduler_after_epoch": False,
    },
    "scheduler by epoch": {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}},
    "dropout": {"dropout": 0.3},
    "skip": {"nan_policy": "skip"},
}


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", [Manual, ManualAfter])
def test_equals_the_automatic_path_bitwise(model, name, accumulate):
    """20 samples in batches of 3: windows of unequal batches, and a short last window."""
    settings = {"batch_size": 3, "train": 20, "epochs": 3, "lr": 0.05, **SETTINGS[name]}
    trainers, rates = [], [[], []]
    for model_class, seen in zip((Toy, model), rates):
        trainers.append(build(model_class, args=TrainerArgs(grad_accum_steps=accumulate), **settings))
        note = lambda trainer, seen=seen: seen.append(trainer.optimizer[0].param_groups[0]["lr"])  # noqa: E731
        trainers[-1].callbacks.add("on_train_step_end", note)
        trainers[-1].fit()
    automatic, manual = trainers
    assert_same_weights(weights_of(automatic.model), weights_of(manual.model))
    assert automatic.total_steps_done == manual.total_steps_done == 3 * math.ceil(7 / accumulate)
    assert rates[0] == rates[1]
    assert automatic.keep_avg_train.means == manual.keep_avg_train.means  # losses and gradient norms
    assert automatic.best_loss == manual.best_loss
    assert str(automatic.optimizer[0].state_dict()) == str(manual.optimizer[0].state_dict())
    assert automatic.precision.scaler.state_dict() == manual.precision.scaler.state_dict()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_gan_equals_a_plain_loop_bitwise(clip, autocast):
    """Under autocast, the generator's loss is computed with what the discriminator has just learnt."""
    settings = {"mixed_precision": True, "precision": "bf16"} if autocast else {}
    trainer = build(ManualGan, optimizer="AdamW", lr=0.01, epochs=2, grad_clip=clip, **settings)
    trainer.fit()
    torch.manual_seed(0)
    model = ToyGan(trainer.config)
    disc, generator = model.get_optimizer()
    samples = make_samples(12)
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    for epoch in range(2):
        for batch in epoch_batches(trainer.config, samples, epoch):
            with context():
                fake = model.generator(batch["x"])
                real = model.disc(batch["y"].unsqueeze(1))
                loss = ((1 - real) ** 2).mean() + (model.disc(fake.detach()) ** 2).mean()
            disc.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.disc.parameters(), clip)
            disc.step()
            with context():
                loss = ((1 - model.disc(fake)) ** 2).mean()
            generator.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.generator.parameters(), clip)
            generator.step()
    assert_same_weights(weights_of(trainer.model), weights_of(model))


def test_a_gan_names_its_losses_and_is_evaluated_once(caplog):
    trainer = build(ManualGan, lr=0.01, epochs=2)
    trainer.fit()
    assert set(trainer.keep_avg_train.means) == {"loss_gen", "loss_disc", "grad_norm_0", "grad_norm_1"}
    assert set(trainer.keep_avg_eval.means) == {"loss_gen"}
    assert "step 1: loss_gen " in caplog.text  # what the model learns by comes before the norms
    assert trainer.keep_avg_train["avg_loss_gen"] == trainer.keep_avg_train.means["loss_gen"]
    assert "best model: the newest, since no target_loss is named among loss_gen" in caplog.text
    assert torch.load(trainer.output_path / "best_model.pth", weights_only=True)["step"] == 6


def test_target_loss_judges_a_gan():
    trainer = build(ManualGan, lr=0.01, epochs=2, target_loss="loss_gen")
    trainer.fit()
    assert 0 < trainer.best_loss["eval_loss"] < 1e3


def test_early_stopping_needs_a_loss():
    with pytest.raises(ValueError, match="target_loss=None: name the loss to judge by; there are loss_gen"):
        build(ManualGan, lr=0.01, early_stopping_patience=1).fit()


def test_norms_are_the_true_ones_under_loss_scaling():
    fp16 = build(Manual, mixed_precision=True, precision="fp16", max_steps=1)
    fp32 = build(Manual, max_steps=1)
    fp16.precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for trainer in (fp16, fp32):
        trainer.fit()
    assert fp16.keep_avg_train.means["grad_norm"] == pytest.approx(fp32.keep_avg_train.means["grad_norm"], rel=1e-2)


def test_it_runs_under_autocast_and_its_backward_does_not():
    seen = []

    class Looking(Manual):
        def optimize(self, batch, trainer):
            seen.append(torch.is_autocast_enabled("cpu"))
            self.layer.weight.register_hook(lambda g: seen.append(torch.is_autocast_enabled("cpu")))
            return super().optimize(batch, trainer)

    build(Looking, mixed_precision=True, precision="bf16", max_steps=1).fit()
    assert seen == [True, False]


class ByHand(Toy):
    """Uses the scaler and a scheduler by itself, as careful scripts for Coqui do."""

    def optimize(self, batch, trainer):
        outputs, losses = self.train_step(batch, trainer.criterion)
        optimizer = trainer.optimizer[0]
        optimizer.zero_grad()
        self.scaled_backward(losses["loss"], trainer)
        if trainer.use_amp_scaler:
            trainer.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            trainer.scaler.step(optimizer)
            trainer.scaler.update()
        trainer.scheduler[0].step()
        return outputs, losses


@pytest.mark.parametrize("after_epoch", [True, False])
def test_a_script_that_scales_and_schedules_by_itself(after_epoch):
    settings = {"mixed_precision": True, "precision": "fp16", "lr_scheduler": "StepLR", "epochs": 2}
    settings |= {"lr_scheduler_params": {"step_size": 2}}
    by_hand = build(ByHand, **settings, scheduler_after_epoch=after_epoch)
    by_hand.fit()
    automatic = build(**settings, grad_clip=0.5, scheduler_after_epoch=False)
    automatic.fit()
    assert_same_weights(weights_of(by_hand.model), weights_of(automatic.model))
    assert by_hand.scheduler[0].last_epoch == automatic.scheduler[0].last_epoch == 2  # four updates overflowed
    assert by_hand.own_schedulers == {0}


def test_nan_is_caught_before_the_step():
    class Bad(Manual):
        def train_step(self, batch, criterion):
            outputs, losses = super().train_step(batch, criterion)
            return outputs, {"loss": losses["loss"] * (math.nan if len(self.seen) == 2 else 1.0)}

    trainer = build(Bad)
    with pytest.raises(FloatingPointError, match=r"step 2: loss is nan, first in the gradient of layer\.weight"):
        trainer.fit()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    skipping = build(Bad, nan_policy="skip", epochs=1)
    skipping.fit()
    assert (skipping.guard.skipped, skipping.total_steps_done) == (1, 3)


class Critic(ManualGan):
    """n_critic: the discriminator learns twice from each batch."""

    def optimize(self, batch, trainer):
        for _ in range(2):
            loss = (self.disc(batch["y"].unsqueeze(1)) ** 2).mean()
            trainer.optimizer[0].zero_grad()
            self.scaled_backward(loss, trainer)
            trainer.optimizer[0].step()
        return {}, {"loss": loss}


def plain_critic(config: ToyConfig) -> nn.Module:
    """The discriminator after the first batch."""
    torch.manual_seed(0)
    disc = ToyGan(config).disc
    optimizer = torch.optim.SGD(disc.parameters(), lr=0.01)
    batch = epoch_batches(config, make_samples(12), 0)[0]
    for _ in range(2):
        optimizer.zero_grad()
        (disc(batch["y"].unsqueeze(1)) ** 2).mean().backward()
        optimizer.step()
    return disc


def test_several_steps_with_one_batch():
    trainer = build(Critic, lr=0.01, max_steps=1, target_loss="loss_gen")
    trainer.fit()
    assert torch.equal(plain_critic(trainer.config).weight, trainer.model.disc.weight)
    with pytest.raises(ValueError, match=r"steps optimizer 0 twice with one batch.*set grad_accum_steps=1"):
        build(Critic, args=TrainerArgs(grad_accum_steps=2)).fit()


def test_each_of_several_steps_is_unscaled():
    """The scale of 16 would be seen; fp16 resolves 2**-11 of a weight's change of about 0.1."""
    trainer = build(Critic, lr=0.01, max_steps=1, target_loss="loss_gen", mixed_precision=True, precision="fp16")
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    trainer.fit()
    torch.testing.assert_close(trainer.model.disc.weight, plain_critic(trainer.config).weight, rtol=0, atol=1e-3)


class TestBadInput:
    def test_backward_without_scaling(self):
        class Plain(Toy):
            def optimize(self, batch, trainer):
                outputs, losses = self.train_step(batch, trainer.criterion)
                losses["loss"].backward()
                trainer.optimizer[0].step()
                trainer.optimizer[0].zero_grad()
                return outputs, losses

        build(Plain, max_steps=1).fit()  # nothing to scale, nothing to accumulate
        for settings in ({"mixed_precision": True}, {"args": TrainerArgs(grad_accum_steps=2)}):
            with pytest.raises(ValueError, match=r"Plain.optimize steps optimizer 0 without scaled_backward: call"):
                build(Plain, **settings).fit()

    def test_backward_without_scaling_in_a_later_update(self):
        class Forgetful(Manual):
            def scaled_backward(self, loss, trainer):
                if trainer.total_steps_done == 0:
                    super().scaled_backward(loss, trainer)
                else:
                    loss.backward()

        with pytest.raises(ValueError, match=r"Forgetful.optimize steps optimizer 0 without scaled_backward"):
            build(Forgetful, mixed_precision=True).fit()

    def test_closure(self):
        class Closure(Toy):
            def optimize(self, batch, trainer):
                trainer.optimizer[0].step(lambda: 0.0)

        with pytest.raises(ValueError, match=r"Closure.optimize calls step\(closure\)"):
            build(Closure).fit()

    def test_nothing_is_left_on_the_optimizers_when_it_fails(self):
        class Broken(Manual):
            def train_step(self, batch, criterion):
                raise RuntimeError("mine")

        trainer = build(Broken, mixed_precision=True)
        before = [set(vars(thing)) for thing in (trainer.optimizer[0], trainer.precision.scaler)]
        with pytest.raises(RuntimeError, match="mine"):
            trainer.fit()
        assert [set(vars(thing)) for thing in (trainer.optimizer[0], trainer.precision.scaler)] == before

    def test_the_base_class_asks_for_it(self):
        with pytest.raises(NotImplementedError, match=r"TrainerModel has no optimize\(\)"):
            TrainerModel().optimize({}, None)


def test_the_model_may_skip_a_batch():
    class Sometimes(Manual):
        def optimize(self, batch, trainer):
            return super().optimize(batch, trainer) if trainer.total_steps_done % 2 else (None, None)

    trainer = build(Sometimes, epochs=1, train=16)
    trainer.fit()
    assert (trainer.total_steps_done, len(trainer.model.seen)) == (4, 2)


def test_a_continued_run_ends_bitwise_where_an_undisturbed_one_does():
    settings = {"optimizer": "AdamW", "dropout": 0.3, "epochs": 3, "lr_scheduler": "ExponentialLR"}
    settings["lr_scheduler_params"] = {"gamma": 0.9}
    whole = build(Manual, **settings)
    whole.fit()
    first = build(Manual, max_steps=4, **settings)
    first.fit()
    second = build(Manual, seed=9, args=TrainerArgs(continue_path=str(first.output_path)), **settings)
    second.fit()
    assert_same_weights(weights_of(whole.model), weights_of(second.model))


class Scheduling(Manual):
    """Steps its scheduler after each update."""

    def optimize(self, batch, trainer):
        found = super().optimize(batch, trainer)
        trainer.scheduler[0].step()
        return found


def test_a_scheduler_of_optimize_is_left_to_it_when_a_run_goes_on_at_the_end_of_an_epoch():
    """Where ``optimize`` has not stepped it yet since the start."""

    def end(trainer):
        if trainer.total_steps_done == 3:
            raise KeyError

    settings = {"epochs": 2, "lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}, "save_step": 3}
    whole = build(Scheduling, **settings)
    whole.fit()
    first = build(Scheduling, callbacks={"on_eval_epoch_start": end}, **settings)
    with pytest.raises(KeyError):
        first.fit()
    second = build(Scheduling, seed=9, args=TrainerArgs(continue_path=str(first.output_path)), **settings)
    second.fit()
    assert second.scheduler[0].last_epoch == whole.scheduler[0].last_epoch == 6
    assert_same_weights(weights_of(whole.model), weights_of(second.model))


def test_config_defaults_are_the_toys():
    assert ToyConfig().grad_clip == 0.0  # the settings above rely on it

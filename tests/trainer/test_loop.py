"""The loop against plain PyTorch loops, bitwise, and all that it decides: accumulation, schedules, best model."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import Trainer, TrainerArgs, TrainerModel
from trainer.data.loader import BucketBatchSampler
from trainer.loggers.base import DashboardLogger


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def epoch_batches(config: ToyConfig, samples: list, epoch: int) -> list[dict]:
    """The batches of an epoch, planned with the sampler alone."""
    sampler = BucketBatchSampler(len(samples), config.batch_size, seed=config.training_seed, shuffle=True)
    sampler.set_epoch(epoch)
    return [collate([samples[i] for i in batch]) for batch in sampler]


def plain_loop(config, epochs, *, accumulate=1, clip=0.0, scheduler=None, after_epoch=True, autocast=None, train=12):
    """What a careful person writes by hand for Toy; returns weights and the gradient norms."""
    torch.manual_seed(0)
    model = Toy(config)
    optimizer = getattr(torch.optim, config.optimizer)(model.parameters(), lr=config.lr)
    schedule = scheduler(optimizer) if scheduler else None
    criterion, norms, samples = nn.MSELoss(), [], make_samples(train)
    for epoch in range(epochs):
        batches = epoch_batches(config, samples, epoch)
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            total = sum(len(b["x"]) for b in window)
            for batch in window:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
                    loss = criterion(model.layer(batch["x"]).squeeze(1), batch["y"])
                share = len(batch["x"]) / total
                (loss * share if share != 1.0 else loss).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip if clip else float("inf")))
            optimizer.step()
            optimizer.zero_grad()
            if schedule and not after_epoch:
                schedule.step()
        if schedule and after_epoch:
            schedule.step()
    return weights_of(model), torch.stack(norms)


CASES = {
    "plain": ({}, {}),
    "adamw": ({"optimizer": "AdamW"}, {}),
    "accumulated": ({"accumulate": 2}, {"accumulate": 2}),
    "accumulated past the end": ({"accumulate": 4}, {"accumulate": 4}),
    "clipped": ({"grad_clip": 0.5}, {"clip": 0.5}),
    "scheduler by epoch": (
        {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}},
        {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)},
    ),
    "scheduler by step": (
        {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.9}, "scheduler_after_epoch": False},
        {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "after_epoch": False},
    ),
    "bf16": ({"mixed_precision": True, "precision": "bf16"}, {"autocast": torch.bfloat16}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_plain_loop_bitwise(name):
    """12 samples in batches of 4; 10 samples leave a short last batch."""
    changes, plain = CASES[name]
    changes = dict(changes)
    args = TrainerArgs(grad_accum_steps=changes.pop("accumulate", 1))
    for train in (12, 10):
        trainer = build(args=args, train=train, **changes)
        trainer.fit()
        expected, _ = plain_loop(trainer.config, 6, train=train, **plain)
        assert_same_weights(weights_of(trainer.model), expected)


def test_accumulation_is_one_larger_batch():
    """Three batches of 4 give the gradient of the one batch of 12: equal but for the order of float32 sums."""
    small = build(args=TrainerArgs(grad_accum_steps=3), batch_size=4, epochs=1)
    large = build(batch_size=12, epochs=1)
    small.fit()
    large.fit()
    assert small.total_steps_done == large.total_steps_done == 1
    for a, b in zip(small.model.parameters(), large.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_accumulation_weighs_a_short_batch_by_its_samples():
    """Batches of 4, 4 and 2 in one window are the mean over 10 samples."""
    small = build(args=TrainerArgs(grad_accum_steps=3), train=10, batch_size=4, epochs=1)
    large = build(train=10, batch_size=10, epochs=1)
    small.fit()
    large.fit()
    for a, b in zip(small.model.parameters(), large.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    means = [trainer.keep_avg_train.means["loss"] for trainer in (small, large)]
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert large.total_steps_done == 1


def plain_gan(config, epochs, accumulate, train=12):
    torch.manual_seed(0)
    model = ToyGan(config)
    optimizers = model.get_optimizer()
    for epoch in range(epochs):
        batches = epoch_batches(config, make_samples(train), epoch)
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            total = sum(len(b["x"]) for b in window)
            for idx, optimizer in enumerate(optimizers):
                model.zero_grad()
                for batch in window:
                    share = len(batch["x"]) / total
                    loss = model.train_step(batch, None, idx)[1]["loss"]
                    (loss * share if share != 1.0 else loss).backward()
                optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_optimizers_equal_a_plain_loop_bitwise(accumulate):
    """Outputs of the first pass are used again in the second, with and without accumulation."""
    trainer = build(ToyGan, args=TrainerArgs(grad_accum_steps=accumulate), optimizer="AdamW", epochs=3)
    trainer.fit()
    assert_same_weights(weights_of(trainer.model), plain_gan(trainer.config, 3, accumulate))
    # one forward of the generator for each of 3 epochs x 3 batches, and two evaluation batches per epoch and optimizer
    assert trainer.model.forwards == 3 * 3 + 3 * 2


def test_an_optimizer_touches_only_its_own_gradients():
    seen = []

    def note():
        seen.append([p.grad is not None for p in trainer.model.parameters()])

    trainer = build(ToyGan, callbacks={"before_gradient_clipping": note})
    trainer.open_run()
    trainer.train_step(next(trainer.windows(trainer.get_loader(is_eval=False))))
    generator, disc = [True, True, False, False], [False, False, True, True]
    assert seen == [disc, generator]


def test_none_skips_an_optimizer_in_this_update():
    class Late(ToyGan):
        def train_step(self, batch, criterion, optimizer_idx):
            outputs = super().train_step(batch, criterion, optimizer_idx)
            return (None, None) if optimizer_idx == 1 and self.forwards <= 2 else outputs

    trainer = build(Late, epochs=1, run_eval=False, lr_scheduler="ConstantLR", scheduler_after_epoch=False)
    before = weights_of(trainer.model)
    trainer.open_run()
    windows = trainer.windows(trainer.get_loader(is_eval=False))
    trainer.train_step(next(windows))
    after = weights_of(trainer.model)
    assert torch.equal(before["generator.weight"], after["generator.weight"])
    assert not torch.equal(before["disc.weight"], after["disc.weight"])
    trainer.train_step(next(windows))
    trainer.train_step(next(windows))
    assert not torch.equal(before["generator.weight"], trainer.model.generator.weight)
    assert [s.last_epoch for s in trainer.scheduler] == [3, 1]
    assert trainer.stepped_optimizers == {0, 1}


def test_an_epoch_scheduler_waits_while_its_optimizer_is_skipped():
    class Late(ToyGan):
        def train_step(self, batch, criterion, optimizer_idx):
            outputs = super().train_step(batch, criterion, optimizer_idx)
            # the generator trains in the second of three epochs
            return (None, None) if optimizer_idx == 1 and not 3 < self.forwards <= 6 else outputs

    trainer = build(Late, epochs=3, lr=0.01, run_eval=False, target_loss="loss_0", lr_scheduler="ConstantLR")
    trainer.fit()
    assert [s.last_epoch for s in trainer.scheduler] == [3, 1]


def test_gradient_norms_are_the_true_ones():
    """Unscaled and before clipping, in fp32 without clipping and in scaled fp16 with clipping."""
    norms = {}
    for name, changes in {
        "fp32": {},
        "clipped": {"grad_clip": 1e-3},
        "fp16": {"mixed_precision": True, "precision": "fp16"},
    }.items():
        trainer = build(epochs=1, **changes)
        if name == "fp16":  # the default scale overflows at first, and the update is skipped
            trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        trainer.open_run()
        trainer.train_step(next(trainer.windows(trainer.get_loader(is_eval=False))))
        trainer.keep_avg_train.read()
        norms[name] = trainer.keep_avg_train.last["grad_norm"]
    _, expected = plain_loop(ToyConfig(), 1)
    assert norms["fp32"] == norms["clipped"] == expected[0].item()
    # fp16 keeps 11 bits of mantissa
    assert norms["fp16"] == pytest.approx(expected[0].item(), rel=2**-8)


def test_grad_clip_per_optimizer():
    trainer = build(ToyGan, grad_clip=[0.01, 0.0])
    grads = []
    steps = [o.step for o in trainer.optimizer]
    for optimizer, step in zip(trainer.optimizer, steps):

        def noted(optimizer=optimizer, step=step):
            grads.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]).norm())
            return step()

        optimizer.step = noted
    trainer.open_run()
    trainer.train_step(next(trainer.windows(trainer.get_loader(is_eval=False))))
    trainer.keep_avg_train.read()
    last = trainer.keep_avg_train.last
    assert grads[0].item() == pytest.approx(0.01, rel=1e-3)
    assert grads[1].item() == pytest.approx(last["grad_norm_1"])
    assert last["grad_norm_0"] > 0.02


def test_evaluation_counts_every_sample_once():
    """6 samples in batches of 4 and 2: the mean over samples, not over batches."""
    trainer = build(evaluation=6, eval_batch_size=4)
    means = trainer.evaluate()
    x, y = collate(make_samples(6, seed=1)).values()
    with torch.no_grad():
        errors = (trainer.model.layer(x).squeeze(1) - y) ** 2
    assert means["loss"] == pytest.approx(errors.mean().item(), rel=1e-6)
    batch_mean = (errors[:4].mean() + errors[4:].mean()).item() / 2
    assert means["loss"] != pytest.approx(batch_mean, rel=1e-3)
    assert trainer.model.training  # put back for what follows


def test_evaluating_does_not_change_the_training():
    weights = []
    for changes in ({"run_eval_steps": 1}, {"run_eval": False}):
        trainer = build(dropout=0.5, **changes)
        trainer.fit()
        weights.append(weights_of(trainer.model))
    assert_same_weights(*weights)


def test_logging_does_not_change_the_training():
    class Drawing(Toy):
        def train_log(self, batch, outputs, logger, steps):
            self.drawn = torch.rand(3)

    weights = []
    for plot_step in (1, 1000):
        trainer = build(Drawing, dropout=0.5, plot_step=plot_step)
        trainer.fit()
        weights.append(weights_of(trainer.model))
    assert_same_weights(*weights)


def test_evaluations_draw_the_same_numbers():
    class Noisy(Toy):
        def eval_step(self, batch, criterion):
            noise = torch.randn(len(batch["x"])).mean()
            return {"noise": noise}, {"loss": noise}

    trainer = build(Noisy)
    torch.manual_seed(1)
    first = trainer.evaluate()
    torch.manual_seed(2)
    assert trainer.evaluate() == first


def test_the_best_model_is_the_one_with_the_lowest_eval_loss():
    losses = iter([3.0, 1.0, 2.0, 0.5, 0.5, 0.6])  # an equal loss is not better

    class Scripted(Toy):
        def eval_step(self, batch, criterion):
            value = self.value = next(losses) if batch["x"].size(0) == 4 else self.value
            return {}, {"loss": torch.tensor(value)}

    trainer = build(Scripted, save_all_best=True)
    trainer.fit()
    assert trainer.best_loss == {"train_loss": math.inf, "eval_loss": 0.5}
    state = torch.load(trainer.output_path / "best_model.pth", weights_only=True)
    assert state["step"] == 12  # the fourth of the epochs of 3 updates
    names = sorted(p.name for p in trainer.output_path.glob("best_model_*.pth"))
    assert names == ["best_model_12.pth", "best_model_3.pth", "best_model_6.pth"]


def test_target_loss_decides_and_save_best_after_waits():
    class Two(Toy):
        def eval_step(self, batch, criterion):
            step = self.calls = getattr(self, "calls", 0) + 1
            return {}, {"loss": torch.tensor(float(step)), "other": torch.tensor(-float(step))}

    trainer = build(Two, target_loss="other", evaluation=4, save_best_after=7)
    trainer.fit()
    assert trainer.best_loss["eval_loss"] == -6.0
    saved = torch.load(trainer.output_path / "best_model.pth", weights_only=True)
    assert saved["step"] == 18
    with pytest.raises(ValueError, match=r"target_loss='othr': not among the losses loss, other"):
        build(Two, target_loss="othr").fit()


def test_without_evaluation_the_train_loss_decides():
    trainer = build(run_eval=False, epochs=2)
    trainer.fit()
    assert trainer.best_loss == {"train_loss": trainer.keep_avg_train.means["loss"], "eval_loss": None}
    assert (trainer.output_path / "best_model.pth").is_file()


def test_several_optimizers_are_judged_by_their_mean():
    trainer = build(ToyGan, epochs=1)
    trainer.fit()
    means = trainer.keep_avg_eval.means
    assert trainer.best_loss["eval_loss"] == (means["loss_0"] + means["loss_1"]) / 2
    assert set(means) == {"loss_0", "real", "loss_1", "score"}


@pytest.mark.parametrize("max_steps", [1, 4, 6])
def test_max_steps(max_steps):
    trainer = build(max_steps=max_steps)
    trainer.fit()
    assert trainer.total_steps_done == max_steps == len(trainer.model.seen)
    assert (trainer.output_path / f"checkpoint_{max_steps}.pth").is_file()
    # the last, unfinished epoch is evaluated too
    assert trainer.last_eval_step == max_steps


def test_small_run_takes_the_first_samples():
    trainer = build(args=TrainerArgs(small_run=4), epochs=1)
    trainer.fit()
    assert sorted(trainer.model.seen[0]) == sorted(x[0].item() for x, _ in make_samples(12)[:4])
    assert len(trainer.eval_samples) == 4
    loader = Toy(ToyConfig()).get_data_loader(ToyConfig(), False, make_samples(4), False)
    with pytest.raises(ValueError, match="small_run=4"):
        build(args=TrainerArgs(small_run=4), train_loader=loader)


def test_overfit_batch_uses_one_batch_only():
    trainer = build(args=TrainerArgs(overfit_batch=True), epochs=60)
    trainer.fit()
    assert len(trainer.model.seen) == 60 * 3
    assert all(seen == trainer.model.seen[0] for seen in trainer.model.seen)
    # three weights and a bias fit four samples but for the noise, and evaluation sees the same batch
    assert trainer.best_loss["eval_loss"] < 0.02
    assert trainer.keep_avg_eval.means["loss"] == pytest.approx(trainer.best_loss["eval_loss"], rel=0.2)


def test_overfit_batch_hands_out_a_fresh_dict_every_step():
    trainer = build(ToyGan, args=TrainerArgs(overfit_batch=True), epochs=2, lr=0.01)
    trainer.fit()
    assert trainer.model.forwards == 6 + 2 * 1


def test_start_with_eval_and_skip_train_epoch():
    order = []

    class Noting(Toy):
        def eval_step(self, batch, criterion):
            order.append("eval")
            return super().eval_step(batch, criterion)

        def train_step(self, batch, criterion):
            order.append("train" if self.training else "-")
            return super().train_step(batch, criterion)

        def test_run(self, trainer):
            order.append("test")

    build(Noting, train=4, evaluation=4, epochs=1, args=TrainerArgs(start_with_eval=True)).fit()
    assert order == ["eval", "-", "train", "eval", "-", "test"]
    order.clear()
    trainer = build(Noting, train=4, evaluation=4, args=TrainerArgs(skip_train_epoch=True))
    trainer.fit()
    assert order == ["eval", "-", "test"]
    assert trainer.total_steps_done == 0
    assert not list(trainer.output_path.glob("*.pth"))


def test_run_eval_steps_and_test_delay():
    evals, tests = [], []

    class Noting(Toy):
        def eval_log(self, batch, outputs, logger, steps):
            evals.append(steps)
            assert len(batch["x"]) == 4  # the first batch
            assert not self.training

        def test_run(self, trainer):
            tests.append(trainer.total_steps_done)
            return "spoken"

        def test_log(self, outputs, logger, steps):
            assert (outputs, steps) == ("spoken", tests[-1])

    build(Noting, run_eval_steps=2, test_delay_epochs=1, epochs=2).fit()
    assert evals == [2, 3, 4, 6]  # step 6 is evaluated once
    assert tests == [6]


def test_run_eval_epochs_evaluates_and_tests_every_nth_and_the_last():
    evals, tests = [], []

    class Noting(Toy):
        def eval_log(self, batch, outputs, logger, steps):
            evals.append(steps)

        def test_run(self, trainer):
            tests.append(trainer.total_steps_done)

    build(Noting, run_eval_epochs=2, epochs=5).fit()
    assert evals == tests == [6, 12, 15]
    evals.clear()
    build(Noting, run_eval_epochs=2, max_steps=9).fit()
    assert evals == [6, 9]


def test_callbacks_in_order():
    calls = []

    class Noting(Toy):
        def on_init_start(self, trainer):
            calls.append("init_start")

        def on_epoch_start(self, trainer):
            calls.append(f"epoch {trainer.epochs_done}")

        def on_train_step_end(self, trainer):
            calls.append(f"step {trainer.total_steps_done}")

        def before_backward_pass(self, loss_dict, optimizer):
            calls.append(f"backward {len(optimizer)} {sorted(loss_dict)}")

        def before_gradient_clipping(self):
            assert self.layer.weight.grad is not None
            calls.append("clip")

    functions = {
        "on_init_end": lambda t: calls.append("init_end"),
        "on_train_epoch_start": [lambda t: calls.append("train a"), lambda t: calls.append("train b")],
        "on_train_epoch_end": lambda t: calls.append("train end"),
        "on_epoch_end": lambda t: calls.append(f"end {t.epochs_done}"),
        "on_train_step_start": lambda t: calls.append("start"),
    }
    build(Noting, train=4, epochs=1, callbacks=functions).fit()
    middle = ["start", "backward 1 ['loss']", "clip", "step 1"]
    assert calls == ["init_start", "init_end", "epoch 0", "train a", "train b", *middle, "train end", "end 0"]


def test_evaluation_callbacks_on_model_criterion_and_functions():
    calls = []

    class Criterion(nn.MSELoss):
        def on_eval_epoch_start(self, trainer):
            calls.append("criterion start")

    class Noting(Toy):
        def get_criterion(self):
            return Criterion()

        def on_eval_step_start(self, trainer):
            calls.append("batch")
            assert not self.training

        def on_eval_epoch_end(self, trainer):
            calls.append(f"model end {sorted(trainer.keep_avg_eval.means)}")

    functions = {"on_eval_step_end": lambda t: calls.append("done"), "on_eval_epoch_end": lambda t: calls.append("end")}
    build(Noting, callbacks=functions).evaluate()
    assert calls == ["criterion start", "batch", "done", "batch", "done", "model end ['loss']", "end"]


def test_a_part_that_the_model_keeps_in_eval_mode_stays_so():
    """As XTTS does: on_train_epoch_start, after train(), freezes parts; an evaluation in between changes nothing."""
    modes = []

    class Partly(Toy):
        def on_train_epoch_start(self, trainer):
            assert self.training
            self.dropout.eval()

        def train_step(self, batch, criterion):
            modes.append((self.training, self.dropout.training))
            return super().train_step(batch, criterion)

        def eval_step(self, batch, criterion):
            assert (self.training, self.layer.training) == (False, False)
            return {}, {"loss": torch.zeros(())}

    build(Partly, run_eval_steps=1, epochs=1).fit()
    assert modes == [(True, False)] * 3


def test_the_trainer_reads_the_command_line_by_itself(monkeypatch):
    """As in Coqui's scripts, which hand over args and config and leave sys.argv to the Trainer."""
    argv = ["train.py", "--coqpit.epochs=1", "--grad_accum_steps", "3", "--coqpit.optimizer_params.momentum=0.5"]
    monkeypatch.setattr("sys.argv", argv)
    config, args = ToyConfig(), TrainerArgs()
    trainer = Trainer(args, config, model=Toy(config), train_samples=make_samples(12), eval_samples=make_samples(4))
    trainer.fit()
    assert (config.epochs, args.grad_accum_steps, trainer.total_steps_done) == (1, 3, 1)
    assert trainer.optimizer[0].defaults["momentum"] == 0.5


def test_the_scripts_own_arguments_are_left_to_it(monkeypatch, caplog):
    monkeypatch.setattr("sys.argv", ["demo.py", "serve", "--port", "5003", "--batch_size=7", "--coqpit.epochs", "2"])
    config = ToyConfig()
    Trainer(TrainerArgs(), config, model=Toy(config))
    assert (config.epochs, config.batch_size) == (2, 4)
    assert "not the Trainer's arguments, left to the script: serve, --port, --batch_size" in caplog.text


@pytest.mark.parametrize("argument", ["--coqpit.epochz=1", "--restore_pth=x", "--coqpit.port=1"])
def test_what_looks_like_the_trainers_argument_is_an_error(monkeypatch, capsys, argument):
    monkeypatch.setattr("sys.argv", ["demo.py", "--port=5003", argument])
    config = ToyConfig()
    with pytest.raises(SystemExit) as stopped:
        Trainer(TrainerArgs(), config, model=Toy(config))
    assert stopped.value.code == 2
    assert f"{argument.partition('=')[0]}: unknown argument" in capsys.readouterr().err


def test_print_eval_prints_every_batch(caplog):
    build(epochs=1, print_eval=True, evaluation=6).fit()
    assert [line for line in caplog.messages if line.startswith("eval at batch")][1].startswith(
        "eval at batch 2: loss "
    )


def test_the_host_reads_losses_only_at_log_points(monkeypatch):
    from trainer.averages import Averages

    reads = []
    read = Averages.read
    monkeypatch.setattr(Averages, "read", lambda self: (reads.append(bool(self._pending)), read(self))[1])
    trainer = build(train=40, epochs=1, run_eval=False, print_step=5, plot_step=1000, save_checkpoints=False)
    trainer.fit()
    # steps 1, 5, 10 and nothing left at the end of the epoch
    assert reads.count(True) == 3


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    class Diverging(Toy):
        def train_step(self, batch, criterion):
            outputs, losses = super().train_step(batch, criterion)
            if len(self.seen) == 4:
                losses["loss"] = losses["loss"] * float("nan")
            return outputs, losses

    trainer = build(Diverging, save_step=1)
    with pytest.raises(FloatingPointError, match="step 4: loss is nan"):
        trainer.fit()
    assert sorted(p.name for p in trainer.output_path.glob("checkpoint_*")) == [
        f"checkpoint_{i}.pth" for i in (1, 2, 3)
    ]
    log = (trainer.output_path / "trainer_0_log.txt").read_text()
    assert "FloatingPointError: step 4: loss is nan" in log
    assert "saved" not in log.partition("checkpoint_3.pth")[2].partition("FloatingPointError")[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_learns(precision):
    trainer = build(mixed_precision=True, precision=precision, epochs=30)
    first = trainer.evaluate()["loss"]
    trainer.fit()
    assert trainer.best_loss["eval_loss"] < 0.05 * first
    assert trainer.precision.scaler.is_enabled() is (precision == "fp16")


def test_an_overflow_skips_the_update_and_its_scheduler():
    class Overflowing(Toy):
        def train_step(self, batch, criterion):
            outputs, losses = super().train_step(batch, criterion)
            # finite, but its scaled gradient is not
            return outputs, {"loss": losses["loss"] * (1e35 if len(self.seen) == 1 else 1.0)}

    trainer = build(
        Overflowing, mixed_precision=True, precision="fp16", lr_scheduler="ConstantLR", scheduler_after_epoch=False
    )
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = weights_of(trainer.model)
    trainer.open_run()
    windows = trainer.windows(trainer.get_loader(is_eval=False))
    scale = trainer.precision.scaler.get_scale()
    trainer.train_step(next(windows))
    assert_same_weights(before, weights_of(trainer.model))
    assert trainer.precision.scaler.get_scale() == scale / 2
    assert trainer.scheduler[0].last_epoch == 0
    trainer.train_step(next(windows))
    assert trainer.scheduler[0].last_epoch == 1
    assert not torch.equal(before["layer.weight"], trainer.model.layer.weight)


def test_the_run_folder_and_its_config():
    trainer = build(epochs=1, run_name="toy")
    assert not Path("output").exists()  # building writes nothing
    trainer.fit()
    other = build(epochs=1, run_name="toy")
    other.fit()
    assert other.output_path != trainer.output_path
    assert trainer.output_path.parent.name == "output"
    assert trainer.output_path.name.startswith("toy-")
    saved = json.loads((trainer.output_path / "config.json").read_text())
    assert (saved["run_name"], saved["epochs"], saved["features"]) == ("toy", 1, 3)
    log = (trainer.output_path / "trainer_0_log.txt").read_text()
    assert "step 1: loss" in log
    assert "eval at step 3: loss" in log


def test_optimizers_have_callbacks_too():
    calls = []

    class Listening(torch.optim.SGD):
        def on_train_step_end(self, trainer):
            calls.append(trainer.total_steps_done)

    class Owning(Toy):
        def get_optimizer(self):
            return Listening(self.parameters(), lr=0.1)

    build(Owning, epochs=1).fit()
    assert calls == [1, 2, 3]


def test_use_accelerate_is_one_warning(caplog):
    trainer = build(args=TrainerArgs(use_accelerate=True), epochs=2)
    trainer.fit()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "use_accelerate: the Trainer's own loop does what Accelerate is for" in warnings[0]
    plain = build(epochs=2)
    plain.fit()
    assert_same_weights(weights_of(trainer.model), weights_of(plain.model))


@pytest.mark.parametrize(("log_model_step", "expected"), [(None, [2, 4]), (3, [2, 6])])
def test_the_newest_checkpoint_is_handed_to_the_dashboard(log_model_step, expected):
    handed = []

    class Dashboard(DashboardLogger):
        def add_artifact(self, file_or_dir, name, artifact_type, aliases=None):
            handed.append(int(file_or_dir.stem.removeprefix("checkpoint_")))
            assert (name, artifact_type) == ("checkpoint", "model")
            assert aliases[1].startswith("step-")

    trainer = build(save_step=2, log_model_step=log_model_step, max_steps=6, epochs=2)
    trainer.dashboard_logger = Dashboard()
    trainer.fit()
    # log_model_step=3: at step 3 the newest is of step 2
    assert handed[:2] == expected


def test_model_param_stats_are_written_after_every_epoch():
    steps = []

    class Dashboard(DashboardLogger):
        def model_weights(self, model, step):
            steps.append(step)

    for settings in ({"model_param_stats": True}, {}):
        trainer = build(epochs=2, **settings)
        trainer.dashboard_logger = Dashboard()
        trainer.fit()
    assert steps == [3, 6]


@pytest.mark.parametrize("losses", [None, {}])
def test_a_model_may_skip_a_whole_epoch(losses, caplog):
    """As Coqui TTS's GlowTTS does for its first updates; nothing is shown of them, and none is the best."""

    class Later(Toy):
        def train_step(self, batch, criterion):
            self.calls = getattr(self, "calls", 0) + 1
            return super().train_step(batch, criterion) if self.calls > 3 else (None, losses)

        def train_log(self, batch, outputs, logger, steps):
            shown.append((steps, sorted(outputs)))

    shown = []
    trainer = build(Later, epochs=2, run_eval=False, plot_step=1)
    trainer.fit()
    assert "Later returned no loss for any batch of the epoch" in caplog.text
    assert [steps for steps, _ in shown] == [4, 5, 6]
    assert torch.load(trainer.output_path / "best_model.pth", weights_only=True)["step"] == 6


def test_an_evaluation_without_a_loss_is_not_judged():
    class Silent(Toy):
        def eval_step(self, batch, criterion):
            return None, None

        def eval_log(self, batch, outputs, logger, steps):
            raise AssertionError("there is nothing to show")

    trainer = build(Silent, epochs=1)
    trainer.fit()
    assert trainer.keep_avg_eval.means == {}
    assert not (trainer.output_path / "best_model.pth").exists()


class GanOnSelf(ToyGan):
    """Hands the generator's output over on ``self``, as Coqui TTS's models do, and counts its passes there."""

    passes = 0

    def train_step(self, batch, criterion, optimizer_idx):
        self.passes += 1
        if optimizer_idx == 0:
            outputs = super().train_step(batch, criterion, optimizer_idx)
            self.fake = batch.pop("fake")
            return outputs
        return super().train_step({**batch, "fake": self.fake}, criterion, optimizer_idx)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_outputs_kept_on_self_are_those_of_their_batch(accumulate):
    trainers = []
    for model in (ToyGan, GanOnSelf):
        args = TrainerArgs(grad_accum_steps=accumulate)
        trainers.append(build(model, args=args, train=20, epochs=2, optimizer="AdamW", lr=0.01, run_eval=False))
        trainers[-1].fit()
    assert_same_weights(*(weights_of(trainer.model) for trainer in trainers))
    assert trainers[1].model.passes == 2 * 2 * 5  # epochs, optimizers, batches


def test_a_callback_that_steps_and_clears_leaves_accumulated_gradients_alone():
    """As Coqui TTS's Capacitron does in before_backward_pass."""

    class Clearing(Toy):
        def before_backward_pass(self, loss_dict, optimizer):
            optimizer[0].zero_grad()

    clearing = build(Clearing, args=TrainerArgs(grad_accum_steps=3), epochs=2)
    plain = build(args=TrainerArgs(grad_accum_steps=3), epochs=2)
    for trainer in (clearing, plain):
        trainer.fit()
    assert_same_weights(weights_of(clearing.model), weights_of(plain.model))


def test_what_a_test_run_makes_can_be_trained():
    class Making(Toy):
        def test_run(self, trainer):
            assert not torch.is_grad_enabled()
            self.cell = nn.GRUCell(2, 2)

    trainer = build(Making, epochs=1)
    trainer.fit()
    assert not trainer.model.cell.weight_hh.is_inference()
    trainer.model.cell(torch.ones(1, 2)).sum().backward()


def test_outputs_are_shown_in_full_precision():
    types = []

    class Showing(Toy):
        def train_log(self, batch, outputs, logger, steps):
            types.append(outputs["prediction"].dtype)

    build(Showing, mixed_precision=True, precision="bf16", plot_step=1, max_steps=1).fit()
    assert types == [torch.float32]


@pytest.mark.parametrize("hook", ["train_log", "eval_log"])
def test_a_hook_that_cannot_show_anything_is_told_of_once(hook, caplog):
    def unable(self, batch, outputs, logger, steps):
        raise NotImplementedError("no pictures of this")

    build(type("Plain", (Toy,), {hook: unable}), plot_step=1, epochs=2).fit()
    assert caplog.text.count(f"Plain.{hook} shows nothing: NotImplementedError('no pictures of this')") == 1


def test_a_model_may_copy_the_config_onto_itself():
    """As Coqui TTS's models do, which have a property ``device``."""

    class Copying(Toy):
        device = property(lambda self: next(self.parameters()).device)

        def __init__(self, config):
            super().__init__(config)
            for name in set(config) - {"dropout"}:  # a layer here
                setattr(self, name, config[name])

    trainer = build(Copying, epochs=1)
    trainer.fit()
    assert (trainer.model.batch_size, trainer.model.lr) == (4, 0.1)


class TestBadInput:
    """Each with name, value and remedy."""

    def test_a_batch_that_is_no_dict(self):
        loader = torch.utils.data.DataLoader(make_samples(4), batch_size=4)
        with pytest.raises(TypeError, match=r"Toy\.train_step: the batch is a list of 2 items, not a dict"):
            build(train_loader=loader).fit()

    def test_other_type_errors_of_the_model_come_out_as_they_are(self):
        class Broken(Toy):
            def train_step(self, batch, criterion):
                return len(3)

        with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
            build(Broken).fit()

    def test_format_batch_without_return(self):
        class Forgetful(Toy):
            def format_batch(self, batch):
                batch["x"] = batch["x"]

        with pytest.raises(ValueError, match=r"Forgetful\.format_batch returned None: return the batch"):
            build(Forgetful).fit()

    def test_no_samples(self):
        with pytest.raises(ValueError, match="train_samples is empty: check the data set"):
            build(train=0).fit()

    def test_loader_without_batches(self):
        loader = torch.utils.data.DataLoader(make_samples(3), batch_size=4, drop_last=True)
        with pytest.raises(ValueError, match="the train_loader has no batch"):
            build(train_loader=loader).fit()

    @pytest.mark.parametrize("losses", [{"loss_gen": torch.ones(())}, {"loss": 1.0}, torch.ones(())])
    def test_losses_without_loss(self, losses):
        class Wrong(Toy):
            def train_step(self, batch, criterion):
                return {}, losses

        with pytest.raises(ValueError, match=r"Wrong.train_step returned losses .* without a tensor 'loss'"):
            build(Wrong).fit()

    def test_loss_that_is_no_scalar(self):
        class Wrong(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                return outputs, {**losses, "each": outputs["prediction"]}

        with pytest.raises(ValueError, match=r"loss 'each' has shape \[4\]"):
            build(Wrong).fit()

    def test_missing_method_is_named(self):
        class Empty(Toy):
            train_step = TrainerModel.train_step

        with pytest.raises(NotImplementedError, match=r"Empty has no train_step\(\)"):
            build(Empty).fit()

    def test_lengths(self):
        with pytest.raises(ValueError, match="grad_clip: 3 entries"):
            build(ToyGan, grad_clip=[1.0, 1.0, 1.0])

    def test_model_of_another_base(self):
        with pytest.raises(TypeError, match="Linear: derive its class from TrainerModel"):
            build(model=nn.Linear(1, 1))

    def test_exception_of_the_user_comes_out_as_it_is(self):
        class Broken(Toy):
            def eval_step(self, batch, criterion):
                raise NotImplementedError("inside the user's code")

        trainer = build(Broken)
        with pytest.raises(NotImplementedError, match="inside the user's code"):
            trainer.fit()
        log = (trainer.output_path / "trainer_0_log.txt").read_text()
        assert "error: the training ends here" in log
        assert "NotImplementedError: inside the user's code" in log
        assert 'raise NotImplementedError("inside the user\'s code")' in log

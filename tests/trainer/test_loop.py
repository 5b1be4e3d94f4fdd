"""The loop against plain PyTorch loops, bitwise, and all that it decides: accumulation, schedules, best model."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import Trainer, TrainerArgs
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

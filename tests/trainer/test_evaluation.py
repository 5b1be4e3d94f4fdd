"""Evaluations: what they count, when they come, what they judge, and that the training does not notice them."""

import math

import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import TrainerArgs


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def test_print_eval_prints_every_batch(caplog):
    build(epochs=1, print_eval=True, evaluation=6).fit()
    assert [line for line in caplog.messages if line.startswith("eval at batch")][1].startswith(
        "eval at batch 2: loss "
    )


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

"""EMA and early stopping inside a training: what is evaluated, saved, continued, and when it ends."""

import math

import pytest
import torch
from torch import nn

from tests.trainer.test_loop import epoch_batches
from tests.trainer.toys import Toy, assert_same_weights, build, make_samples, weights_of
from trainer import TrainerArgs


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def continued(trainer, **settings):
    return build(args=TrainerArgs(continue_path=str(trainer.output_path)), seed=9, **settings)


class TestEma:
    def test_evaluations_and_tests_see_the_average_and_the_training_does_not_notice(self):
        """The average by a plain loop over the weights after each update."""
        seen = []

        class Watched(Toy):
            def test_run(self, trainer):
                seen.append(self.layer.weight.detach().clone())

        trainer = build(Watched, ema_decay=0.9, epochs=3)
        trainer.fit()
        plain = Toy(trainer.config)
        torch.manual_seed(0)
        plain = Toy(trainer.config)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        averages, updates, losses = [p.detach().clone() for p in plain.parameters()], 0, []
        for epoch in range(3):
            for batch in epoch_batches(trainer.config, make_samples(12), epoch):
                optimizer.zero_grad()
                nn.functional.mse_loss(plain.layer(batch["x"]).squeeze(1), batch["y"]).backward()
                optimizer.step()
                decay = min(0.9, (1 + updates) / (10 + updates))
                averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, plain.parameters())]
                updates += 1
            x, y = (torch.stack(values) for values in zip(*make_samples(6, seed=1)))
            losses.append(nn.functional.mse_loss((x @ averages[0].T + averages[1]).squeeze(1), y).item())
            torch.testing.assert_close(seen[epoch], averages[0], rtol=1e-5, atol=1e-6)
        assert trainer.keep_avg_eval.means["loss"] == pytest.approx(losses[-1], rel=1e-5)
        assert trainer.best_loss["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
        assert_same_weights(weights_of(trainer.model), weights_of(plain))
        state = torch.load(trainer.output_path / "best_model.pth", weights_only=True)
        torch.testing.assert_close(state["ema"]["weights"]["layer.weight"], averages[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(state["model"]["layer.weight"], plain.layer.weight)

    @pytest.mark.parametrize("stop", [3, 4])
    def test_a_continued_run_ends_bitwise_where_an_undisturbed_one_does(self, stop):
        settings = {"ema_decay": 0.95, "optimizer": "AdamW", "epochs": 3, "dropout": 0.2}
        whole = build(**settings)
        whole.fit()
        first = build(max_steps=stop, **settings)
        first.fit()
        second = continued(first, **settings)
        second.fit()
        assert_same_weights(whole.ema.state_dict()["weights"], second.ema.state_dict()["weights"])
        assert whole.ema.updates == second.ema.updates == 9
        assert whole.keep_avg_eval.means == second.keep_avg_eval.means

    def test_an_update_that_is_skipped_does_not_count(self):
        class Bad(Toy):
            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                return outputs, {"loss": losses["loss"] * (math.nan if self.training and len(self.seen) == 2 else 1.0)}

        trainer = build(Bad, nan_policy="skip", ema_decay=0.9, epochs=1)
        trainer.fit()
        assert (trainer.total_steps_done, trainer.ema.updates) == (3, 2)


class Scripted(Toy):
    """Its evaluation losses are given."""

    losses = (3.0, 1.0, 0.95, 2.0, 1.5, 0.5, 0.4, 0.3)

    def eval_step(self, batch, criterion):
        return {}, {"loss": torch.tensor(self.losses[self.evaluations])}

    def on_eval_epoch_start(self, trainer):
        self.evaluations = trainer.total_steps_done // 3 - 1


class TestEarlyStopping:
    @pytest.mark.parametrize(
        ("settings", "epochs"),
        [
            ({"early_stopping_patience": 2}, 5),  # after 2.0 and 1.5
            ({"early_stopping_patience": 2, "early_stopping_min_delta": 0.1}, 4),  # 0.95 is not better enough than 1.0
            ({"early_stopping_patience": 3}, 8),
            ({}, 8),
        ],
    )
    def test_when_it_stops(self, settings, epochs, caplog):
        trainer = build(Scripted, epochs=8, **settings)
        trainer.fit()
        assert trainer.epochs_done == epochs
        assert ("stopped early: no " in caplog.text) is (epochs < 8)
        assert (trainer.output_path / f"checkpoint_{3 * epochs}.pth").is_file()

    def test_a_continued_run_counts_on_and_one_that_had_stopped_stays_so(self, caplog):
        first = build(Scripted, epochs=4, early_stopping_patience=2)
        first.fit()
        assert not first.early_stopping.should_stop
        second = continued(first, model_class=Scripted, epochs=8, early_stopping_patience=2)
        second.fit()
        assert second.epochs_done == 5
        third = continued(second, model_class=Scripted, epochs=8, early_stopping_patience=2)
        third.fit()
        assert third.epochs_done == 5
        assert "nothing left to train" in caplog.text

    def test_the_train_loss_is_watched_without_evaluation(self):
        # the order of the samples changes the mean's last bits
        patience = {"early_stopping_patience": 3, "early_stopping_min_delta": 1e-3}
        trainer = build(run_eval=False, lr=0.0, epochs=8, batch_size=12, **patience)
        trainer.fit()
        assert trainer.epochs_done == 4  # the first is the best, three are not better

    def test_an_evaluation_that_only_a_stopped_run_makes_does_not_count(self):
        """max_steps ends inside the second epoch, with an evaluation that the continued run does not make there."""
        settings = {"epochs": 8, "early_stopping_patience": 2, "save_step": 1}
        trainer = build(max_steps=4, **settings)
        trainer.fit()
        assert trainer.last_eval_step == 4
        assert trainer.early_stopping.waited == 0
        best = trainer.early_stopping.best
        assert best == pytest.approx(build_first_evaluation(), rel=1e-6)


def build_first_evaluation() -> float:
    """The loss after the first epoch."""
    trainer = build(max_steps=3)
    trainer.fit()
    return trainer.keep_avg_eval.means["loss"]

"""Features together, and trainings that were interrupted, failed or fed oddly; each case was once wrong."""

import logging
import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tests.trainer.test_manual import ManualGan
from tests.trainer.toys import Toy, ToyConfig, ToyGan, assert_same_weights, build, collate, make_samples, weights_of
from trainer import Trainer, TrainerArgs, TrainerConfig
from trainer.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Killed(Exception):
    """Ends a training without a word, as SIGKILL would."""


def killed(step: int, **settings) -> Trainer:
    """A training that ends after so many updates."""

    def kill(trainer):
        if trainer.total_steps_done == step:
            raise Killed

    trainer = build(callbacks={"on_train_step_end": kill}, **settings)
    with pytest.raises(Killed):
        trainer.fit()
    return trainer


def continued(first: Trainer, **settings) -> Trainer:
    """The run goes on."""
    settings = {"model_class": type(first.model), "seed": 99, **settings}
    trainer = build(args=TrainerArgs(continue_path=str(first.output_path)), **settings)
    trainer.fit()
    return trainer


class TestEvaluationsThatCount:
    """Early stopping counts evaluations: a continued run has to have made the same ones."""

    def test_one_that_was_due_when_the_run_was_killed_is_made_up_for(self):
        settings = {"epochs": 1, "train": 48, "run_eval_steps": 4, "save_step": 4, "lr": 0.0, "save_best_after": 100}
        settings["early_stopping_patience"] = 50
        whole = build(**settings)
        whole.fit()
        # the checkpoint of step 8 was written just before the evaluation of step 8
        second = continued(killed(9, **settings), **settings)
        assert second.early_stopping.state_dict() == whole.early_stopping.state_dict()

    def test_the_train_loss_of_an_epoch_is_judged_once(self):
        settings = {"epochs": 4, "run_eval": False, "early_stopping_patience": 1, "lr": 0.01}
        assert continued(killed(4, **settings), **settings).total_steps_done == 12

    def test_one_at_max_steps_that_the_epochs_would_not_make_does_not_count(self):
        settings = {"epochs": 4, "run_eval_epochs": 2, "early_stopping_patience": 50, "lr": 0.0}
        whole, first = build(**settings), build(max_steps=3, **settings)
        whole.fit()
        first.fit()
        assert continued(first, **settings).early_stopping.state_dict() == whole.early_stopping.state_dict()


class Counted(IterableDataset):
    """Says that it has 12 samples, and gives so many."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 12

    def __iter__(self):
        return iter(make_samples(self.samples))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("samples", [8, 16])
def test_an_epoch_ends_where_the_loader_ends(samples):
    loader = DataLoader(Counted(samples), batch_size=4, collate_fn=collate)
    trainer = build(epochs=2, train_loader=loader, max_steps=100)
    trainer.fit()
    assert (trainer.epochs_done, trainer.total_steps_done) == (2, 2 * samples // 4)


def test_a_model_that_shuffles_its_samples_goes_on_in_the_same_order():
    class Shuffles(Toy):
        def get_data_loader(self, config, is_eval, samples, verbose):
            samples = [samples[i] for i in torch.randperm(len(samples))]
            return super().get_data_loader(config, is_eval, samples, verbose)

    settings = {"epochs": 2, "run_eval": False, "dropout": 0.3}
    whole, first = build(Shuffles, **settings), None
    whole.fit()
    first = build(Shuffles, max_steps=2, **settings)
    first.fit()
    assert first.model.seen + continued(first, **settings).model.seen == whole.model.seen


def test_overfit_batch_gives_format_batch_the_loaders_batch_every_time():
    class Doubles(Toy):
        def format_batch(self, batch):
            batch["x"] *= 2
            return batch

    trainer = build(Doubles, args=TrainerArgs(overfit_batch=True), epochs=1)
    trainer.fit()
    assert all(seen == trainer.model.seen[0] for seen in trainer.model.seen)


class TestFitAgain:
    @pytest.mark.parametrize("fp16", [False, True])
    @pytest.mark.parametrize("error", [Killed, FloatingPointError])
    def test_after_an_error_it_goes_on_as_if_nothing_had_been(self, error, fp16):
        class Failing(Toy):
            fail = None

            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                if len(self.seen) == self.fail:
                    self.fail = None
                    if error is Killed:
                        raise Killed
                    losses["loss"] = losses["loss"] * math.nan
                return outputs, losses

        settings = {"epochs": 1, "mixed_precision": fp16, "run_eval": False}
        whole = build(Failing, args=TrainerArgs(grad_accum_steps=2), **settings)
        whole.fit()
        trainer = build(Failing, args=TrainerArgs(grad_accum_steps=2), **settings)
        trainer.model.fail = 2
        with pytest.raises(error):
            trainer.fit()
        trainer.fit()
        assert_same_weights(weights_of(trainer.model), weights_of(whole.model))

    def test_after_a_start_that_failed_it_fails_again(self):
        first = build(epochs=1)
        first.fit()
        samples = {"train_samples": make_samples(12, 4), "eval_samples": make_samples(6, 4)}
        other = build(args=TrainerArgs(continue_path=str(first.output_path)), features=4, **samples)
        for _ in range(2):
            with pytest.raises(ValueError, match="of another model"):
                other.fit()
        log = (first.output_path / "trainer_0_log.txt").read_text()
        assert log.count("error: the training ends here") == 2  # once for each, and no logger stays open
        files = [getattr(handler, "baseFilename", "") for handler in logging.getLogger("trainer").handlers]
        assert not [file for file in files if file.startswith(str(first.output_path.resolve()))]
        assert "of another model than Toy; start a new run from its weights with --restore_path" in log

    def test_after_a_signal_it_can_be_evaluated(self):
        def interrupt(trainer):
            if trainer.total_steps_done == 2:
                signal.raise_signal(signal.SIGINT)

        trainer = build(epochs=2, callbacks={"on_train_step_end": interrupt})
        with pytest.raises(SystemExit):
            trainer.fit()
        assert trainer.evaluate() is not None


def test_a_signal_ends_an_evaluation_without_training(caplog):
    interrupt = {"on_eval_step_start": lambda trainer: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(SystemExit) as stopped:
        build(args=TrainerArgs(skip_train_epoch=True), callbacks=interrupt).fit()
    assert stopped.value.code == 130


@pytest.mark.parametrize("fp16", [False, True])
def test_an_optimizer_without_trainable_parameters(fp16):
    class Frozen(ToyGan):
        def __init__(self, config):
            super().__init__(config)
            self.generator.requires_grad_(False)

    trainer = build(Frozen, epochs=1, lr=0.01, mixed_precision=fp16)
    before = weights_of(trainer.model)
    trainer.fit()
    assert torch.equal(trainer.model.generator.weight, before["generator.weight"])


@pytest.mark.parametrize("fp16", [False, True])
def test_an_optimizer_whose_parameters_are_not_used_yet(fp16):
    class Later(Toy):
        def __init__(self, config):
            super().__init__(config)
            self.other = nn.Linear(3, 1)

        def get_optimizer(self):
            return torch.optim.SGD(self.other.parameters(), lr=0.1)

        def train_step(self, batch, criterion):
            self.calls = getattr(self, "calls", 0) + 1
            layer = self.layer if self.calls < 3 else self.other
            return {}, {"loss": criterion(layer(batch["x"]).squeeze(1), batch["y"])}

    trainer = build(Later, epochs=2, mixed_precision=fp16, precision="fp16")
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=fp16)
    before = weights_of(trainer.model)
    trainer.fit()
    assert not torch.equal(trainer.model.other.weight, before["other.weight"])
    assert torch.equal(trainer.model.layer.weight, before["layer.weight"])


class TestSkippedUpdates:
    def test_of_several_optimizers_each_has_its_own_count(self):
        class BadGenerator(ToyGan):
            def train_step(self, batch, criterion, optimizer_idx):
                outputs, losses = super().train_step(batch, criterion, optimizer_idx)
                bad = self.training and (optimizer_idx == 1 or self.forwards <= 2)
                return outputs, {"loss": losses["loss"] * (math.nan if bad else 1.0)}

        trainer = build(BadGenerator, nan_policy="skip", nan_skip_limit=3, epochs=6, lr=0.01)
        # both are bad twice: that is two in a row for each, and not four
        with pytest.raises(FloatingPointError, match=r"step 3: loss is nan \(bad update number 3 in a row\)"):
            trainer.fit()

    def test_an_evaluation_with_nan_is_never_the_best(self):
        class Bad(Toy):
            def eval_step(self, batch, criterion):
                self.evaluations = getattr(self, "evaluations", 0) + 1
                bad = self.evaluations in (4, 5, 6)  # one batch of the second, both of the third
                return {}, {"loss": torch.tensor(math.nan if bad else 1.0 / self.evaluations)}

        trainer = build(Bad, nan_policy="skip", epochs=3)
        trainer.fit()
        assert load_checkpoint(trainer.output_path / "best_model.pth")["step"] == 3

    def test_buffers_that_the_model_assigns_are_restored(self):
        class Assigns(Toy):
            def __init__(self, config):
                super().__init__(config)
                self.register_buffer("mean", torch.zeros(()))

            def train_step(self, batch, criterion):
                outputs, losses = super().train_step(batch, criterion)
                if self.training:
                    self.mean = 0.9 * self.mean + 0.1 * losses["loss"].detach()
                return outputs, losses

        samples = make_samples(12)
        samples[5] = (samples[5][0] * math.nan, samples[5][1])
        trainer = build(Assigns, train_samples=samples, nan_policy="skip", epochs=2)
        trainer.fit()
        assert trainer.guard.skipped == 2
        assert trainer.model.mean.isfinite()

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_in_a_models_own_optimize_the_other_optimizer_goes_on(self, accumulate):
        class Bad(ManualGan):
            def scaled_backward(self, loss, trainer, *args, **options):
                self.passes = getattr(self, "passes", 0) + 1
                super().scaled_backward(loss * (math.nan if self.passes % 2 == 0 else 1.0), trainer)

        args = TrainerArgs(grad_accum_steps=accumulate)
        settings = {"nan_policy": "skip", "nan_skip_limit": 100, "run_eval": False, "lr": 0.01}
        trainer = build(Bad, args=args, epochs=1, train=16, **settings)
        before = weights_of(trainer.model)
        trainer.fit()
        assert torch.equal(before["generator.weight"], trainer.model.generator.weight)
        assert not torch.equal(before["disc.weight"], trainer.model.disc.weight)

    @pytest.mark.parametrize("policy", ["raise", "skip"])
    def test_a_sparse_gradient(self, policy):
        class Sparse(Toy):
            def __init__(self, config):
                super().__init__(config)
                self.layer = nn.Embedding(10, 1, sparse=True)

            def train_step(self, batch, criterion):
                found = self.layer(batch["x"][:, 0].abs().long()).squeeze(1)
                return {}, {"loss": criterion(found, batch["y"]) * math.nan}

        with pytest.raises(FloatingPointError, match=r"loss is nan.*first in the gradient of layer\.weight"):
            build(Sparse, nan_policy=policy, nan_skip_limit=2, run_eval=False).fit()


@pytest.mark.parametrize("name", ["save_checkpoint", "save_best_model"])
def test_saving_inside_an_evaluation_is_refused(name):
    save = {"on_eval_epoch_end": lambda trainer: getattr(trainer, name)()}
    with pytest.raises(RuntimeError, match=rf"{name}\(\) inside an evaluation"):
        build(ema_decay=0.9, epochs=1, callbacks=save).fit()


class TestWhatIsSaid:
    def test_a_field_of_the_models_own_config_is_set_too_late(self, monkeypatch, caplog):
        monkeypatch.setattr("sys.argv", ["train.py", "--coqpit.features=5", "--coqpit.lr=0.5"])
        config = ToyConfig()
        Trainer(TrainerArgs(), config, model=Toy(config))
        assert "features=5: set after the model was built, which may not see it" in caplog.text
        assert "lr=0.5: set after" not in caplog.text

    def test_a_field_without_its_prefix(self, monkeypatch, caplog):
        monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "7"])
        config = ToyConfig()
        Trainer(TrainerArgs(), config, model=Toy(config))
        assert "left to the script: --epochs (the config's fields are --coqpit.epochs)" in caplog.text

    def test_a_continued_run_keeps_its_rate(self, caplog):
        first = build(epochs=1)
        first.fit()
        second = continued(first, epochs=2, lr=0.5)
        assert "lr=0.5: a run that is continued keeps what it had (0.1)" in caplog.text
        assert second.optimizer[0].param_groups[0]["lr"] == 0.1

    @pytest.mark.parametrize("name", ["restore_path", "best_path"])
    def test_a_checkpoint_that_is_not_there(self, name):
        with pytest.raises(ValueError, match=f"{name}='nowhere.pth': no such file; give a checkpoint"):
            build(args=TrainerArgs(**{"continue_path": "run", name: "nowhere.pth"}))

    def test_samples_that_are_missing_are_missed_before_the_first_epoch(self):
        for samples, message in ((None, "eval_samples=None, and get_data_loader needs"), ([], "eval_samples is empty")):
            trainer = build(eval_samples=samples)
            with pytest.raises(ValueError, match=message):
                trainer.fit()
            assert trainer.total_steps_done == 0

    def test_a_model_may_bring_its_own_evaluation_samples(self):
        class Bringing(Toy):
            def get_data_loader(self, config, is_eval, samples, verbose):
                return super().get_data_loader(config, is_eval, samples or make_samples(4), verbose)

        trainer = build(Bringing, eval_samples=None, epochs=1)
        trainer.fit()
        assert trainer.best_loss["eval_loss"] < 100

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            ({"loss": torch.ones(())}, r"train_step returned a dict: return \(outputs, losses\)"),
            (({}, {"loss": 1.5}), r"returned losses \(loss: float\) without a tensor 'loss'"),
            (({}, {"loss": torch.ones(8)}), r"loss 'loss' of train_step has shape \[8\]: return a scalar"),
        ],
    )
    def test_results_of_a_step(self, result, message):
        class Wrong(Toy):
            def train_step(self, batch, criterion):
                return result

        with pytest.raises(ValueError, match=message):
            build(Wrong).fit()

    def test_swapped_arguments(self):
        config = ToyConfig()
        with pytest.raises(TypeError, match="args is a ToyConfig: give a TrainerArgs"):
            Trainer(config, TrainerArgs(), model=Toy(config))
        with pytest.raises(TypeError, match="config is a dict: give a TrainerConfig"):
            Trainer(TrainerArgs(), {"epochs": 1}, model=Toy(config))
        assert issubclass(ToyConfig, TrainerConfig)

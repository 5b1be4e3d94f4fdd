"""What real models of Coqui TTS do, and a Trainer has to bear with."""

import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyGan, assert_same_weights, build, weights_of
from trainer import TrainerArgs


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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

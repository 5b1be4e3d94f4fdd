"""What a user hands over by mistake: each has its own error, with name, value and remedy."""

import pytest
import torch
from torch import nn

from tests.trainer.toys import Toy, ToyGan, build, make_samples
from trainer import TrainerModel


@pytest.fixture(autouse=True)
def _output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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

"""The model contract: hooks are found by looking, and what is missing is asked for by name."""

import inspect

import pytest
import torch
from torch import nn

from trainer import TrainerModel
from trainer.model import check_losses, overrides


class Mixin:
    """Not a TrainerModel."""

    def eval_log(self, batch, outputs, logger, steps):
        return "mixin"


class Base(TrainerModel):
    """Overrides one method."""

    def train_step(self, batch, criterion):
        raise NotImplementedError("raised inside of the hook")


class Derived(Mixin, Base):
    """Inherits it, and another one from a mixin."""


def test_overrides_looks_at_the_class_and_never_calls():
    assert [overrides(cls(), "train_step") for cls in (TrainerModel, Base, Derived)] == [False, True, True]
    assert [overrides(cls(), "eval_log") for cls in (TrainerModel, Base, Derived)] == [False, False, True]
    assert not overrides(Derived(), "format_batch")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train_step", ({}, None)),
        ("eval_step", ({}, None, 1)),
        ("inference", (1, 2)),
        ("get_criterion", ()),
        ("get_data_loader", (None, False, [], True)),
        ("get_optimizer", ()),
        ("get_lr", ()),
        ("get_scheduler", ([],)),
        ("train_log", ({}, {}, None, 1)),
        ("eval_log", ({}, {}, None, 1)),
        ("test_run", (None,)),
        ("test_log", (None, None, 1)),
    ],
)
def test_what_is_missing_is_named_with_its_signature(name, arguments):
    class Mine(TrainerModel):
        pass

    with pytest.raises(NotImplementedError) as caught:
        getattr(Mine(), name)(*arguments)
    message = str(caught.value)
    assert message.startswith(f"Mine has no {name}(): define `def {name}(self")
    shown = message.partition("(self")[2].partition(")")[0]
    parameters = [p for p in inspect.signature(getattr(TrainerModel, name)).parameters if p != "self"]
    if name != "inference":
        assert [word.partition("=")[0].strip() for word in shown.split(",") if word.strip()] == parameters


def test_a_base_class_alone_leaves_batches_as_they_are():
    batch = {"x": torch.ones(1)}
    model = TrainerModel()
    assert model.format_batch(batch) is batch
    assert model.format_batch_on_device(batch) is batch
    assert isinstance(model, nn.Module)


class TestLosses:
    def test_sound(self):
        check_losses(Base(), "train_step", None)
        check_losses(Base(), "train_step", {})
        check_losses(Base(), "train_step", {"loss": torch.ones(()), "kl": 3.0})
        check_losses(Base(), "eval_step", {"loss_gen": torch.ones(())}, needs_loss=False)

    @pytest.mark.parametrize(
        ("losses", "found"),
        [
            ({"los": torch.ones(())}, "los: Tensor"),
            ({"loss": 1.0}, "loss: float"),
            ({"loss_gen": 1.0}, "loss_gen: float"),
            (torch.ones(()), "Tensor"),
            ([1], "list"),
        ],
    )
    def test_not_sound(self, losses, found):
        with pytest.raises(ValueError, match=rf"Base.eval_step returned losses \({found}\) without a tensor 'loss'"):
            check_losses(Base(), "eval_step", losses)

"""Callbacks: who is called, in which order, with what."""

import pytest
from torch import nn

from trainer import TrainerModel
from trainer.callbacks import NAMES, Callbacks
from trainer.model import overrides


def test_order_is_model_then_criteria_then_functions():
    heard = []

    class Model(TrainerModel):
        def on_epoch_start(self, trainer):
            heard.append(("model", trainer))

    class Criterion(nn.Module):
        def on_epoch_start(self, trainer):
            heard.append(("criterion", trainer))

    callbacks = Callbacks(
        Model(),
        [None, Criterion()],
        {"on_epoch_start": [lambda t: heard.append(("first", t)), lambda t: heard.append(("second", t))]},
    )
    callbacks("on_epoch_start", "trainer")
    assert heard == [(who, "trainer") for who in ("model", "criterion", "first", "second")]
    callbacks("on_epoch_end", "trainer")
    assert len(heard) == 4


def test_a_criterion_of_several_optimizers_is_called_once():
    heard = []

    class Criterion(nn.Module):
        def before_gradient_clipping(self):
            heard.append(self)

    criterion = Criterion()
    callbacks = Callbacks(TrainerModel(), [criterion, criterion])
    callbacks("before_gradient_clipping")
    assert heard == [criterion]


def test_one_function_and_several_arguments():
    heard = []
    callbacks = Callbacks(TrainerModel(), [], {"before_backward_pass": lambda *args: heard.append(args)})
    callbacks("before_backward_pass", {"loss": 1}, ["optimizer"])
    assert heard == [({"loss": 1}, ["optimizer"])]


def test_a_hook_that_was_set_on_the_model_object():
    heard, model = [], TrainerModel()
    model.on_init_end = heard.append
    Callbacks(model, [])("on_init_end", "trainer")
    assert heard == ["trainer"]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"callbacks: 'on_epoch_stat' is no callback; did you mean 'on_epoch_start'\?"):
        Callbacks(TrainerModel(), [], {"on_epoch_stat": print})


def test_an_exception_is_not_swallowed():
    def broken(trainer):
        raise NotImplementedError("in the callback")

    with pytest.raises(NotImplementedError, match="in the callback"):
        Callbacks(TrainerModel(), [], {"on_init_end": broken})("on_init_end", None)


def test_every_name_is_a_method_that_the_base_class_leaves_empty():
    assert len(NAMES) == len(set(NAMES)) == 15
    for name in NAMES:
        assert not overrides(TrainerModel(), name)
        arguments = {"before_backward_pass": ({}, None), "before_gradient_clipping": ()}.get(name, (None,))
        assert getattr(TrainerModel(), name)(*arguments) is None


def test_a_function_can_be_added_and_taken_away():
    heard, callbacks = [], Callbacks(TrainerModel(), [])
    remove = callbacks.add("on_epoch_end", heard.append)
    callbacks("on_epoch_end", 1)
    remove()
    callbacks("on_epoch_end", 2)
    assert heard == [1]

"""Optimizers, schedulers and criteria: the model's, or those that the config names; and the gradient norm."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from trainer import TrainerConfig, TrainerModel
from trainer.optimizers import (
    build_criteria,
    build_max_norms,
    build_optimizers,
    build_schedulers,
    gradient_norm,
    parameters_of,
    step_schedulers,
)


class Plain(TrainerModel):
    """Two layers and none of the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)


def sgd(*rates: float) -> list[torch.optim.Optimizer]:
    """An SGD for each rate, on a parameter of its own."""
    return [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate) for rate in rates]


class TestOptimizers:
    def test_the_one_that_the_config_names(self):
        model = Plain()
        config = TrainerConfig(optimizer="AdamW", lr=[0.5], optimizer_params={"betas": [0.8, 0.9], "weight_decay": 0.1})
        (optimizer,) = build_optimizers(model, config)
        assert type(optimizer) is torch.optim.AdamW
        (group,) = optimizer.param_groups
        assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (0.5, [0.8, 0.9], 0.1)
        assert [id(p) for p in parameters_of(optimizer)] == [id(p) for p in model.parameters()]

    def test_the_models_own(self):
        class Own(Plain):
            def get_optimizer(self):
                return (torch.optim.SGD(self.a.parameters(), lr=0.1), torch.optim.Adam(self.b.parameters()))

        optimizers = build_optimizers(Own(), TrainerConfig(optimizer="AdamW"))
        assert [type(optimizer) for optimizer in optimizers] == [torch.optim.SGD, torch.optim.Adam]

    @pytest.mark.parametrize("rate", [0.25, [0.25], (0.25,)])
    def test_the_models_own_rate(self, rate):
        class Own(Plain):
            def get_lr(self):
                return rate

        (optimizer,) = build_optimizers(Own(), TrainerConfig(optimizer="SGD", lr=1.0))
        assert optimizer.param_groups[0]["lr"] == 0.25

    def test_an_error_in_a_hook_is_not_hidden(self):
        class Broken(Plain):
            def get_optimizer(self):
                raise NotImplementedError("this layer has no backward")

        with pytest.raises(NotImplementedError, match="this layer has no backward"):
            build_optimizers(Broken(), TrainerConfig(optimizer="SGD"))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"optimizer=None: name a torch.optim class in the config, or define"):
            build_optimizers(Plain(), TrainerConfig())
        with pytest.raises(ValueError, match=r"optimizer='AdmW': there is no torch.optim.AdmW; did you mean 'AdamW'\?"):
            build_optimizers(Plain(), TrainerConfig(optimizer="AdmW"))
        with pytest.raises(ValueError, match=r"optimizer='Optimizer': there is no torch.optim.Optimizer"):
            build_optimizers(Plain(), TrainerConfig(optimizer="Optimizer"))
        with pytest.raises(ValueError, match="2 rates for the one optimizer of the config"):
            build_optimizers(Plain(), TrainerConfig(optimizer="SGD", lr=[0.1, 0.2]))


class TestSchedulers:
    def test_one_name_serves_every_optimizer(self):
        optimizers = sgd(1.0, 2.0)
        config = TrainerConfig(lr_scheduler="ExponentialLR", lr_scheduler_params={"gamma": 0.5})
        schedulers = build_schedulers(Plain(), config, optimizers)
        assert [type(s) for s in schedulers] == [ExponentialLR, ExponentialLR]
        assert [s.optimizer for s in schedulers] == optimizers
        assert [s.gamma for s in schedulers] == [0.5, 0.5]

    def test_one_name_for_each(self):
        config = TrainerConfig(
            lr_scheduler=["ExponentialLR", "StepLR"], lr_scheduler_params=[{"gamma": 0.5}, {"step_size": 3}]
        )
        first, second = build_schedulers(Plain(), config, sgd(1.0, 2.0))
        assert (type(first), first.gamma, type(second), second.step_size) == (ExponentialLR, 0.5, StepLR, 3)

    def test_none(self):
        assert build_schedulers(Plain(), TrainerConfig(), sgd(1.0, 2.0)) == [None, None]
        config = TrainerConfig(lr_scheduler=["StepLR", ""], lr_scheduler_params=[{"step_size": 1}, {}])
        assert [type(s) for s in build_schedulers(Plain(), config, sgd(1.0, 2.0))] == [StepLR, type(None)]

    def test_the_models_own_are_given_the_optimizers(self):
        class Own(Plain):
            def get_scheduler(self, optimizer):
                return [None, StepLR(optimizer[1], 2)]

        optimizers = sgd(1.0, 2.0)
        first, second = build_schedulers(Own(), TrainerConfig(lr_scheduler="ExponentialLR"), optimizers)
        assert (first, second.optimizer) == (None, optimizers[1])

    def test_errors(self):
        with pytest.raises(ValueError, match=r"there is no torch.optim.lr_scheduler.StpLR; did you mean 'StepLR'\?"):
            build_schedulers(Plain(), TrainerConfig(lr_scheduler="StpLR"), sgd(1.0))
        with pytest.raises(ValueError, match=r"3 lr_scheduler, 2 lr_scheduler_params, 2 optimizers: give one of each"):
            build_schedulers(Plain(), TrainerConfig(lr_scheduler=["StepLR"] * 3), sgd(1.0, 2.0))

        class Own(Plain):
            def get_scheduler(self, optimizer):
                return ReduceLROnPlateau(optimizer[0])

        with pytest.raises(ValueError, match="ReduceLROnPlateau"):
            build_schedulers(Own(), TrainerConfig(), sgd(1.0))
        with pytest.raises(ValueError, match="ReduceLROnPlateau"):
            build_schedulers(Plain(), TrainerConfig(lr_scheduler="ReduceLROnPlateau"), sgd(1.0))

        class Short(Plain):
            def get_scheduler(self, optimizer):
                return [StepLR(optimizer[0], 1)]

        with pytest.raises(ValueError, match="1 schedulers, 2 optimizers: give one of each for every optimizer"):
            build_schedulers(Short(), TrainerConfig(), sgd(1.0, 2.0))

    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # no optimizer steps here
    def test_stepping(self):
        optimizers = sgd(1.0, 1.0, 1.0)
        schedulers = [ExponentialLR(optimizers[0], 0.5), ExponentialLR(optimizers[1], 0.5), None]
        step_schedulers(schedulers, {1, 2})
        assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1.0, 0.5, 1.0]


class TestCriteria:
    def build(self, criterion, optimizers: int):
        class Own(Plain):
            def get_criterion(self):
                return criterion

        return build_criteria(Own(), sgd(*[1.0] * optimizers), torch.device("meta"))

    def test_one_serves_all(self):
        criterion = nn.MSELoss()
        assert self.build(criterion, 3) == [criterion] * 3
        assert self.build(None, 2) == [None, None]

    def test_one_for_each(self):
        first, second = nn.MSELoss(), nn.L1Loss()
        assert self.build([first, second], 2) == [first, second]

    def test_on_the_device(self):
        (criterion,) = self.build(nn.CrossEntropyLoss(weight=torch.ones(3)), 1)
        assert criterion.weight.device.type == "meta"

    def test_too_many(self):
        """Coqui's check lets three criteria pass with two optimizers."""
        with pytest.raises(ValueError, match="3 criteria, 2 optimizers: give one of each for every optimizer"):
            self.build([nn.MSELoss()] * 3, 2)


class TestGradientNorm:
    def make(self) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.zeros(n)) for n in (2, 3, 1)]
        parameters[0].grad = torch.tensor([1.0, -2.0])
        parameters[1].grad = torch.tensor([2.0, 4.0, 0.0])
        return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.1)

    def test_norm_over_all_groups(self):
        optimizer = self.make()
        assert gradient_norm(optimizer, 0.0).item() == 5.0  # sqrt(1 + 4 + 4 + 16)
        assert [p.grad.tolist() for p in parameters_of(optimizer)[:2]] == [[1.0, -2.0], [2.0, 4.0, 0.0]]

    def test_clipping_keeps_the_direction_and_returns_the_true_norm(self):
        optimizer = self.make()
        assert gradient_norm(optimizer, 1.0).item() == 5.0
        found = [v for p in parameters_of(optimizer)[:2] for v in p.grad.tolist()]
        assert found == pytest.approx([0.2, -0.4, 0.4, 0.8, 0.0], rel=1e-5)  # torch divides by the norm + 1e-6

    def test_a_small_norm_is_not_touched(self):
        optimizer = self.make()
        gradient_norm(optimizer, 6.0)
        assert [p.grad.tolist() for p in parameters_of(optimizer)[:2]] == [[1.0, -2.0], [2.0, 4.0, 0.0]]

    def test_no_gradients(self):
        assert gradient_norm(sgd(1.0)[0], 1.0).item() == 0.0

    def test_infinite(self):
        optimizer = self.make()
        parameters_of(optimizer)[0].grad[0] = math.inf
        assert gradient_norm(optimizer, 0.0).item() == math.inf


def test_max_norms():
    assert build_max_norms(TrainerConfig(grad_clip=2.0), sgd(1.0, 1.0)) == [2.0, 2.0]
    assert build_max_norms(TrainerConfig(grad_clip=[2.0, 3.0]), sgd(1.0, 1.0)) == [2.0, 3.0]
    with pytest.raises(ValueError, match="1 grad_clip, 2 optimizers"):
        build_max_norms(TrainerConfig(grad_clip=[2.0]), sgd(1.0, 1.0))

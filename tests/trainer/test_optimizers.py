"""Optimizers, rates and criteria: the model's, or those that the config names; and the gradient norm."""

import math
import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from trainer import TrainerConfig, TrainerModel
from trainer.optimizers import (
    build_criteria,
    build_max_norms,
    build_optimizers,
    build_schedulers,
    clip_gradients,
    get_lr,
    gradient_norm,
    parameters_of,
    reset_lr,
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


def rates_of(optimizers: list) -> list[float]:
    """The rates of all groups of all optimizers."""
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


class Pair:
    """Two optimizers that look like one, and are none of torch's: the first one's groups are shown."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        self.first, self.second = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=0.2)
        self.param_groups = self.first.param_groups

    def step(self):
        self.first.step()

    def zero_grad(self, set_to_none=False):
        self.first.zero_grad(set_to_none)

    def state_dict(self):
        return [self.first.state_dict(), self.second.state_dict()]

    def load_state_dict(self, state):
        self.first.load_state_dict(state[0])
        self.second.load_state_dict(state[1])


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

    @pytest.mark.parametrize("name", ["radam", "RAdam", "Radam"])
    def test_coquis_spelling_of_radam(self, name):
        (optimizer,) = build_optimizers(Plain(), TrainerConfig(optimizer=name, optimizer_params=None))
        assert type(optimizer) is torch.optim.RAdam

    def test_several_train_the_whole_model_each(self):
        model = Plain()
        config = TrainerConfig(
            optimizer=["SGD", "Adam"], lr=[0.1, 0.2], optimizer_params=[{"momentum": 0.5}, {"betas": [0.8, 0.9]}]
        )
        first, second = build_optimizers(model, config)
        assert (type(first), type(second)) == (torch.optim.SGD, torch.optim.Adam)
        assert (first.param_groups[0]["lr"], first.param_groups[0]["momentum"]) == (0.1, 0.5)
        assert (second.param_groups[0]["lr"], list(second.param_groups[0]["betas"])) == (0.2, [0.8, 0.9])
        for optimizer in (first, second):
            assert [id(p) for p in parameters_of(optimizer)] == [id(p) for p in model.parameters()]

    def test_one_rate_and_one_dict_serve_several(self):
        config = TrainerConfig(optimizer=["SGD", "RMSprop"], lr=0.5, optimizer_params={"momentum": 0.25})
        groups = [optimizer.param_groups[0] for optimizer in build_optimizers(Plain(), config)]
        assert [(group["lr"], group["momentum"]) for group in groups] == [(0.5, 0.25)] * 2

    def test_what_can_do_an_optimizers_work_will_do(self):
        class Own(Plain):
            def get_optimizer(self):
                self.made = Pair(self.a, self.b)
                return self.made

        model = Own()
        assert build_optimizers(model, TrainerConfig()) == [model.made]

    @pytest.mark.parametrize(("returned", "shown"), [(None, "NoneType"), ([], "an empty list"), ({"a": 1}, "dict")])
    def test_what_is_no_optimizer(self, returned, shown):
        class Own(Plain):
            def get_optimizer(self):
                return returned

        with pytest.raises(
            TypeError, match=rf"^Own.get_optimizer\(\) returned {shown}: return one or several opt.* step"
        ):
            build_optimizers(Own(), TrainerConfig())

    def test_fused_kernels_on_gpus_alone(self):
        def fused(device, model=None, name="AdamW", **params):
            config = TrainerConfig(optimizer=name, optimizer_params=params)
            (optimizer,) = build_optimizers(model or Plain(), config, device and torch.device(device))
            return optimizer.param_groups[0].get("fused")

        assert fused("cuda:0") is fused("cuda", name="SGD") is fused("cuda", name="Adam") is True
        assert fused("cpu") is fused(None) is fused("mps") is None
        assert fused("cuda", name="Adagrad") is fused("cuda", name="RAdam") is None  # whose kernels are for CPUs; none
        assert fused("cuda", fused=False) is False
        assert (
            fused("cuda", foreach=True) is fused("cuda", capturable=False) is fused("cuda", differentiable=True) is None
        )
        sparse, complex_ = Plain(), Plain()
        sparse.c = nn.Embedding(2, 2, sparse=True)
        complex_.c = nn.Parameter(torch.ones(1, dtype=torch.complex64))
        assert fused("cuda", sparse, "SGD") is fused("cuda", complex_) is None

    def test_errors(self):
        with pytest.raises(ValueError, match=r"optimizer=None: name a torch.optim class in the config, or define"):
            build_optimizers(Plain(), TrainerConfig())
        for name, near in (("AdmW", "AdamW"), ("adamw", "AdamW"), ("sgd", "SGD")):
            match = rf"optimizer='{name}': there is no torch.optim.{name}; did you mean '{near}'\?"
            with pytest.raises(ValueError, match=match):
                build_optimizers(Plain(), TrainerConfig(optimizer=name))
        with pytest.raises(ValueError, match=r"optimizer='Optimizer': there is no torch.optim.Optimizer"):
            build_optimizers(Plain(), TrainerConfig(optimizer="Optimizer"))
        with pytest.raises(ValueError, match="optimizer='LBFGS': computes the loss several times"):
            build_optimizers(Plain(), TrainerConfig(optimizer="LBFGS"))

    @pytest.mark.parametrize(
        ("params", "said"),
        [
            ({"betaz": 1}, "unexpected keyword argument 'betaz'; it takes lr, betas, eps"),
            ({"betas": [2.0, 0.9]}, "Invalid beta parameter at index 0: 2.0; it takes"),
            ({"lr": 1.0}, "multiple values for keyword argument 'lr'"),
        ],
    )
    def test_wrong_arguments(self, params, said):
        with pytest.raises(
            ValueError, match=f"^optimizer=AdamW with optimizer_params={re.escape(str(params))}: .*{said}"
        ):
            build_optimizers(Plain(), TrainerConfig(optimizer="AdamW", optimizer_params=params))

    def test_lists_of_other_lengths(self):
        two = {"optimizer": ["SGD", "Adam"]}
        for config, said in (
            (TrainerConfig(optimizer="SGD", lr=[0.1, 0.2]), r"lr: 2 entries \(0.1, 0.2\) for 1 optimizer; give one"),
            (TrainerConfig(**two, lr=[0.1] * 3), r"lr: 3 entries \(0.1, 0.1, 0.1\) for 2 optimizers; give one for all"),
            (TrainerConfig(**two, optimizer_params=[{}] * 3), r"optimizer_params: 3 entries \({}, {}, {}\) for 2"),
            (TrainerConfig(**two, optimizer_params=[]), r"optimizer_params: 0 entries \(\) for 2 optimizers"),
            (
                TrainerConfig(**two, optimizer_modules=[["a"]]),
                r"optimizer: 2 entries \('SGD', 'Adam'\) for 1 optimizer;",
            ),
        ):
            with pytest.raises(ValueError, match=said):
                build_optimizers(Plain(), config)


class TestOptimizerModules:
    def build(self, model, *modules, **changes):
        config = TrainerConfig(**{"optimizer": "SGD", **changes}, optimizer_modules=[list(names) for names in modules])
        return [[id(p) for p in parameters_of(o)] for o in build_optimizers(model, config)]

    def test_each_trains_its_modules_in_the_order_given(self):
        model = Plain()
        model.c = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        model.scale = nn.Parameter(torch.ones(1))
        first, second = self.build(model, ["c.1", "a"], ["c.0", "scale", "b"])
        assert first == [id(p) for p in (*model.c[1].parameters(), *model.a.parameters())]
        assert second == [id(p) for p in (*model.c[0].parameters(), model.scale, *model.b.parameters())]

    def test_names_and_rates_go_with_them(self):
        config = TrainerConfig(optimizer=["SGD", "Adam"], lr=[0.1, 0.2], optimizer_modules=[["b"], ["a"]])
        first, second = build_optimizers(Plain(), config)
        assert (type(first), first.param_groups[0]["lr"], type(second)) == (torch.optim.SGD, 0.1, torch.optim.Adam)
        assert [tuple(p.shape) for p in parameters_of(second)] == [(3, 2), (3,)]

    def test_a_module_within_another_is_taken_once(self):
        model = Plain()
        model.c = nn.Sequential(nn.Linear(1, 1))
        assert self.build(model, ["c", "c.0"], ["a", "b"])[0] == [id(p) for p in model.c.parameters()]

    def test_the_beginning_of_a_name_is_another_name(self):
        model = Plain()
        model.ab = nn.Linear(1, 1)
        assert self.build(model, ["a"], ["b", "ab"])[0] == [id(p) for p in model.a.parameters()]

    def test_frozen_parameters_may_be_among_them_or_left_out(self):
        model = Plain()
        model.a.weight.requires_grad_(False)
        model.c = nn.Linear(1, 1).requires_grad_(False)
        assert self.build(model, ["a"], ["b"])[0] == [id(p) for p in model.a.parameters()]

    def test_errors(self):
        model = Plain()
        with pytest.raises(ValueError, match=r"optimizer_modules: Plain has no module 'aa'"):
            self.build(model, ["aa"], ["b"])
        model.decoder = nn.Linear(1, 1)
        with pytest.raises(ValueError, match=r"Plain has no module 'decodr'; did you mean 'decoder'\?"):
            self.build(model, ["decodr"], ["b"])
        with pytest.raises(
            ValueError, match=r"no optimizer has decoder.weight, decoder.bias; add the module, or freeze"
        ):
            self.build(model, ["a"], ["b"])
        with pytest.raises(ValueError, match=r"no optimizer has a.bias, b.weight, b.bias, ...; add"):
            self.build(model, ["a.weight"])
        with pytest.raises(ValueError, match=r"b.weight belongs to optimizers 0 and 1; give it to one"):
            self.build(model, ["a", "b"], ["b", "decoder"])

    def test_a_shared_parameter_belongs_to_one(self):
        model = Plain()
        model.c = nn.Linear(2, 3)
        model.c.weight = model.a.weight
        with pytest.raises(ValueError, match=r"c.weight belongs to optimizers 0 and 1"):
            self.build(model, ["a"], ["b", "c"])
        part = self.build(model, ["a", "c"], ["b"])[0]
        assert part == [id(p) for p in (model.a.weight, model.a.bias, model.c.bias)]


class TestRates:
    def test_from_the_config_or_the_model(self):
        class Own(Plain):
            def get_lr(self):
                return (0.1, 0.2)

        assert get_lr(Plain(), TrainerConfig(lr=0.5), 3) == [0.5, 0.5, 0.5]
        assert get_lr(Plain(), TrainerConfig(lr=[0.5, 0.25]), 2) == [0.5, 0.25]
        assert get_lr(Own(), TrainerConfig(lr=0.5), 2) == [0.1, 0.2]
        with pytest.raises(ValueError, match=r"get_lr\(\): 2 entries \(0.1, 0.2\) for 3 optimizers; give one for all"):
            get_lr(Own(), TrainerConfig(), 3)

    def groups(self, **changes):
        """An optimizer with two groups of their own rates and another one; scheduled, and stepped twice."""
        first = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.01)], lr=1.0)
        optimizers = [first, *sgd(0.5)]
        schedulers = build_schedulers(Plain(), TrainerConfig(**changes), optimizers)
        for optimizer, scheduler in zip(optimizers, schedulers):
            for _ in range(2):
                optimizer.step()
                if scheduler is None:
                    optimizer.param_groups[0]["lr"] = 7.0
                else:
                    scheduler.step()
        return optimizers, schedulers

    def test_reset_gives_each_group_its_own_rate(self):
        """Coqui's gives every group the first one's, and those of a warm-up what they would have after it."""
        warm_up = {"lr_scheduler": "LinearLR", "lr_scheduler_params": {"start_factor": 0.5, "total_iters": 4}}
        for changes in ({}, warm_up, {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}):
            optimizers, _ = self.groups(**changes)
            assert rates_of(optimizers) != [0.1, 0.01, 0.5]
            reset_lr(optimizers)
            assert rates_of(optimizers) == [0.1, 0.01, 0.5]

    def test_a_schedule_of_base_rates_goes_on_after_a_reset(self):
        optimizers, schedulers = self.groups(lr_scheduler="NoamLR", lr_scheduler_params={"warmup_steps": 4})
        reset_lr(optimizers)
        step_schedulers(schedulers, ["step"] * 2, "step", {0, 1})
        assert rates_of(optimizers) == pytest.approx([0.1, 0.01, 0.5])  # t = 4: the warm-up's end

    def test_a_rate_that_the_model_sets_before_its_schedule_is_its_base(self):
        class Own(Plain):
            def get_scheduler(self, optimizer):
                optimizer[0].param_groups[0]["lr"] = 0.25
                return ExponentialLR(optimizer[0], 0.5)

        optimizers = sgd(1.0)
        (scheduler,) = build_schedulers(Own(), TrainerConfig(), optimizers)
        assert scheduler.base_lrs == [0.25]

    def test_a_rate_that_is_a_tensor_stays_this_tensor(self):
        rate = torch.tensor(0.5)
        optimizers = [torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=rate)]
        build_schedulers(Plain(), TrainerConfig(), optimizers)
        rate.fill_(0.125)
        reset_lr(optimizers)
        assert optimizers[0].param_groups[0]["lr"] is rate
        assert rate.item() == 0.5

    def test_an_object_around_optimizers_that_lists_old_groups(self):
        """As Coqui TTS's CapacitronOptimizer does after load_state_dict, until its next step."""
        pair = Pair(nn.Linear(1, 1), nn.Linear(1, 1))
        build_schedulers(Plain(), TrainerConfig(), [pair])
        pair.load_state_dict(pair.state_dict())
        assert pair.param_groups is not pair.first.param_groups
        pair.first.param_groups[0]["lr"] = 7.0
        reset_lr([pair])
        assert (pair.first.param_groups[0]["lr"], pair.second.param_groups[0]["lr"]) == (0.1, 0.2)

    def test_a_base_rate_that_is_not_known(self):
        with pytest.raises(ValueError, match=r"reset_lr: the base rate of group 0 of SGD is not known: set"):
            reset_lr(sgd(1.0))


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
        with pytest.raises(
            ValueError, match=r"get_criterion\(\): 3 entries \(MSELoss, L1Loss, MSELoss\) for 2 optimizers;"
        ):
            self.build([nn.MSELoss(), nn.L1Loss(), nn.MSELoss()], 2)

    def test_a_function(self):
        assert self.build(nn.functional.mse_loss, 2) == [nn.functional.mse_loss] * 2

    def test_one_for_all_is_called_as_itself(self):
        prediction, target = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
        for optimizers in (1, 2):
            criteria = self.build(nn.MSELoss(), optimizers)
            assert criteria(prediction, target=target).item() == 2.0

    def test_of_several_one_must_be_chosen(self):
        criteria = self.build([nn.MSELoss(), nn.MSELoss()], 2)
        with pytest.raises(TypeError, match=r"each of the 2 optimizers has its own .* call trainer.criterion\[i\]"):
            criteria(torch.ones(1), torch.ones(1))


class TestGradientNorm:
    def make(self) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.zeros(n)) for n in (2, 3, 1)]
        parameters[0].grad = torch.tensor([1.0, -2.0])
        parameters[1].grad = torch.tensor([2.0, 4.0, 0.0])
        return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.1)

    def test_norm_over_all_groups(self):
        optimizer = self.make()
        assert gradient_norm(optimizer).item() == 5.0  # sqrt(1 + 4 + 4 + 16)
        assert [p.grad.tolist() for p in parameters_of(optimizer)[:2]] == [[1.0, -2.0], [2.0, 4.0, 0.0]]

    def test_clipping_keeps_the_direction(self):
        optimizer = self.make()
        clip_gradients(optimizer, 1.0, gradient_norm(optimizer))
        found = [v for p in parameters_of(optimizer)[:2] for v in p.grad.tolist()]
        assert found == pytest.approx([0.2, -0.4, 0.4, 0.8, 0.0], rel=1e-5)  # torch divides by the norm + 1e-6

    @pytest.mark.parametrize("max_norm", [6.0, 0.0, -1.0])
    def test_a_small_norm_is_not_touched_and_a_limit_that_is_not_above_zero_clips_nothing(self, max_norm):
        optimizer = self.make()
        clip_gradients(optimizer, max_norm, gradient_norm(optimizer))
        assert [p.grad.tolist() for p in parameters_of(optimizer)[:2]] == [[1.0, -2.0], [2.0, 4.0, 0.0]]

    def test_no_gradients(self):
        optimizer = sgd(1.0)[0]
        assert gradient_norm(optimizer).item() == 0.0
        clip_gradients(optimizer, 1.0, gradient_norm(optimizer))
        elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(2, device="meta"))], lr=0.1)
        assert gradient_norm(elsewhere).device.type == "meta"

    def test_infinite(self):
        optimizer = self.make()
        parameters_of(optimizer)[0].grad[0] = math.inf
        assert gradient_norm(optimizer).item() == math.inf

    def test_an_object_around_optimizers(self):
        pair = Pair(nn.Linear(1, 1), nn.Linear(1, 1))
        weight, bias = pair.first.param_groups[0]["params"]
        weight.grad, bias.grad = torch.full((1, 1), 3.0), torch.full((1,), 4.0)
        assert gradient_norm(pair).item() == 5.0

    def test_sparse_gradients_count_each_row_once(self):
        """As the same embedding with dense gradients: row 1 is used twice."""
        found = []
        for sparse in (False, True):
            embedding = nn.Embedding(4, 2, sparse=sparse)
            optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
            embedding(torch.tensor([1, 1, 2])).sum().backward()
            norm = gradient_norm(optimizer)
            clip_gradients(optimizer, 1.0, norm)
            found.append((norm.item(), embedding.weight.grad.to_dense().tolist()))
        assert found[0] == found[1]
        assert found[0][0] == pytest.approx(math.sqrt(4 + 4 + 1 + 1))


def test_max_norms():
    two = sgd(1.0, 1.0)
    assert build_max_norms(TrainerConfig(grad_clip=2.0), two) == [2.0, 2.0]
    assert build_max_norms(TrainerConfig(grad_clip=[2.0, 3.0]), two) == [2.0, 3.0]
    assert build_max_norms(TrainerConfig(grad_clip=None), two) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"grad_clip: 3 entries \(1.0, 2.0, 3.0\) for 2 optimizers; give one for all"):
        build_max_norms(TrainerConfig(grad_clip=[1.0, 2.0, 3.0]), two)

"""Schedules: the rates of whole runs against their formulas, what schedulers count, and what a config can name."""

import io
import math
import signal

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from tests.trainer.toys import Toy, ToyGan, build
from trainer import TrainerArgs, TrainerConfig, TrainerModel
from trainer.optimizers import build_schedulers, describe, scheduler_units, step_schedulers
from trainer.schedulers import NoamLR, StepwiseGradualLR

COUNTS = 14
STEPWISE = [[2, 0.5], [5, 0.25], [6, 0.125], [11, 0.0625]]


class Plain(TrainerModel):
    """One layer and none of the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)


def sgd(*rates: float) -> list[torch.optim.Optimizer]:
    """An SGD for each rate, on a parameter of its own."""
    return [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate) for rate in rates]


def cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from start (share 0) to end (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def one_cycle(n: int) -> float:
    """OneCycleLR(max_lr=2, total_steps=14): up during 30 % of the updates, then down to 1/10,000 of the first rate."""
    first, top = 2 / 25, 0.3 * 14 - 1
    return cosine(first, 2.0, n / top) if n <= top else cosine(2.0, first / 1e4, (n - top) / (13 - top))


def warm_restart(base: float, n: int) -> float:
    """CosineAnnealingWarmRestarts(T_0=2, T_mult=2): periods of 2, 4, 8 ... counts."""
    start, period = 0, 2
    while n >= start + period:
        start, period = start + period, 2 * period
    return cosine(base, 0.0, (n - start) / period)


# name: arguments, and the rate after n counts for a group whose own rate is b
FORMULAS = {
    "StepLR": ({"step_size": 3, "gamma": 0.5}, lambda b, n: b * 0.5 ** (n // 3)),
    "MultiStepLR": ({"milestones": [2, 5, 5], "gamma": 0.5}, lambda b, n: b * 0.5 ** ((n >= 2) + 2 * (n >= 5))),
    "ConstantLR": ({"factor": 0.25, "total_iters": 4}, lambda b, n: b * (0.25 if n < 4 else 1)),
    "LinearLR": ({"start_factor": 0.25, "total_iters": 4}, lambda b, n: b * (0.25 + 0.75 * min(n, 4) / 4)),
    "ExponentialLR": ({"gamma": 0.9}, lambda b, n: b * 0.9**n),
    "PolynomialLR": ({"total_iters": 8, "power": 2}, lambda b, n: b * (1 - min(n, 8) / 8) ** 2),
    "CosineAnnealingLR": ({"T_max": 5, "eta_min": 0.01}, lambda b, n: cosine(b, 0.01, n / 5)),
    "CosineAnnealingWarmRestarts": ({"T_0": 2, "T_mult": 2}, warm_restart),
    "CyclicLR": (
        {"base_lr": 0.5, "max_lr": 2.0, "step_size_up": 3, "cycle_momentum": False},
        lambda b, n: 0.5 + 1.5 * (1 - abs(n % 6 - 3) / 3),
    ),
    "OneCycleLR": ({"max_lr": 2.0, "total_steps": COUNTS, "cycle_momentum": False}, lambda b, n: one_cycle(n)),
    "NoamLR": ({"warmup_steps": 4}, lambda b, n: b * min((n + 1) / 4, math.sqrt(4 / (n + 1)))),
    "noamlr": ({}, lambda b, n: b * math.sqrt(0.1 / (n + 1))),
    "StepwiseGradualLR": (
        {"gradual_learning_rates": STEPWISE},
        lambda b, n: 0.5 if n < 5 else 0.25 if n < 6 else 0.125 if n < 11 else 0.0625,
    ),
}

# made of functions or other schedulers, so built by the model
OWN = {
    "LambdaLR": (
        lambda o: torch_schedulers.LambdaLR(o, lambda n: 1 / (1 + n)),
        lambda b, n: b / (1 + n),
    ),
    "MultiplicativeLR": (
        lambda o: torch_schedulers.MultiplicativeLR(o, lambda n: 0.5 if n % 2 else 1.0),
        lambda b, n: b * 0.5 ** ((n + 1) // 2),
    ),
    "ChainedScheduler": (
        lambda o: torch_schedulers.ChainedScheduler(
            [ExponentialLR(o, 0.9), torch_schedulers.ConstantLR(o, 0.5, total_iters=3)]
        ),
        lambda b, n: b * 0.9**n * (0.5 if n < 3 else 1),
    ),
}


class Owner(Plain):
    """A model with a scheduler of its own kind for each optimizer."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def get_scheduler(self, optimizer):
        return [self.make(o) for o in optimizer]


def make_optimizers(several: bool) -> list[torch.optim.Optimizer]:
    """One optimizer with rate 1; or two, the second with groups of their own rates."""
    if not several:
        return sgd(1.0)
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.25, 0.125)]
    return [*sgd(0.5), torch.optim.SGD(groups, lr=9.0)]


def run(optimizers, schedulers, counts: int) -> list[list[float]]:
    """The rates of all groups before each of the next updates."""
    rates = []
    for _ in range(counts):
        rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
        for optimizer in optimizers:
            optimizer.step()
        step_schedulers(schedulers, ["step"] * len(schedulers), "step", range(len(schedulers)))
    return rates


def through_a_file(state):
    """What comes back of a state that is saved, and loaded without executing code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_formula(model, config, formula, several):
    """A whole run; and one that is stopped after 5 counts and goes on in new objects."""
    bases = [0.5, 0.25, 0.125] if several else [1.0]
    expected = [[formula(base, n) for base in bases] for n in range(COUNTS)]
    optimizers = make_optimizers(several)
    whole = run(optimizers, build_schedulers(model, config, optimizers), COUNTS)
    for found, wanted in zip(whole, expected):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)  # products of rates against powers

    first, second = make_optimizers(several), make_optimizers(several)
    schedulers = build_schedulers(model, config, first)
    stopped = run(first, schedulers, 5)
    continued = build_schedulers(model, config, second)
    for old, new in zip([*first, *schedulers], [*second, *continued]):
        new.load_state_dict(through_a_file(old.state_dict()))
    assert stopped + run(second, continued, COUNTS - 5) == whole


@pytest.mark.parametrize("several", [False, True], ids=["one", "two optimizers, three groups"])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_rates_of_a_whole_run(name, several):
    params, formula = FORMULAS[name]
    config = TrainerConfig(lr_scheduler=name, lr_scheduler_params=params)
    check_formula(Plain(), config, formula, several)


@pytest.mark.parametrize("several", [False, True], ids=["one", "two optimizers, three groups"])
@pytest.mark.parametrize("name", OWN)
def test_the_rates_of_a_models_own_schedule(name, several):
    make, formula = OWN[name]
    check_formula(Owner(make), TrainerConfig(), formula, several)


def test_all_of_torchs_schedules_are_checked():
    """A scheduler that a later torch brings is missing here."""
    known = {
        name
        for name, cls in vars(torch_schedulers).items()
        if isinstance(cls, type) and issubclass(cls, torch_schedulers.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert known <= {*FORMULAS, *OWN, "ReduceLROnPlateau", "SequentialLR"}


def test_a_schedule_can_begin_late():
    """Coqui's StepwiseGradualLR waits for a count that equals a threshold, so it keeps the rate it finds."""
    optimizers = sgd(1.0)
    optimizers[0].param_groups[0]["initial_lr"] = 1.0
    (scheduler,) = build_schedulers(
        Plain(),
        TrainerConfig(
            lr_scheduler="StepwiseGradualLR",
            lr_scheduler_params={"gradual_learning_rates": STEPWISE, "last_epoch": 6},
        ),
        optimizers,
    )
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == (7, [0.125])


def test_noam_is_the_papers_up_to_a_constant():
    """d_model^-0.5 * min(t^-0.5, t * warmup^-1.5), with d_model = 512 and warmup = 4000, scaled to 1 at its highest."""
    (optimizer,) = sgd(1.0)
    scheduler = NoamLR(optimizer, warmup_steps=4000)
    for t in (1, 10, 3999, 4000, 4001, 100_000):
        scheduler.last_epoch = t - 1
        paper = 512**-0.5 * min(t**-0.5, t * 4000**-1.5)
        assert scheduler.get_lr()[0] == pytest.approx(paper / (512**-0.5 * 4000**-0.5), rel=1e-12)


def test_states_of_coquis_schedules_load():
    """Its files hold the same names: a warm-up of 4 at the fifth count, and thresholds as tuples."""
    common = {"base_lrs": [0.5], "last_epoch": 4, "_step_count": 5, "_last_lr": [0.1]}
    noam, stepwise = NoamLR(*sgd(1.0), warmup_steps=9), StepwiseGradualLR(*sgd(1.0), [[0, 1.0]])
    noam.load_state_dict({"warmup_steps": 4.0, **common})
    stepwise.load_state_dict({"step_thresholds": (0, 3, 6), "learning_rates": (0.3, 0.2, 0.1), **common})
    assert noam.get_lr() == pytest.approx([0.5 * math.sqrt(4 / 5)])
    assert stepwise.get_lr() == [0.2]


def test_what_the_two_schedules_refuse():
    (optimizer,) = sgd(1.0)
    for steps in (0, -4, math.nan):
        with pytest.raises(ValueError, match=f"warmup_steps={steps}: must be above 0"):
            NoamLR(optimizer, steps)
    for rates in ([], [[0, 0.1, 0.2]]):
        with pytest.raises(ValueError, match=r"gradual_learning_rates=.*: must be pairs such as"):
            StepwiseGradualLR(optimizer, rates)
    for rates in ([[5, 0.1], [3, 0.2]], [[3, 0.1], [3, 0.2]]):
        with pytest.raises(ValueError, match=r"gradual_learning_rates=.*: counts must rise"):
            StepwiseGradualLR(optimizer, rates)


class TestBuilding:
    def build(self, optimizers=2, model=None, **changes):
        return build_schedulers(model or Plain(), TrainerConfig(**changes), sgd(*[1.0] * optimizers))

    def test_one_name_serves_every_optimizer(self):
        optimizers = sgd(1.0, 2.0)
        config = TrainerConfig(lr_scheduler="ExponentialLR", lr_scheduler_params={"gamma": 0.5})
        schedulers = build_schedulers(Plain(), config, optimizers)
        assert [type(s) for s in schedulers] == [ExponentialLR, ExponentialLR]
        assert [s.optimizer for s in schedulers] == optimizers
        assert [s.gamma for s in schedulers] == [0.5, 0.5]

    def test_one_name_for_each(self):
        first, second = self.build(
            lr_scheduler=["ExponentialLR", "StepLR"], lr_scheduler_params=[{"gamma": 0.5}, {"step_size": 3}]
        )
        assert (type(first), first.gamma, type(second), second.step_size) == (ExponentialLR, 0.5, StepLR, 3)

    def test_the_two_of_this_package_in_any_case(self):
        for name in ("NoamLR", "noamlr", "NOAMLR"):
            (scheduler,) = self.build(1, lr_scheduler=name, lr_scheduler_params={"warmup_steps": 3})
            assert (type(scheduler), scheduler.warmup_steps) == (NoamLR, 3.0)
        (scheduler,) = self.build(
            1, lr_scheduler="stepwisegraduallr", lr_scheduler_params={"gradual_learning_rates": STEPWISE}
        )
        assert type(scheduler) is StepwiseGradualLR

    def test_none(self):
        assert self.build() == [None, None]
        assert self.build(lr_scheduler_params=None) == [None, None]
        found = self.build(lr_scheduler=["StepLR", ""], lr_scheduler_params=[{"step_size": 1}, {}])
        assert [type(s) for s in found] == [StepLR, type(None)]

    def test_the_models_own(self):
        class Own(Plain):
            def get_scheduler(self, optimizer):
                return self.make(optimizer)

        def found(make):
            model = Own()
            model.make = make
            optimizers = sgd(1.0, 2.0)
            schedulers = build_schedulers(model, TrainerConfig(lr_scheduler="ExponentialLR"), optimizers)
            return [s and optimizers.index(s.optimizer) for s in schedulers]

        assert found(lambda o: None) == [None, None]
        assert found(lambda o: [None, StepLR(o[1], 2)]) == [None, 1]
        assert found(lambda o: (StepLR(o[0], 2), StepLR(o[1], 2))) == [0, 1]
        # a single one goes where it belongs
        assert found(lambda o: StepLR(o[1], 2)) == [None, 1]
        assert found(lambda o: [StepLR(o[0], 2)]) == [0, None]
        with pytest.raises(
            ValueError, match=r"get_scheduler\(\): 3 schedulers \(StepLR, NoneType, NoneType\) for 2 opt"
        ):
            found(lambda o: [StepLR(o[0], 2), None, None])
        with pytest.raises(
            ValueError, match=r"get_scheduler\(\): 1 schedulers \(StepLR\) for 2 optimizers; return one"
        ):
            found(lambda o: StepLR(sgd(1.0)[0], 2))
        with pytest.raises(TypeError, match=r"Own.get_scheduler\(\) returned a dict: return None or a scheduler"):
            found(lambda o: {"scheduler": StepLR(o[0], 2)})

    def test_errors(self):
        for name, near in (("StpLR", "StepLR"), ("steplr", "StepLR"), ("NoamLRR", "NoamLR")):
            match = rf"lr_scheduler='{name}': there is no torch.optim.lr_scheduler.{name}; did you mean '{near}'\?"
            with pytest.raises(ValueError, match=match):
                self.build(lr_scheduler=name)
        for name in ("_LRScheduler", "LRScheduler"):
            with pytest.raises(ValueError, match=f"there is no torch.optim.lr_scheduler.{name}"):
                self.build(lr_scheduler=name)
        for name in ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"):
            with pytest.raises(
                ValueError, match=rf"lr_scheduler='{name}': .* build it in the model's get_scheduler\(\)"
            ):
                self.build(lr_scheduler=name)
        with pytest.raises(
            ValueError, match=r"lr_scheduler: 3 entries \('StepLR', .*\) for 2 optimizers; give one for all"
        ):
            self.build(lr_scheduler=["StepLR"] * 3)
        with pytest.raises(
            ValueError, match=r"lr_scheduler_params: 3 entries \({}, {}, {}\) for 2 optimizers; give one"
        ):
            self.build(lr_scheduler="StepLR", lr_scheduler_params=[{}] * 3)
        with pytest.raises(
            ValueError, match=r"lr_scheduler=StepLR with lr_scheduler_params={'gama': 1}: .*'gama'; it takes step"
        ):
            self.build(lr_scheduler="StepLR", lr_scheduler_params={"gama": 1})
        with pytest.raises(
            ValueError, match=r"lr_scheduler=StepLR with .*missing 1 required positional argument: 'step_size'"
        ):
            self.build(lr_scheduler="StepLR")


class TestUnits:
    def units(self, *schedulers, **changes):
        return scheduler_units(TrainerConfig(**changes), list(schedulers))

    def schedulers(self):
        first, second = sgd(1.0, 1.0)
        return StepLR(first, 1), ReduceLROnPlateau(second)

    def test_who_decides(self):
        step, plateau = self.schedulers()
        assert self.units(step, None) == ["epoch", "epoch"]
        assert self.units(step, scheduler_after_epoch=False) == ["step"]
        assert self.units(step, plateau) == ["epoch", "evaluation"]
        assert self.units(step, plateau, scheduler_after_epoch=False) == ["step", "evaluation"]
        assert self.units(step, step, lr_scheduler_unit="evaluation") == ["evaluation"] * 2
        assert self.units(step, plateau, lr_scheduler_unit=["step", "evaluation"]) == ["step", "evaluation"]
        step.unit = "step"
        assert self.units(step, plateau, lr_scheduler_unit="evaluation") == ["step", "evaluation"]

    def test_errors(self):
        step, plateau = self.schedulers()
        for unit in ("step", "epoch"):
            with pytest.raises(ValueError, match=f"lr_scheduler_unit='{unit}': ReduceLROnPlateau needs a loss"):
                self.units(step, plateau, lr_scheduler_unit=unit)
        with pytest.raises(ValueError, match=r"lr_scheduler_unit: 3 entries \('step', .*\) for 2 optimizers; give one"):
            self.units(step, step, lr_scheduler_unit=["step"] * 3)
        with pytest.raises(
            ValueError, match="run_eval=False: ReduceLROnPlateau counts evaluations and would never step"
        ):
            self.units(plateau, run_eval=False)
        assert self.units(None, run_eval=False, lr_scheduler_unit="evaluation") == ["evaluation"]
        step.unit = "steps"
        with pytest.raises(ValueError, match="unit='steps' of StepLR: must be one of step, epoch, evaluation"):
            self.units(step)

    def test_stepping_those_that_count_it(self):
        optimizers = sgd(1.0, 1.0, 1.0, 1.0)
        schedulers = [ExponentialLR(optimizer, 0.5) for optimizer in optimizers[:3]] + [None]
        units = ["step", "epoch", "step", "step"]

        def rates():
            return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

        step_schedulers(schedulers, units, "step", {0, 1, 3})
        assert rates() == [0.5, 1.0, 1.0, 1.0]
        step_schedulers(schedulers, units, "epoch", {0, 1, 2, 3})
        assert rates() == [0.5, 0.5, 1.0, 1.0]
        step_schedulers(schedulers, units, "evaluation", {0, 1, 2, 3})
        assert rates() == [0.5, 0.5, 1.0, 1.0]

    def test_the_loss_goes_to_those_that_need_it(self):
        """Halved after one evaluation that is no better; the other one counts evaluations and asks for no loss."""
        optimizers = sgd(1.0, 1.0)
        schedulers = [ReduceLROnPlateau(optimizers[0], factor=0.5, patience=0), ExponentialLR(optimizers[1], 0.5)]
        found = []
        for loss in (3.0, 2.0, 2.0, 1.0, math.nan):
            step_schedulers(schedulers, ["evaluation"] * 2, "evaluation", {0, 1}, metric=loss)
            found.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        assert found == [[1.0, 0.5], [1.0, 0.25], [0.5, 0.125], [0.5, 0.0625], [0.25, 0.03125]]

    def test_what_the_console_says(self):
        step, plateau = self.schedulers()
        assert describe([None, None], ["step", "step"]) == []
        assert describe([step], ["step"]) == ["lr schedule: StepLR, counts steps"]
        assert describe([None, plateau], ["epoch", "evaluation"]) == [
            "lr schedule of optimizer 1: ReduceLROnPlateau, counts evaluations"
        ]


class TestThroughTheTrainer:
    """Six epochs of three updates; the rates that the updates are made with."""

    @pytest.fixture(autouse=True)
    def _output(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def rates(self, model=Toy, stop=None, **changes):
        """The rates of every update, by optimizer; with ``stop``, of a run interrupted there and continued."""
        found = []

        def record(trainer):
            found.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizer])

        def interrupt(trainer):
            if trainer.total_steps_done == stop:
                signal.raise_signal(signal.SIGTERM)

        changes, args = {"lr": 1e-3, **changes}, None
        if stop is not None:
            first = build(model, **changes, callbacks={"on_train_step_start": record, "on_train_step_end": interrupt})
            with pytest.raises(SystemExit):
                first.fit()
            args = TrainerArgs(continue_path=str(first.output_path))
        build(model, **changes, args=args, callbacks={"on_train_step_start": record}).fit()
        return [list(column) for column in zip(*found)]

    @pytest.mark.parametrize("stop", [None, 3, 7, 8, 9])
    @pytest.mark.parametrize("by", ["scheduler_after_epoch", "lr_scheduler_unit"])
    def test_steps_and_epochs(self, stop, by):
        halved = {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}
        by_step, by_epoch = (
            ({by: False}, {by: True}) if by == "scheduler_after_epoch" else ({by: "step"}, {by: "epoch"})
        )
        (found,) = self.rates(stop=stop, **halved, **by_step)
        assert found == [1e-3 * 0.5**n for n in range(18)]
        (found,) = self.rates(stop=stop, **halved, **by_epoch)
        assert found == [1e-3 * 0.5 ** (n // 3) for n in range(18)]

    @pytest.mark.parametrize("stop", [None, 8])
    def test_the_two_of_this_package(self, stop):
        by_step = {"scheduler_after_epoch": False, "stop": stop}
        (found,) = self.rates(lr_scheduler="NoamLR", lr_scheduler_params={"warmup_steps": 5}, **by_step)
        assert found == pytest.approx([1e-3 * min(t / 5, math.sqrt(5 / t)) for t in range(1, 19)], rel=1e-12)
        rates = [[0, 0.01], [4, 0.02], [9, 0.03]]
        params = {"gradual_learning_rates": rates}
        (found,) = self.rates(lr_scheduler="StepwiseGradualLR", lr_scheduler_params=params, **by_step)
        assert found == [0.01] * 4 + [0.02] * 5 + [0.03] * 9

    @pytest.mark.parametrize("stop", [None, 8])
    def test_each_optimizer_has_its_own(self, stop):
        first, second = self.rates(
            ToyGan,
            stop=stop,
            lr_scheduler=["ExponentialLR", "NoamLR"],
            lr_scheduler_params=[{"gamma": 0.5}, {"warmup_steps": 5}],
            lr_scheduler_unit=["epoch", "step"],
        )
        assert first == [1e-3 * 0.5 ** (n // 3) for n in range(18)]
        assert second == pytest.approx([1e-3 * min(t / 5, math.sqrt(5 / t)) for t in range(1, 19)], rel=1e-12)

    @pytest.mark.parametrize("stop", [None, 8, 9])
    def test_evaluations(self, stop):
        """No loss is better than the first one by 1e9, so from the second evaluation on each one halves the rate."""
        params = {"factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs", "eps": 0.0}
        plateau = {"lr_scheduler": "ReduceLROnPlateau", "lr_scheduler_params": params, "stop": stop}
        (found,) = self.rates(**plateau)
        assert found == [1e-3 * 0.5 ** max(n // 3 - 1, 0) for n in range(18)]

    def test_evaluations_between_the_epochs_ends(self):
        """After every two updates, and after the epochs: updates 2, 3, 4, 6, 8, 9 ..."""
        halved = {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}}
        (found,) = self.rates(lr_scheduler_unit="evaluation", run_eval_steps=2, **halved)
        evaluated = [n for n in range(1, 19) if n % 2 == 0 or n % 3 == 0]
        assert found == [1e-3 * 0.5 ** sum(at <= n for at in evaluated) for n in range(18)]

    def test_the_models_own_that_counts_steps_while_the_config_says_epochs(self):
        class Own(Toy):
            def get_scheduler(self, optimizer):
                scheduler = torch_schedulers.LambdaLR(optimizer[0], lambda n: 1 / (1 + n))
                scheduler.unit = "step"
                return scheduler

        (found,) = self.rates(Own)
        assert found == [1e-3 * (1 / (1 + n)) for n in range(18)]

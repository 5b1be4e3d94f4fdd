"""The moving average of the weights: its numbers, and the model that holds it for a while."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from trainer.ema import EMA


class Net(nn.Module):
    """A tied weight, a normalization with buffers, and a frozen parameter."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3, dtype=dtype), nn.Linear(3, 3, dtype=dtype)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3, dtype=dtype)
        self.frozen = nn.Parameter(torch.full((2,), 0.3, dtype=dtype), requires_grad=False)
        self.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)  # integers cannot be averaged

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def make(dtype=torch.float32, decay=0.99):
    torch.manual_seed(0)
    model = Net(dtype)
    return model, torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05), EMA(model, decay)


def train(model, optimizer, ema, updates) -> list:
    """The state after each update."""
    states = []
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=model.first.bias.dtype)).pow(2).mean().backward()
        optimizer.step()
        ema.update()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


class TestTheAverage:
    def test_is_the_formula(self):
        model, optimizer, ema = make(decay=0.6)
        start = {name: p.detach().double() for name, p in model.named_parameters()}
        states = train(model, optimizer, ema, 30)
        # (1 + t) / (10 + t) passes 0.6 at t = 12.5: both branches are in this average
        for name in ("first.weight", "first.bias", "last.bias", "norm.weight"):
            average = start[name]
            for t, state in enumerate(states):
                decay = min(0.6, (1 + t) / (10 + t))
                average = decay * average + (1 - decay) * state[name].double()
            found = ema.state_dict()["weights"][name]
            torch.testing.assert_close(found.double(), average, rtol=1e-6, atol=1e-7)  # fp32 against fp64
            assert not torch.allclose(found, states[-1][name])

    def test_is_that_of_torchs_averaged_model(self):
        model, optimizer, ema = make(decay=0.9)

        def average(mean, value, n):
            decay = min(0.9, n.item() / (9 + n.item()))  # n - 1 updates so far
            return mean.lerp(value, 1 - decay) if value.is_floating_point() else value

        reference = AveragedModel(model, avg_fn=average)
        reference.n_averaged += 1  # or its first update copies
        for _ in range(100):
            train(model, optimizer, ema, 1)
            reference.update_parameters(model)
        found = ema.state_dict()["weights"]
        for name, expected in reference.module.named_parameters():
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7, msg=name)

    def test_of_weights_that_do_not_change_is_the_same_bitwise(self):
        model, optimizer, ema = make()
        train(model, optimizer, ema, 20)
        assert torch.equal(ema.state_dict()["weights"]["frozen"], model.frozen)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_half_precision_is_kept_in_fp32(self, dtype):
        model = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.ones_(model.weight)
        ema = EMA(model, 0.999)
        ema.updates = 100_000  # no warm-up
        nn.init.constant_(model.weight, 2.0)
        for _ in range(10):
            ema.update()
        assert ema._averages[0].dtype == torch.float32
        # 1 + 0.001 is 1 in bfloat16: kept in it, the average would never move
        assert ema._averages[0].item() == pytest.approx(2 - 0.999**10, abs=1e-6)

    def test_of_double_precision_is_kept_in_it(self):
        model, optimizer, ema = make(torch.float64)
        train(model, optimizer, ema, 1)
        assert {average.dtype for average in ema._averages} == {torch.float64}

    def test_takes_the_memory_of_one_copy(self):
        model, _, ema = make()
        assert sum(a.numel() for a in ema._averages) == 9 + 3 + 3 + 3 + 3 + 2  # the tied weight once, no integers
        addresses = {a.data_ptr() for a in ema._averages}
        ema.update()
        assert {a.data_ptr() for a in ema._averages} == addresses
        assert not addresses & {p.data_ptr() for p in model.parameters()}

    def test_reset_starts_from_the_present_weights(self):
        model, optimizer, ema = make()
        train(model, optimizer, ema, 3)
        ema.reset()
        assert ema.updates == 0
        assert torch.equal(ema.state_dict()["weights"]["first.bias"], model.first.bias)

    @pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
    def test_wrong_decay(self, decay):
        with pytest.raises(ValueError, match=rf"ema_decay={decay}: must be in \[0, 1\]"):
            EMA(nn.Linear(1, 1), decay)


class TestSwapped:
    def test_the_model_holds_the_average_and_then_its_own_weights(self):
        model, optimizer, ema = make()
        raw = train(model, optimizer, ema, 5)[-1]
        addresses = [p.data_ptr() for p in model.parameters()]
        with ema.swapped():
            for name, value in model.state_dict().items():
                assert torch.equal(value, ema.state_dict()["weights"][name]), name
            assert not torch.equal(model.first.weight, raw["first.weight"])
            assert model.last.weight is model.first.weight
            assert torch.equal(model.norm.running_mean, raw["norm.running_mean"])
            assert [p.data_ptr() for p in model.parameters()] == addresses
        for name, value in model.state_dict().items():
            assert torch.equal(value, raw[name]), name

    def test_an_exception_puts_the_weights_back(self):
        model, optimizer, ema = make()
        raw = train(model, optimizer, ema, 5)[-1]
        with pytest.raises(KeyError, match="inside"), ema.swapped():
            raise KeyError("inside")
        assert torch.equal(model.first.weight, raw["first.weight"])

    def test_the_training_goes_on_as_without_it(self):
        states = []
        for swapping in (False, True):
            model, optimizer, ema = make()
            train(model, optimizer, ema, 3)
            if swapping:
                with torch.inference_mode(), ema.swapped():
                    model.eval()(torch.ones(2, 3))
                model.train()
            states.append(train(model, optimizer, ema, 3)[-1] | ema.state_dict()["weights"])
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name

    def test_half_precision(self):
        model, optimizer, ema = make(torch.bfloat16)
        raw = train(model, optimizer, ema, 5)[-1]
        average = ema.state_dict()["weights"]["first.weight"].clone()
        with ema.swapped():
            assert torch.equal(model.first.weight, average.bfloat16())
        assert torch.equal(model.first.weight, raw["first.weight"])
        assert torch.equal(ema.state_dict()["weights"]["first.weight"], average)


class TestState:
    def test_another_ema_goes_on_from_it(self):
        model, optimizer, ema = make()
        train(model, optimizer, ema, 4)
        copy, _, other = make()
        copy.load_state_dict(model.state_dict())
        other.load_state_dict({"weights": {n: v.clone() for n, v in ema.state_dict()["weights"].items()}, "updates": 4})
        with torch.no_grad():
            for module in (model, copy):
                module.first.bias.fill_(7)
        ema.update()
        other.update()
        assert ema.updates == other.updates == 5
        for name, value in ema.state_dict()["weights"].items():
            assert torch.equal(value, other.state_dict()["weights"][name]), name

    def test_the_weights_are_a_whole_model(self):
        model, optimizer, ema = make()
        train(model, optimizer, ema, 4)
        copy, _, _ = make()
        copy.load_state_dict(ema.state_dict()["weights"])  # strict
        x = torch.randn(4, 3)
        with ema.swapped(), torch.no_grad():
            assert torch.equal(copy.eval()(x), model.eval()(x))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("first.bias"), "missing: first.bias"),
            (lambda w: w.update({"frozen": torch.ones(3)}), r"frozen: has shape \[3\], the model \[2\]"),
        ],
    )
    def test_another_model_is_refused_and_nothing_changes(self, change, message):
        model, optimizer, ema = make()
        train(model, optimizer, ema, 2)
        state = {"weights": {n: torch.zeros_like(v) for n, v in model.state_dict().items()}, "updates": 9}
        change(state["weights"])
        with pytest.raises(ValueError, match=f"of another model\n  - {message}"):
            ema.load_state_dict(state)
        assert ema.updates == 2
        assert ema.state_dict()["weights"]["first.weight"].any()

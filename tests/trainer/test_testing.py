"""trainer.testing itself: each check passes what is right, and says what is wrong with what is not."""

import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from trainer.testing import (
    Case,
    check_case_learns,
    check_case_padding,
    check_case_shapes,
    check_layer,
    check_padding,
    layers_of,
    moved,
    overfit_one_batch,
    tensors_in,
)


class Sum(nn.Module):
    """A masked layer with a fault of choice: x [B, C, T] and mask [B, 1, T] to [B, C, T] and the sum [B]."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.weight = nn.Parameter(torch.ones(3, 1))
        self.bias = nn.Parameter(torch.zeros(3, 1))

    def forward(self, x, mask):
        y = self.weight * x + (0 if self.fault == "unused" else self.bias)
        if self.fault == "nan":
            y = y / (x - x)
        if self.fault == "shape":
            y = y[:, :2]
        if self.fault == "detached":
            y = y.detach() + self.weight * 0
        if self.fault == "steep":
            y = y + torch.sqrt(self.bias.abs())  # its derivative at 0 is infinite
        return y, (y * (1 if self.fault == "leak" else mask)).sum((1, 2))


def inputs(B: int = 2, T: int = 4) -> tuple:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor([[[T]], [[max(1, T - 2)]]])[:B]).float()
    return torch.randn(B, 3, T, generator=generator), mask


SHAPES = [(2, 3, 4), (2,)]
CASE = Case(build=Sum, inputs=inputs, shapes=lambda B, T: [(B, 3, T), (B,)], sizes=((1, 1), (2, 4)), mask=1)


def test_a_sound_layer_passes_and_its_outputs_come_back():
    layer, given = Sum(), inputs()
    outputs = check_layer(layer, *given, shapes=SHAPES)
    assert torch.equal(outputs[0], given[0])
    torch.testing.assert_close(outputs[1], (given[0] * given[1]).sum((1, 2)))
    check_padding(layer, *given, mask=1)
    for check in (check_case_shapes, check_case_padding, check_case_learns):
        check(CASE)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shape", r"Sum: outputs have shapes \[\(2, 2, 4\), \(2,\)\], expected \[\(2, 3, 4\), \(2,\)\]"),
        ("nan", r"Sum: 24 of 24 values of output 0 are not finite"),
        ("unused", r"Sum: no gradient reaches bias \(largest 0\); is it used\?"),
        ("detached", r"Sum: no gradient reaches weight"),
        ("steep", r"Sum: the gradient of bias is not finite"),
    ],
)
def test_faults_are_named(fault, message):
    layer = Sum(fault)
    with pytest.raises(AssertionError, match=message):
        check_layer(layer, *inputs(), shapes=SHAPES)


def test_parameters_without_gradient_are_excused_by_name_and_no_others():
    check_layer(Sum("unused"), *inputs(), shapes=SHAPES, no_grad_for={"bias": "not used"})
    with pytest.raises(AssertionError, match=r"Sum: bias gets a gradient \(.*\), not as said: not used"):
        check_layer(Sum(), *inputs(), shapes=SHAPES, no_grad_for={"bias": "not used"})
    with pytest.raises(AssertionError, match=r"no_grad_for names \['bais'\], which are no parameters"):
        check_layer(Sum(), *inputs(), shapes=SHAPES, no_grad_for={"bais": "a slip"})


def test_gradients_need_an_output_that_depends_on_parameters():
    layer = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="Linear: no output depends on its parameters"):
        check_layer(layer, torch.ones(1, 2), shapes=(1, 2), call=lambda layer, x: x)
    check_layer(layer, torch.ones(1, 2), shapes=(1, 2), call=lambda layer, x: x, gradients=False)
    check_layer(nn.ReLU(), torch.ones(1, 2), shapes=(1, 2))  # has none


def test_gradients_that_cancel_in_a_sum_are_seen():
    norm = nn.LayerNorm(4)
    layer = nn.Sequential(nn.Linear(3, 4), norm)
    # the plain sum of a normalised row is constant: a check by sum() would miss the linear layer's gradient
    assert layer(torch.randn(2, 3)).sum().abs() < 1e-5
    check_layer(layer, torch.randn(2, 3), shapes=(2, 4))


def test_padding_that_leaks_is_found():
    with pytest.raises(AssertionError, match=r"Sum: padding changes output 1 by .*, allowed is 1e-05"):
        check_padding(Sum("leak"), *inputs(), mask=1)

    class Neighbour(nn.Module):  # each position sees the next one, valid or not
        def forward(self, x, mask):
            return x + torch.roll(x, -1, dims=2)

    with pytest.raises(AssertionError, match="Neighbour: padding changes output 0"):
        check_padding(Neighbour(), *inputs(), mask=1)


def test_padding_of_ids_keeps_them_in_range_and_changes_them():
    seen = []

    class Ids(nn.Module):
        def forward(self, ids, mask):
            seen.append(ids)
            return torch.zeros(1)

    ids, mask = torch.tensor([[3, 0, 2], [1, 3, 3]]), torch.tensor([[[1.0, 1, 0]], [[1, 1, 1]]])
    check_padding(Ids(), ids, mask, mask=1, more=2)
    assert torch.equal(seen[0], ids)
    assert seen[1].tolist() == [[3, 0, 1, 3, 3], [1, 3, 3, 3, 3]]


def test_padding_check_restores_the_mode():
    layer = Sum().train()
    check_padding(layer, *inputs(), mask=1)
    assert layer.training


def test_overfit_reaches_the_bound_or_says_how_far_it_came():
    weight = nn.Parameter(torch.tensor(3.0))
    losses = overfit_one_batch(lambda: (weight - 1) ** 2, [weight], below=1e-3, lr=0.1)
    assert losses[0] == 4.0
    assert losses[-1] < 1e-3 <= min(losses[:-1])
    with pytest.raises(AssertionError, match=r"the loss went from .* to .* in 5 steps, not below -1"):
        overfit_one_batch(lambda: (weight - 1) ** 2, [weight], below=-1, steps=5)
    with pytest.raises(AssertionError, match="the loss is nan in step 1"):
        overfit_one_batch(lambda: weight * float("nan"), [weight], below=1)


def test_overfit_trains_the_given_parameters_only():
    a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    overfit_one_batch(lambda: (a * b - 2) ** 2, [a], below=1e-2)
    assert b.grad is None
    assert b == 1


def test_a_layer_whose_gradient_leads_nowhere_does_not_learn():
    case = replace(CASE, build=lambda: Sum("detached"), below=0.1)
    with pytest.raises(AssertionError, match="the loss went from"):
        check_case_learns(case, steps=50)
    check_case_learns(replace(case, no_learning="known"))


def test_a_case_says_why_there_is_no_padding():
    with pytest.raises(AssertionError, match="neither mask nor no_padding"):
        check_case_padding(replace(CASE, mask=None))
    check_case_padding(replace(CASE, mask=None, no_padding="whole"))


def test_checks_leave_the_random_numbers_alone():
    state = torch.get_rng_state()
    for check in (check_case_shapes, check_case_padding, check_case_learns):
        check(CASE)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_a_module_are_its_own():
    module = types.ModuleType("models.toy")
    module.Own = type("Own", (nn.Module,), {"__module__": "models.toy"})
    module.Plain = type("Plain", (), {"__module__": "models.toy"})
    module.Linear, module.number = nn.Linear, 3
    assert layers_of(module) == {"Own": module.Own}


def test_tensors_are_found_in_order():
    a, b, c = (torch.tensor(i) for i in range(3))
    assert [int(t) for t in tensors_in((a, [None, {"x": b}], "text", c))] == [0, 1, 2]
    assert tensors_in(None) == []


def test_moved_adds_seeded_noise():
    noise = []
    for _ in range(2):
        layer = nn.Linear(200, 200)
        before = layer.weight.detach().clone()
        noise.append(moved(layer, seed=1, by=0.5).weight.detach() - before)
    assert float(noise[0].std()) == pytest.approx(0.5, rel=0.02)  # 40,000 draws: a standard error of 0.4 %
    torch.testing.assert_close(noise[0], noise[1], atol=1e-6, rtol=0)

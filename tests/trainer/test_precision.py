"""Mixed precision: fp32 is untouched, bf16 and fp16 compute in their types, and fp16's scaling cannot be seen."""

import copy

import pytest
import torch
from torch import nn

from trainer import TrainerConfig
from trainer.precision import Precision

CPU = torch.device("cpu")


def make(precision: str | None) -> Precision:
    """Precision on the CPU; None is fp32."""
    config = TrainerConfig() if precision is None else TrainerConfig(mixed_precision=True, precision=precision)
    return Precision(config, CPU)


def model_and_batch() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), torch.randn(16, 5)


class TestFp32:
    def test_gradients_and_step_are_bitwise_those_of_plain_torch(self):
        model, x = model_and_batch()
        plain, precision = copy.deepcopy(model), make(None)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain)]
        for _ in range(3):
            with precision.autocast():
                loss = model(x).square().mean()
            precision.backward(loss, 1.0, None)
            precision.unscale(optimizers[0])
            plain(x).square().mean().backward()
            for a, b in zip(model.parameters(), plain.parameters()):
                assert torch.equal(a.grad, b.grad)
            precision.update()
            for optimizer in optimizers:
                optimizer.step()
            for a, b in zip(model.parameters(), plain.parameters()):
                assert torch.equal(a, b)
            for optimizer in optimizers:
                optimizer.zero_grad()

    def test_forward_is_in_fp32_and_there_is_no_scale(self):
        model, x = model_and_batch()
        precision = make(None)
        with precision.autocast():
            assert model(x).dtype is torch.float32
        assert (precision.stats(), precision.scaler.is_enabled()) == ({}, False)

    def test_precision_counts_only_with_mixed_precision(self):
        assert Precision(TrainerConfig(precision="bf16"), CPU).dtype is None


class TestBackward:
    def test_weight(self):
        parameter = nn.Parameter(torch.tensor([2.0, 3.0]))
        make(None).backward(parameter.square().sum(), 0.25, None)
        assert parameter.grad.tolist() == [1.0, 1.5]  # 2 p / 4

    def test_gradients_add_up(self):
        parameter, precision = nn.Parameter(torch.tensor([2.0])), make(None)
        for _ in range(2):
            precision.backward(parameter.square().sum(), 0.5, [parameter])
        assert parameter.grad.tolist() == [4.0]

    def test_only_the_given_parameters_get_gradients(self):
        generator, discriminator = nn.Linear(2, 2), nn.Linear(2, 1)
        loss = discriminator(generator(torch.ones(3, 2))).mean()
        make(None).backward(loss, 1.0, list(generator.parameters()))
        assert all(p.grad is not None for p in generator.parameters())
        assert all(p.grad is None for p in discriminator.parameters())

    def test_frozen_and_unused_parameters_may_be_given(self):
        model, unused = nn.Linear(2, 1), nn.Parameter(torch.ones(1))
        model.bias.requires_grad_(False)
        make(None).backward(model(torch.ones(3, 2)).mean(), 1.0, [*model.parameters(), unused])
        assert model.weight.grad.tolist() == [[1.0, 1.0]]
        assert (model.bias.grad, unused.grad) == (None, None)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_type(name, dtype):
    model, x = model_and_batch()
    with make(name).autocast():
        assert model(x).dtype is dtype
    assert model(x).dtype is torch.float32


def test_what_must_not_be_under_autocast():
    precision, x = make("bf16"), torch.ones(2, 2)
    with precision.autocast(), precision.no_autocast():
        assert (x @ x).dtype is torch.float32
    with make(None).no_autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_backward_takes_tensors_as_weights_and_torchs_options():
    parameter, precision = nn.Parameter(torch.tensor([2.0])), make(None)
    loss = parameter.square().sum()
    for _ in range(2):
        precision.backward(loss, torch.tensor(0.25), None, retain_graph=True)
    assert parameter.grad.tolist() == [2.0]  # 2 * 2 p / 4


def test_bf16_is_not_scaled():
    parameter, precision = nn.Parameter(torch.tensor([2.0])), make("bf16")
    precision.backward(parameter.square().sum(), 1.0, None)
    assert parameter.grad.tolist() == [4.0]
    assert precision.stats() == {}


class TestFp16:
    def test_unscaled_gradients_are_the_true_ones(self):
        """Within fp16's resolution (2**-11) of the fp32 gradients; the scale of 65536 would be seen."""
        model, x = model_and_batch()
        plain, precision = copy.deepcopy(model), make("fp16")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with precision.autocast():
            loss = model(x).float().square().mean()
        precision.backward(loss, 0.5, None)
        (plain(x).square().mean() * 0.5).backward()
        scale = precision.stats()["amp_scaler"]
        assert scale == 2.0**16
        largest = max(p.grad.abs().max() for p in plain.parameters())
        scaled = [p.grad / scale for p in model.parameters()]
        precision.unscale(optimizer)
        for a, b, c in zip(model.parameters(), plain.parameters(), scaled):
            assert torch.equal(a.grad, c)  # a power of two divides exactly
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=float(largest) * 8 * 2**-11)
        precision.unscale(optimizer)  # a second time in one update: nothing
        assert all(torch.equal(a.grad, c) for a, c in zip(model.parameters(), scaled))

    def test_an_infinite_gradient_halves_the_scale_once_an_update(self):
        good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizers = [torch.optim.SGD([parameter], lr=0.5) for parameter in (good, bad)]
        precision = make("fp16")
        for factor, parameter, optimizer in zip((1.0, float("inf")), (good, bad), optimizers):
            precision.backward((parameter * factor).sum(), 1.0, [parameter])
            precision.unscale(optimizer)
        assert precision.stats()["amp_scaler"] == 2.0**16
        precision.update()
        assert precision.stats() == {"amp_scaler": 2.0**15, "amp_skipped": 0}

    def test_the_next_update_unscales_again(self):
        parameter, precision = nn.Parameter(torch.ones(1)), make("fp16")
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for _ in range(2):
            parameter.grad = None
            precision.backward(parameter.sum(), 1.0, None)
            precision.unscale(optimizer)
            assert parameter.grad.item() == 1.0
            precision.update()

    def test_an_update_in_which_nothing_was_unscaled_leaves_the_scale(self):
        precision = make("fp16")
        for _ in range(2):  # GradScaler.update refuses to be called without
            precision.update()
        assert precision.stats()["amp_scaler"] == 2.0**16

    def test_scaling_without_mixed_precision(self):
        parameter = nn.Parameter(torch.ones(1))
        precision = Precision(TrainerConfig(use_grad_scaler=True), CPU)
        precision.backward(parameter.sum(), 1.0, None)
        assert (precision.scaling, precision.dtype, parameter.grad.item()) == (True, None, 2.0**16)

    def test_state_can_be_continued(self):
        precision, other = make("fp16"), make("fp16")
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        precision.backward(parameter.sum() * float("inf"), 1.0, None)
        precision.unscale(optimizer)
        precision.update()
        other.scaler.load_state_dict(precision.scaler.state_dict())
        assert other.stats()["amp_scaler"] == 2.0**15

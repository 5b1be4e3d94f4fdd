"""BatchNorm over two ranks against torch's BatchNorm on the joint batch, in double precision."""

import contextlib
import copy
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.trainer.two_ranks import on_two_ranks
from trainer.sync_batchnorm import BatchNormSync

CHANNELS = 3


class Transposed(nn.BatchNorm1d):
    """Takes its channels last, as layers of Coqui TTS do."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class WithoutBias(nn.BatchNorm1d):
    """New versions of torch have an argument for it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_parameter("bias", None)


class Own(nn.BatchNorm1d):
    """Does not ask its base class for anything."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


# layer, its arguments, the dimensions after the channels, and both ranks' samples in each micro-batch
CASES = {
    "vectors": (nn.BatchNorm1d, {}, (), [(3, 2), (1, 1), (2, 0)]),
    "1d": (nn.BatchNorm1d, {}, (5,), [(3, 2), (1, 0), (0, 4)]),
    "2d": (nn.BatchNorm2d, {"eps": 0.1, "momentum": 0.3}, (2, 4), [(3, 2), (1, 0)]),
    "3d": (nn.BatchNorm3d, {}, (2, 1, 3), [(1, 4)]),
    "without weights": (nn.BatchNorm1d, {"affine": False}, (5,), [(3, 2), (1, 0)]),
    "without bias": (WithoutBias, {}, (5,), [(3, 2), (1, 0)]),
    "cumulative": (nn.BatchNorm1d, {"momentum": None}, (5,), [(3, 2), (1, 0), (2, 2)]),
    "untracked": (nn.BatchNorm1d, {"track_running_stats": False}, (5,), [(3, 2), (1, 0)]),
    "subclass": (Transposed, {}, (5,), [(3, 2), (1, 0)]),
}


def make_layer(name: str) -> nn.Module:
    """A layer in double precision, with weights and statistics that are no zeros and ones."""
    kind, options, _, _ = CASES[name]
    layer = kind(CHANNELS, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def make_batches(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of both ranks; the mean is far from zero, and other on each rank."""
    kind, _, rest, shares = CASES[name]
    generator = torch.Generator().manual_seed(2)
    batches = []
    for counts in shares:
        pair = [torch.randn(n, CHANNELS, *rest, generator=generator, dtype=torch.float64) for n in counts]
        pair = [10 + rank + (2 + rank) * x for rank, x in enumerate(pair)]
        batches.append(tuple(x.transpose(1, 2) if kind is Transposed else x for x in pair))
    return batches


def sample_losses(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A loss of each sample, which is not symmetric."""
    return (torch.sin(y) * (x.detach() - 9) + y**3).flatten(1).mean(1)


def run(layer: nn.Module, x: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input's gradient of the mean loss times its weight; parameters' gradients add up."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (sample_losses(y, x).mean() * weight).backward()
    return y.detach(), x.grad


def state(layer: nn.Module) -> dict:
    """Gradients and buffers."""
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return copy.deepcopy({**gradients, **dict(layer.named_buffers())})


def run_case(name: str, rank: int) -> dict:
    """What this rank computes with its share of each micro-batch; without one, it repeats the other's."""
    layer = make_layer(name)
    sync, steps = BatchNormSync(layer), []
    for pair in make_batches(name):
        own, n = pair[rank], len(pair[rank])
        with sync.over_ranks(is_counted=n > 0):
            steps.append(run(layer, own if n else pair[1 - rank], n / sum(map(len, pair))))
    found = state(layer)
    summed = [found[key] for key in sorted(found) if key.startswith("gradient")]
    for gradient in summed:
        dist.all_reduce(gradient)  # as DDP does
    layer.eval()
    with sync.over_ranks(rank == 0):
        evaluated = layer(make_batches(name)[0][rank]).detach()
    return {"steps": steps, "state": found, "evaluated": evaluated, "keys": list(layer.state_dict())}


def half_precision(rank: int, dtype: torch.dtype) -> dict:
    """A bf16 input under autocast; values of three bits after the point, so that bf16 holds them."""
    layer = nn.BatchNorm1d(CHANNELS).to(dtype)
    layer.weight.data.fill_(0.75)
    x = torch.randint(16, 48, (2, 4, CHANNELS, 50), generator=torch.Generator().manual_seed(3)) / 8
    own = x[rank].bfloat16().requires_grad_()
    with BatchNormSync(layer).over_ranks(True), torch.autocast("cpu", torch.bfloat16):
        y = layer(own)
    y.backward(x[1 - rank].bfloat16())
    return {"x": x, "y": y.detach(), "dx": own.grad, "buffers": dict(layer.named_buffers()), "dw": layer.weight.grad}


def nested(rank: int) -> dict:
    """Two layers, one of them computed again in the backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Tanh(), nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS))
    model.double()
    sync = BatchNormSync(model)
    x = make_batches("vectors")[0][rank].requires_grad_()
    with sync.over_ranks(True):
        y = model[1:](checkpoint(model[0], x, use_reentrant=False))
        (y**3).sum().backward()
    return {"y": y.detach(), "dx": x.grad}


def step_alone(rank: int) -> torch.Tensor | None:
    """On one rank after a block, which was left by an exception: waiting for the other would hang."""
    layer = make_layer("vectors")
    with contextlib.suppress(KeyError), BatchNormSync(layer).over_ranks(True):
        raise KeyError
    return layer(make_batches("vectors")[0][0]).detach() if rank == 0 else None


def read_the_device(rank: int) -> list[str]:
    """The methods of tensors called in a step that wait for a device."""
    names, calls = ("tolist", "item", "cpu", "numpy", "__float__", "__bool__", "__int__"), []
    layer = make_layer("cumulative")
    x = make_batches("cumulative")[0][rank]
    with contextlib.ExitStack() as stack:
        for name in names:
            original = getattr(torch.Tensor, name)
            spy = functools.partialmethod(_noted, calls, name, original)
            stack.enter_context(mock.patch.object(torch.Tensor, name, spy))
        stack.enter_context(BatchNormSync(layer).over_ranks(True))
        run(layer, x, 0.5)
    return calls


def _noted(tensor, calls, name, original, *args):
    calls.append(name)
    return original(tensor, *args)


def what_is_refused(rank: int) -> list:
    layer = make_layer("vectors")
    sync, messages = BatchNormSync(layer), []
    for x in (torch.ones(1, CHANNELS), torch.ones(2, CHANNELS + 1), torch.ones(2, CHANNELS, 1, 1)):
        with sync.over_ranks(is_counted=rank == 0), pytest.raises(ValueError) as error:  # noqa: PT011
            layer(x.double())
        messages.append(str(error.value))
    with sync.over_ranks(True):
        x = torch.randn(2, CHANNELS, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable") as error:
            gradient.sum().backward()
    return [*messages, layer.running_mean.isfinite().all().item()]


def all_parts(rank: int, folder: Path) -> dict:
    """All that a rank does."""
    found = {name: run_case(name, rank) for name in CASES}
    found["half"] = {dtype: half_precision(rank, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for part in (nested, step_alone, read_the_device, what_is_refused):
        found[part.__name__] = part(rank)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What rank 0 and rank 1 found."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), all_parts, in_a_group=True)


@pytest.mark.parametrize("name", CASES)
class TestAgainstTheJointBatch:
    """Everything that a layer computes, to 1e-10 in double precision: values are below 1e4, and lose 1e-16 of that."""

    def close(self, found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def test_outputs_and_gradients(self, results, name):
        layer = make_layer(name)
        for i, pair in enumerate(make_batches(name)):
            y, dx = run(layer, torch.cat(pair), 1.0)
            ends = [0, len(pair[0]), sum(map(len, pair))]
            for rank in range(2):
                found_y, found_dx = results[rank][name]["steps"][i]
                if len(pair[rank]):
                    self.close(found_y, y[ends[rank] : ends[rank + 1]])
                    self.close(found_dx, dx[ends[rank] : ends[rank + 1]])
                else:  # it repeats the other's batch
                    self.close(found_y, y)
                    self.close(found_dx, torch.zeros_like(dx))
        expected = state(layer)
        for found in results:
            assert found[name]["state"].keys() == expected.keys()
            for key, value in expected.items():
                self.close(found[name]["state"][key], value)
        layer.eval()
        for rank, found in enumerate(results):
            own = layer(make_batches(name)[0][rank]).detach()
            self.close(found[name]["evaluated"], own)
            assert found[name]["keys"] == list(layer.state_dict())

    def test_ranks_are_bitwise_equal(self, results, name):
        first, second = (found[name]["state"] for found in results)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_full(results, dtype):
    results = [result["half"][dtype] for result in results]
    x = results[0]["x"].double()
    layer = nn.BatchNorm1d(CHANNELS).double()
    layer.weight.data.fill_(0.75)
    joint = x.flatten(0, 1).requires_grad_()
    y = layer(joint)
    y.backward(x.flip(0).flatten(0, 1))
    for rank, found in enumerate(results):
        assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
        # rounded once, to 8 bits, but for an error of 2^-24 in fp32
        torch.testing.assert_close(found["y"].double(), y.detach()[4 * rank : 4 * rank + 4], rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(found["dx"].double(), joint.grad[4 * rank : 4 * rank + 4], rtol=2**-8, atol=1e-6)
        for name, buffer in layer.named_buffers():
            # a running statistic in bf16 is rounded when it is multiplied, and when something is added
            close = 1e-6 if dtype is torch.float32 else 2**-7
            torch.testing.assert_close(found["buffers"][name].to(buffer.dtype), buffer, rtol=close, atol=1e-6)
    first, second = (found["dw"].double() for found in results)
    # 400 terms below 12, in fp32 off by at most 2^-20 of that; each rank's sum is then rounded to the weight's type
    rounding = 0.0 if dtype is torch.float32 else 2**-8 * (first.abs() + second.abs()).max().item()
    torch.testing.assert_close(first + second, layer.weight.grad, rtol=0, atol=400 * 12 * 2**-20 + rounding)


def test_two_layers_and_activation_checkpointing(results):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Tanh(), nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS))
    model.double()
    pair = make_batches("vectors")[0]
    x = torch.cat(pair).requires_grad_()
    y = model(x)
    (y**3).sum().backward()
    for part, expected in (("y", y.detach()), ("dx", x.grad)):
        found = torch.cat([result["nested"][part] for result in results])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_outside_the_block_a_rank_is_alone(results):
    expected = make_layer("vectors")(make_batches("vectors")[0][0]).detach()
    assert torch.equal(results[0]["step_alone"], expected)


def test_a_step_does_not_wait_for_the_device(results):
    assert [found["read_the_device"] for found in results] == [[], []]


def test_what_a_layer_refuses(results):
    for found in results:
        assert found["what_is_refused"] == [
            "one value for each channel on all ranks, input [1, 3]: take more samples",
            "BatchNorm of 3 channels got 4: [2, 4]",
            "expected 2D or 3D input (got 4D input)",
            True,
        ]


class TestConversion:
    """In place."""

    def test_everything_stays_what_it_was(self):
        shared = nn.BatchNorm1d(4)
        model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), shared), "b": shared, "c": nn.BatchNorm2d(2)})
        model["c"].register_forward_hook(lambda *_: torch.tensor(7.0))
        model["c"].eval()
        before, twin = model.state_dict(keep_vars=True), copy.deepcopy(model)
        sync = BatchNormSync(model)
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(before)
        assert all(after[name] is tensor for name, tensor in before.items())
        assert [layer is model[name] for layer, name in zip(sync.layers, "bc")] == [True, True]
        assert model["a"][1] is model["b"] is shared
        assert isinstance(shared, nn.BatchNorm1d)
        assert isinstance(model["c"], nn.BatchNorm2d)
        assert model["c"](torch.ones(1, 2, 3, 3)) == 7.0
        twin.load_state_dict(model.state_dict())
        x = torch.randn(5, 4)
        assert torch.equal(model["b"](x), twin["b"](x))
        assert torch.equal(copy.deepcopy(model)["b"](x), twin["b"](x))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (nn.SyncBatchNorm(3), "0 is a SyncBatchNorm, whose statistics"),
            (nn.LazyBatchNorm1d(), "0 is a LazyBatchNorm1d, whose statistics"),
            (Own(3), "0 is a Own, whose statistics"),
            (nn.InstanceNorm1d(3), "Sequential has no BatchNorm layer"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
    def test_what_is_refused(self, layer, message):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=f"sync_batchnorm=True: {message}"):
            BatchNormSync(model)
        assert type(model[0]) is type(layer)

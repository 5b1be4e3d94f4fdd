"""Devices: picking one, moving batches to it, counting their samples. The meta device stands for a GPU."""

import collections
import types
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from trainer.device import count_samples, pick_device, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    """A batch of this form comes from many loaders."""

    x: torch.Tensor
    note: str


@dataclass(frozen=True)
class Item:
    """Frozen, and with a field that is computed."""

    x: torch.Tensor
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.x))


@dataclass
class Features:
    """With a tensor that is no argument, an argument that is no field, and a field that nobody has set."""

    x: torch.Tensor
    scale: InitVar[float]
    scaled: torch.Tensor = field(init=False)
    unset: torch.Tensor = field(init=False)

    def __post_init__(self, scale: float) -> None:
        self.scaled = self.x * scale


class Movable:
    """Knows by itself how to move, as transformers' BatchEncoding does."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.calls = x, []

    def to(self, device, non_blocking=False):
        self.calls.append((device, non_blocking))
        return Movable(self.x.to(device))


class SimplyMovable(Movable):
    """Its method has no options."""

    def to(self, device):
        return super().to(device)


@pytest.fixture
def machine(monkeypatch):
    """A function that sets how many GPUs there are, and whether there is mps."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def set_machine(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return set_machine


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(2, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_fastest(machine, cuda, mps, expected):
    machine(cuda, mps)
    assert pick_device("auto") == torch.device(expected)


def test_a_named_device(machine):
    machine(2, True)
    for name in ("cpu", "mps", "cuda", "cuda:1"):
        assert pick_device(name) == torch.device(name)
    message = "device='cuda:2': cuda:2 is not on this machine; take auto or one of cuda, cuda:0, cuda:1, mps, cpu$"
    with pytest.raises(ValueError, match=message):
        pick_device("cuda:2")
    machine(0, False)
    with pytest.raises(ValueError, match=r"device='gpu': gpu is not on this machine; take auto or one of cpu$"):
        pick_device("gpu")


class TestGpu:
    """--gpu N."""

    @pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
    def test_is_an_index(self, machine, name):
        machine(3, False)
        assert pick_device(name, gpu=1) == torch.device("cuda:1")
        assert pick_device("auto", gpu=0) == torch.device("cuda:0")

    def test_that_is_not_there(self, machine):
        machine(2, False)
        message = "gpu=2 with device='auto': cuda:2 is not on this machine; take auto or one of cuda, cuda:0, cuda:1, "
        with pytest.raises(ValueError, match=message):
            pick_device("auto", gpu=2)
        machine(0, True)
        with pytest.raises(ValueError, match=r"cuda:0 is not on this machine; take auto or one of mps, cpu$"):
            pick_device("auto", gpu=0)

    @pytest.mark.parametrize("name", ["cpu", "mps", "cuda:0"])
    def test_contradicts_another_device(self, machine, name):
        machine(2, True)
        with pytest.raises(ValueError, match=f"gpu=1 with device='{name}': they contradict each other"):
            pick_device(name, gpu=1)

    def test_is_ignored_where_cuda_visible_devices_has_chosen(self, machine, monkeypatch):
        machine(1, False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
        assert pick_device("auto", gpu=5) == torch.device("cuda")
        assert pick_device("cpu", gpu=5) == torch.device("cpu")


class TestSeveralRanks:
    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_each_has_its_gpu(self, machine, monkeypatch, name):
        machine(2, False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")  # which the launcher sets
        assert [pick_device(name, 7, rank) for rank in (0, 1)] == [torch.device("cuda:0"), torch.device("cuda:1")]
        with pytest.raises(ValueError, match=f"device='{name}' of rank 2 on this machine: cuda:2 is not on"):
            pick_device(name, local_rank=2)

    def test_on_the_cpu(self, machine):
        machine(2, False)
        assert pick_device("cpu", local_rank=1) == torch.device("cpu")
        machine(0, True)  # no mps: ranks cannot talk to each other there
        assert pick_device("auto", local_rank=1) == torch.device("cpu")

    @pytest.mark.parametrize("name", ["mps", "cuda:0"])
    def test_one_device_is_not_enough(self, machine, name):
        machine(2, True)
        with pytest.raises(ValueError, match=f"device='{name}' of rank 1 on this machine: they contradict each other"):
            pick_device(name, local_rank=1)


def test_every_tensor_is_moved_however_deep():
    """Coqui's Trainer leaves what is nested deeper than one dict on the CPU."""
    x = torch.ones(2)
    batch = {
        "x": x,
        "deep": {"er": [{"x": x}, (x, "text")]},
        "pair": Pair(x, "n"),
        "item": Item(x),
        "ordered": collections.OrderedDict(a=x),
        "set": {1, "a"},
        "other": [1, None, "s", Item, torch.Size([2])],
    }
    moved = to_device(batch, META)
    tensors = [
        moved["x"],
        moved["deep"]["er"][0]["x"],
        moved["deep"]["er"][1][0],
        moved["pair"].x,
        moved["item"].x,
        moved["ordered"]["a"],
    ]
    assert {tensor.device for tensor in tensors} == {META}
    assert moved["deep"]["er"][1][1] == "text"
    assert (type(moved["pair"]), moved["pair"].note) == (Pair, "n")
    assert (type(moved["item"]), moved["item"].size) == (Item, 2)
    assert moved["set"] == {1, "a"}
    assert moved["other"] == [1, None, "s", Item, torch.Size([2])]
    assert batch["x"].device.type == batch["deep"]["er"][0]["x"].device.type == "cpu"  # the given batch stays


def test_mappings_keep_their_type_and_what_they_hold():
    x = torch.ones(2)
    ordered = collections.OrderedDict(b=x, a=x)
    default = collections.defaultdict(list, x=x)
    moved = to_device([ordered, default, collections.UserDict(x=x), types.MappingProxyType({"x": x})], META)
    assert [type(m) for m in moved] == [
        collections.OrderedDict,
        collections.defaultdict,
        collections.UserDict,
        types.MappingProxyType,
    ]
    assert list(moved[0]) == ["b", "a"]
    assert moved[1]["new"] == []
    assert {value.device for m in moved for value in m.values() if len(value)} == {META}
    assert {ordered["a"].device.type, default["x"].device.type} == {"cpu"}
    assert "new" not in default


def test_a_dataclass_is_not_built_anew():
    given = Features(torch.ones(2), scale=3.0)
    given.scaled += 1
    moved = to_device(given, torch.device("cpu"))
    assert torch.equal(moved.scaled, torch.full((2,), 4.0))
    moved = to_device(given, META)
    assert (moved.x.device, moved.scaled.device, given.x.device.type) == (META, META, "cpu")
    assert not hasattr(moved, "unset")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_containers_are_new_and_tensors_that_stay_are_the_same(device):
    """A model may leave things in its batch; with overfit_batch the same batch comes again."""
    x = torch.ones(2, device=device)
    item = Item(x)
    batch = {"x": x, "list": [x], "tuple": (x,), "item": item, "packed": pack_sequence([torch.ones(1)])}
    moved = to_device(batch, torch.device(device))
    assert moved["x"] is moved["list"][0] is moved["tuple"][0] is moved["item"].x is x
    for given, found in ((batch, moved), (batch["list"], moved["list"]), (item, moved["item"])):
        assert found is not given
    if device == "cpu":
        assert moved["packed"].data is batch["packed"].data


def test_what_moves_itself():
    given, simple = Movable(torch.ones(2)), SimplyMovable(torch.ones(2))
    moved = to_device({"a": given, "b": simple, "class": Movable}, META)
    assert (moved["a"].x.device, moved["b"].x.device) == (META, META)
    assert given.calls == [(META, True)]
    assert moved["class"] is Movable


def test_transformers_batch_encoding():
    encoding = pytest.importorskip("transformers").BatchEncoding({"ids": torch.ones(1, 2), "text": "a"})
    moved = to_device({"x": encoding}, META)["x"]
    assert (type(moved), moved["ids"].device, moved["text"]) == (type(encoding), META, "a")


class TestToAGpu:
    """A recorder stands for the GPU."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """What is done, in order: ("pin", shape) and ("to", device, options)."""
        calls, pinned = [], []

        def pin_memory(tensor):
            calls.append(("pin", tensor.tolist()))
            pinned.append(tensor.clone())
            return pinned[-1]

        def to(tensor, device=None, **options):
            if device is None:  # a PackedSequence's dtype
                return tensor
            calls.append(("to", str(device), options, any(tensor is p for p in pinned)))
            return tensor

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: any(tensor is p for p in pinned))
        monkeypatch.setattr(torch.Tensor, "to", to)
        return calls

    def test_pageable_memory_is_pinned_first_and_nothing_waits(self, calls):
        to_device([torch.ones(1)], torch.device("cuda"))
        assert calls == [("pin", [1.0]), ("to", "cuda", {"non_blocking": True}, True)]

    def test_a_packed_sequence(self, calls):
        packed = pack_sequence([torch.ones(1), torch.ones(2)], enforce_sorted=False)
        calls.clear()
        to_device(packed, torch.device("cuda"))
        assert [call[1] for call in calls if call[0] == "pin"] == [[1.0] * 3, [1, 0], [1, 0]]
        assert [call for call in calls if call[0] == "to"] == [("to", "cuda", {"non_blocking": True}, True)] * 3

    def test_pinned_memory_is_not_pinned_again(self, calls):
        pinned = torch.ones(1).pin_memory()
        calls.clear()
        to_device([pinned], torch.device("cuda:1"))
        assert calls == [("to", "cuda:1", {"non_blocking": True}, True)]

    def test_what_cannot_be_pinned_is_not(self, calls):
        to_device([torch.ones(1, device="meta"), torch.ones(1).to_sparse()], torch.device("cuda"))
        assert calls == [("to", "cuda", {"non_blocking": True}, False)] * 2

    @pytest.mark.parametrize("name", ["meta", "mps", "cpu"])
    def test_for_other_devices_nothing_is_pinned(self, calls, name):
        to_device([torch.ones(1)], torch.device(name))
        assert calls == [("to", name, {"non_blocking": True}, False)]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"audio": {"f0": ["text", torch.ones(1).double()]}}, r"batch\['audio'\]\['f0'\]\[1\] is float64, "),
        (Pair(torch.ones(1).to(torch.complex128), "n"), "batch.x is complex128, "),
        (Item(torch.ones(1).double()), "batch.x is float64, "),
    ],
)
def test_mps_has_no_double_precision(batch, message):
    with pytest.raises(TypeError, match=f"^{message}which mps does not have: make it single precision"):
        to_device(batch, torch.device("mps"))


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_cpu():
    packed = to_device({"x": pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)}, META)["x"]
    assert (packed.data.device, packed.batch_sizes.device.type) == (META, "cpu")
    assert (packed.sorted_indices.device, packed.unsorted_indices.device) == (META, META)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 2),
        {"name": ["a"], "rate": torch.tensor(1.0), "x": torch.zeros(5, 2), "y": torch.zeros(7)},
        [torch.zeros(5), torch.zeros(7)],
        ("text", {"deep": [None, torch.zeros(5)]}),
        Pair(torch.zeros(5), "n"),
        Item(torch.zeros(5)),
        collections.UserDict(x=torch.zeros(5)),
        pack_sequence([torch.zeros(4)] * 5),
        torch.zeros(5, 2, device="meta"),
    ],
)
def test_samples_are_the_first_dimension_of_the_first_tensor(batch):
    assert count_samples(batch) == 5


@pytest.mark.parametrize("batch", [{"a": [1, 2]}, torch.tensor(3.0), [], Item])
def test_a_batch_without_tensors(batch):
    with pytest.raises(ValueError, match=rf"a batch \({type(batch).__name__}\) holds no tensor"):
        count_samples(batch)

"""Devices: picking one, moving batches to it, counting their samples. The meta device stands for a GPU."""

import collections
from dataclasses import dataclass, field
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


def set_machine(monkeypatch, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(2, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_fastest(monkeypatch, cuda, mps, expected):
    set_machine(monkeypatch, cuda, mps)
    assert pick_device("auto") == torch.device(expected)


def test_a_named_device(monkeypatch):
    set_machine(monkeypatch, 2, True)
    for name in ("cpu", "mps", "cuda", "cuda:1"):
        assert pick_device(name) == torch.device(name)
    message = "device='cuda:2': not on this machine; take auto or one of cuda, cuda:0, cuda:1, mps, cpu"
    with pytest.raises(ValueError, match=message):
        pick_device("cuda:2")
    set_machine(monkeypatch, 0, False)
    with pytest.raises(ValueError, match=r"device='gpu': not on this machine; take auto or one of cpu$"):
        pick_device("gpu")


def test_every_tensor_is_moved_however_deep():
    """Coqui's Trainer leaves what is nested deeper than one dict on the CPU."""
    x = torch.ones(2)
    batch = {
        "x": x,
        "deep": {"er": [{"x": x}, (x, "text")]},
        "pair": Pair(x, "n"),
        "item": Item(x),
        "ordered": collections.OrderedDict(a=x),
        "other": [1, None, "s", Item],
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
    assert moved["other"] == [1, None, "s", Item]
    assert batch["x"].device.type == batch["deep"]["er"][0]["x"].device.type == "cpu"  # the given batch stays


def test_copies_do_not_wait(monkeypatch):
    seen = []
    original = torch.Tensor.to

    def spy(self, *args, **kwargs):
        seen.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    to_device([torch.ones(1)], META)
    assert seen == [{"non_blocking": True}]


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_cpu():
    packed = to_device({"x": pack_sequence([torch.ones(3), torch.ones(2)])}, META)["x"]
    assert (packed.data.device, packed.batch_sizes.device.type) == (META, "cpu")


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 2),
        {"name": ["a"], "rate": torch.tensor(1.0), "x": torch.zeros(5, 2), "y": torch.zeros(7)},
        [torch.zeros(5), torch.zeros(7)],
        ("text", {"deep": [None, torch.zeros(5)]}),
        Pair(torch.zeros(5), "n"),
        Item(torch.zeros(5)),
        torch.zeros(5, 2, device="meta"),
    ],
)
def test_samples_are_the_first_dimension_of_the_first_tensor(batch):
    assert count_samples(batch) == 5


@pytest.mark.parametrize("batch", [{"a": [1, 2]}, torch.tensor(3.0), [], Item])
def test_a_batch_without_tensors(batch):
    with pytest.raises(ValueError, match=rf"a batch \({type(batch).__name__}\) holds no tensor"):
        count_samples(batch)

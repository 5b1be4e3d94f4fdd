"""Finding ranks whose weights have drifted apart."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.two_ranks import on_two_ranks
from trainer.distributed import Ranks
from trainer.drift import _CHUNK, DriftCheck, hash_parameters

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool)


def hash_of(tensor: torch.Tensor) -> int:
    model = nn.Module()
    model.p = nn.Parameter(tensor, requires_grad=False)
    return hash_parameters(model)["p"]


class TestHash:
    """Of one parameter."""

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_every_flipped_bit_is_noticed(self, dtype):
        tensor = torch.tensor([1, 0, 1, 1]).to(dtype)
        flips = range(1) if dtype is torch.bool else range(8 * tensor.element_size())
        hashes = {hash_of(tensor)}
        for index in range(4):
            for bit in flips:
                other = tensor.clone()
                other.view(torch.uint8)[index * tensor.element_size() + bit // 8] ^= 1 << bit % 8
                hashes.add(hash_of(other))
        assert len(hashes) == 1 + 4 * len(flips)

    def test_bits_count_and_not_values(self):
        assert hash_of(torch.tensor([0.0])) != hash_of(torch.tensor([-0.0]))
        nan = torch.tensor([math.nan, 1.0])
        assert hash_of(nan) == hash_of(nan.clone())
        assert hash_of(nan) != hash_of(-nan)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_differences_of_many_elements_are_noticed(self, dtype):
        tensor = torch.randn(2 * _CHUNK + 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        swapped, swapped_chunks = tensor.clone(), tensor.clone()
        swapped[[5, 900]] = tensor[[900, 5]]
        swapped_chunks[:_CHUNK], swapped_chunks[_CHUNK : 2 * _CHUNK] = tensor[_CHUNK : 2 * _CHUNK], tensor[:_CHUNK]
        signs, same_place = tensor.clone(), tensor.clone()
        signs[[3, 4]] *= -1
        same_place[[7, 7 + _CHUNK]] *= -1
        others = [swapped, swapped_chunks, signs, same_place, -tensor, 2 * tensor, tensor.flip(0), tensor[:-1]]
        assert len({hash_of(other) for other in [tensor, *others]}) == 9

    def test_the_last_element_of_a_large_parameter_counts(self):
        tensor = torch.zeros(3 * _CHUNK + 1)
        other = tensor.clone()
        other[-1] = 1e-45
        assert hash_of(tensor) != hash_of(other)

    def test_it_is_the_sum_that_it_says(self):
        factors = (
            torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=torch.Generator().manual_seed(0)) | 1
        ).tolist()
        expected = (3 * factors[0] - 7 * factors[1]) % 2**64
        assert hash_of(torch.tensor([3, -7], dtype=torch.int32)) % 2**64 == expected

    def test_strides_do_not_count_and_odd_shapes_work(self):
        tensor = torch.arange(6.0).view(2, 3)
        assert hash_of(tensor.t().contiguous().t()) == hash_of(tensor)
        assert hash_of(torch.tensor(2.5)) == hash_of(torch.tensor([2.5]))
        assert hash_of(torch.zeros(0)) == 0

    def test_parameters_by_name_without_buffers_and_sharded_ones(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        model[2].weight = model[0].weight
        model[2].bias.device_mesh = "as a DTensor has it"
        assert list(hash_parameters(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert hash_parameters(nn.Flatten()) == {}

    def test_no_random_number_is_taken(self):
        before = torch.get_rng_state()
        hash_of(torch.ones(3))
        assert torch.equal(torch.get_rng_state(), before)


class Gathered:
    """Ranks as one process sees them: this model's hashes are gathered with those of others."""

    def __init__(self, others: list[nn.Module]) -> None:
        self.others, self.world_size, self.calls = others, 1 + len(others), 0

    def gather(self, mine):
        self.calls += 1
        return [mine, *map(hash_parameters, self.others)]


def make_models(n: int) -> list[nn.Module]:
    models = []
    for _ in range(n):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    return models


def spoil(tensor: torch.Tensor, value: float = 0.5) -> None:
    with torch.no_grad():
        tensor.view(-1)[0] += value


class TestCheck:
    """What is compared, when, and what is said."""

    @pytest.mark.parametrize(
        ("spoiled", "expected"),
        [
            ([1], "(rank 1 from ranks 0, 2)"),
            ([0], "(rank 0 from ranks 1, 2)"),
            ([0, 2], "(rank 1 from ranks 0, 2)"),
            ([0, 1, 2], ""),
        ],
    )
    def test_those_who_differ_from_most_are_named(self, spoiled, expected):
        models = make_models(3)
        for rank in spoiled:
            spoil(models[rank][1].weight)
        check = DriftCheck(models[0], Gathered(models[1:]), 1)
        if not expected:
            check.check(4)
            return
        with pytest.raises(RuntimeError) as error:
            check.check(4)
        assert str(error.value).startswith(f"step 4: weight 1.weight differs between ranks {expected}: something")

    def test_without_a_majority_rank_0_is_right(self):
        models = make_models(4)
        for rank in (1, 3):
            spoil(models[rank][0].bias)
            spoil(models[rank][1].bias, rank)
        with pytest.raises(RuntimeError, match=r"0\.bias differs .*\(ranks 1, 3 from ranks 0, 2\), and 1 more of 4: "):
            DriftCheck(models[0], Gathered(models[1:]), 1).check(1)
        many = make_models(12)
        for model in many[2:]:
            spoil(model[0].bias)
        with pytest.raises(RuntimeError, match=r"\(ranks 0, 1 from ranks 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"):
            DriftCheck(many[0], Gathered(many[1:]), 1).check(1)

    def test_a_parameter_that_another_rank_lacks(self):
        models = make_models(2)
        models[1].extra = nn.Linear(1, 1, bias=False)
        with pytest.raises(RuntimeError, match=r"weight extra\.weight differs between ranks \(rank 1 from rank 0\)"):
            DriftCheck(models[0], Gathered(models[1:]), 1).check(1)

    def test_every_so_many_updates_and_once_for_each(self):
        models = make_models(2)
        ranks = Gathered(models[1:])
        check = DriftCheck(models[0], ranks, 3)
        calls = []
        for step in range(1, 8):
            check.after_update(step)
            calls.append(ranks.calls)
        assert calls == [0, 0, 1, 1, 1, 2, 2]
        check.check(7)
        check.check(7)
        assert ranks.calls == 3
        never = DriftCheck(models[0], ranks, None)
        never.after_update(3)
        assert ranks.calls == 3

    def test_one_rank_has_nothing_to_compare(self):
        check = DriftCheck(nn.Linear(1, 1), Gathered([]), 1)
        check.after_update(1)
        assert check._ranks.calls == 0

    def test_a_bad_number_of_steps(self):
        with pytest.raises(ValueError, match="drift_check_steps=0: at least 1"):
            DriftCheck(nn.Linear(1, 1), Gathered([]), 0)


def train_and_drift(rank: int, folder: Path) -> list[str]:
    """Equal models on both ranks, of which one is changed by one bit in the fourth update."""
    ranks = Ranks(rank, 2)
    ranks.open(torch.device("cpu"))
    (model,) = make_models(1)
    model.register_buffer("own", torch.tensor(rank))
    check, messages = DriftCheck(model, ranks, 2), []
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
            if step == 4 and rank == 1:
                model[0].weight.view(torch.int32)[1, 1] ^= 1
        try:
            check.after_update(step)
        except RuntimeError as error:
            messages.append(str(error))
            break
    return messages


def test_one_bit_is_found_on_both_ranks(tmp_path):
    first, second = on_two_ranks(tmp_path, train_and_drift, in_a_group=True)
    assert first == second
    assert [message.partition(": something")[0] for message in first] == [
        "step 4: weight 0.weight differs between ranks (rank 1 from rank 0)"
    ]

"""Averages against exact fractions, and the promise of one transfer."""

import math
import random
from fractions import Fraction

import pytest
import torch

from trainer.averages import Averages, scalars, target_loss


def tensors(**values) -> dict[str, torch.Tensor]:
    """Numbers as scalar tensors."""
    return {name: torch.tensor(value) for name, value in values.items()}


class TestAverages:
    def test_means_are_exact_and_weighted_by_samples(self):
        """Values that float32 holds exactly, against fractions."""
        rng, averages = random.Random(0), Averages()
        sums, weights = {}, {}
        for step in range(200):
            samples = rng.randint(1, 64)
            losses = {name: rng.randint(-(2**20), 2**20) / 2**10 for name in ("a", "b")[: rng.randint(1, 2)]}
            averages.add(step, tensors(**losses), samples)
            for name, value in losses.items():
                sums[name] = sums.get(name, Fraction()) + Fraction(value) * samples
                weights[name] = weights.get(name, 0) + samples
            if rng.random() < 0.1:
                averages.read()
        averages.read()
        # every partial sum fits into a double: no rounding but that of the division
        assert averages.means == {name: float(sums[name]) / weights[name] for name in sums}

    def test_the_first_value_counts(self):
        """The case in which Coqui's running average reports 1.18."""
        averages = Averages()
        for step, value in enumerate((4.69, 1.26, 1.10)):
            averages.add(step, tensors(loss=value), 1)
        averages.read()
        assert averages.means["loss"] == pytest.approx((4.69 + 1.26 + 1.10) / 3, rel=1e-7)  # float32 values

    def test_a_short_batch_counts_for_what_it_holds(self):
        averages = Averages()
        averages.add(0, tensors(loss=1.0), 30)
        averages.add(1, tensors(loss=5.0), 10)
        averages.read()
        assert averages.means == {"loss": 2.0}

    def test_one_transfer_a_read(self, monkeypatch):
        calls = []
        for method in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__", "__int__"):
            original = getattr(torch.Tensor, method)

            def counted(self, *args, original=original, method=method):
                calls.append(method)
                return original(self, *args)

            monkeypatch.setattr(torch.Tensor, method, counted)
        averages = Averages()
        for step in range(10):
            averages.add(step, tensors(a=1.0, b=2.0), 4)
            averages.add(step, tensors(grad_norm=math.nan), 4, must_be_finite=False)
        assert calls == []
        averages.read()
        assert calls == ["tolist"]
        averages.read()
        assert (averages.last, averages.means) == ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})
        assert calls == ["tolist"]

    def test_calls_of_one_step_are_averaged_by_samples(self):
        averages = Averages()
        averages.add(7, tensors(loss=1.0, other=3.0), 3)
        averages.read()  # in the middle of a step
        averages.add(7, tensors(loss=5.0), 1)
        averages.read()
        assert averages.last == {"loss": 2.0, "other": 3.0}
        averages.add(8, tensors(loss=9.0), 4)
        averages.read()
        assert averages.last == {"loss": 9.0}
        assert averages.means == {"loss": (3 * 1 + 5 + 4 * 9) / 8, "other": 3.0}

    def test_tensors_may_be_overwritten_afterwards(self):
        for count in (1, 2):
            losses = {str(i): torch.tensor(1.0) for i in range(count)}
            averages = Averages()
            averages.add(0, losses, 1)
            for value in losses.values():
                value.fill_(100.0)
            averages.read()
            assert averages.means == {str(i): 1.0 for i in range(count)}

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite_names_step_and_loss(self, value):
        averages = Averages()
        averages.add(3, tensors(loss=1.0, kl=1.0), 1)
        averages.add(4, tensors(loss=1.0, kl=value), 1)
        with pytest.raises(FloatingPointError, match=rf"^step 4: kl is {value}"):
            averages.read()

    def test_unit_is_named(self):
        averages = Averages("batch")
        averages.add(2, tensors(loss=math.nan), 1)
        with pytest.raises(FloatingPointError, match=r"^batch 2: loss is nan"):
            averages.read()

    def test_a_skipped_norm_is_left_out(self):
        averages = Averages()
        averages.add(0, tensors(grad_norm=2.0), 5, must_be_finite=False)
        averages.add(1, tensors(grad_norm=math.inf), 5, must_be_finite=False)
        averages.read()
        assert (averages.means, averages.last) == ({"grad_norm": 2.0}, {})

    def test_types_may_be_mixed(self):
        averages = Averages()
        losses = {
            "half": torch.tensor(1.5, dtype=torch.bfloat16),
            "double": torch.tensor([2.25], dtype=torch.float64),
            "count": torch.tensor(3),
            "right": torch.tensor(True),
        }
        averages.add(0, losses, 1)
        averages.read()
        assert averages.last == {"half": 1.5, "double": 2.25, "count": 3.0, "right": 1.0}

    def test_graphs_are_not_kept(self):
        averages = Averages()
        averages.add(0, {"loss": torch.ones((), requires_grad=True) * 2}, 1)
        assert [entry[3].requires_grad for entry in averages._pending] == [False]

    def test_no_scalar(self):
        with pytest.raises(ValueError, match=r"loss 'mel' has shape \[2, 3\]: return a scalar"):
            Averages().add(0, {"mel": torch.zeros(2, 3)}, 1)

    def test_no_losses(self):
        averages = Averages()
        averages.add(0, {}, 1)
        averages.read()
        assert (averages.last, averages.means) == ({}, {})

    def test_state_goes_on(self):
        values, whole, first, second = [1.0, 2.0, 4.0, 8.0], Averages(), Averages(), Averages()
        for step, value in enumerate(values):
            whole.add(step, tensors(loss=value), step + 1)
            (first if step < 2 else second).add(step, tensors(loss=value), step + 1)
        whole.read()
        first.read()
        second.load_state_dict(first.state_dict())
        second.read()
        assert second.means == whole.means == {"loss": (1 + 4 + 12 + 32) / 10}
        assert first.means == {"loss": 5 / 3}  # its sums are not shared

    def test_the_last_values_are_part_of_the_state(self):
        """They are shown again after a step without losses."""
        first, second = Averages(), Averages()
        first.add(4, tensors(loss=3.0), 2)
        first.read()
        second.load_state_dict(first.state_dict())
        second.read()
        assert first.last == second.last == {"loss": 3.0}
        second.add(6, tensors(kl=1.0), 2)
        second.read()
        assert second.last == {"kl": 1.0}

    def test_a_state_can_be_loaded_twice(self):
        state = {"sums": {"loss": 6.0}, "weights": {"loss": 3.0}}
        for _ in range(2):
            averages = Averages()
            averages.load_state_dict(state)
            averages.add(0, tensors(loss=6.0), 1)
            averages.read()
            assert averages.means == {"loss": 3.0}


def seen(idx: int | None, step: int, name: str, value: float) -> tuple:
    """What another rank hands to gather for one sample."""
    return step, idx, name, value, 1.0, True


class TestNames:
    def test_suffix_is_for_the_loss_only(self):
        averages = Averages()
        for idx in (0, 1):
            averages.add(1, tensors(loss=1.0 + idx, kl=3.0 + idx), 1, idx=idx)
        averages.add(1, tensors(grad_norm_0=7.0), 1, must_be_finite=False)
        averages.read()
        assert averages.means == {"loss_0": 1.0, "kl": 3.0, "loss_1": 2.0, "kl-1": 4.0, "grad_norm_0": 7.0}
        alone = Averages()
        alone.add(1, tensors(loss=1.0, kl=3.0), 1)
        alone.read()
        assert alone.means == {"loss": 1.0, "kl": 3.0}

    def test_whoever_came_first_keeps_the_name(self):
        averages = Averages()
        averages.add(1, tensors(kl=1.0), 1, idx=1)  # the first optimizer's batch was skipped
        averages.add(2, tensors(kl=8.0), 1, idx=0)
        averages.add(2, tensors(kl=3.0), 1, idx=1)
        averages.read()
        averages.add(3, tensors(kl=10.0), 1, idx=0)
        averages.read()
        assert averages.means == {"kl": 2.0, "kl-0": 9.0}

    @pytest.mark.parametrize("reads", [[(1, 2)], [(1,), (2,)]])
    def test_names_do_not_depend_on_what_a_rank_has_skipped(self, reads):
        """Rank 0 skips the first optimizer's batch at first, rank 1 the second's; when it is read changes nothing."""
        shares = [
            {1: [seen(1, 1, "kl", 100.0)], 2: [seen(0, 2, "kl", 2.0), seen(1, 2, "kl", 200.0)]},
            {1: [seen(0, 1, "kl", 6.0)], 2: [seen(1, 2, "kl", 300.0)]},
        ]
        found = []
        for share in shares:
            gathered = ([[entry for step in steps for entry in of[step]] for of in shares] for steps in reads)
            averages = Averages(gather=lambda own, gathered=gathered: next(gathered))
            for steps in reads:
                for step, idx, name, value, *_ in (entry for i in steps for entry in share[i]):
                    averages.add(step, tensors(**{name: value}), 1, idx=idx)
                averages.read()
            found.append(averages.means)
        assert found == [{"kl": 4.0, "kl-1": 200.0}] * 2

    def test_averages_that_share_owners_agree(self):
        owners = {}
        train, evaluation = Averages(owners=owners), Averages(owners=owners)
        train.add(1, tensors(kl=1.0), 1, idx=1)
        train.read()
        for idx in (0, 1):
            evaluation.add(1, tensors(kl=5.0 + idx), 1, idx=idx)
        evaluation.read()
        assert evaluation.means == {"kl": 6.0, "kl-0": 5.0}

    def test_the_owners_are_part_of_the_state(self):
        first, owners = Averages(), {}
        first.add(1, tensors(kl=1.0), 1, idx=1)
        first.read()
        second = Averages(owners=owners)
        second.load_state_dict(first.state_dict())
        second.add(2, tensors(kl=8.0), 1, idx=0)
        second.add(2, tensors(kl=3.0), 1, idx=1)
        second.read()
        assert second.means == {"kl": 2.0, "kl-0": 8.0}
        assert owners == {"kl": 1}  # in place: others share them

    def test_states_of_before_there_were_owners(self):
        averages = Averages()
        averages.load_state_dict({"sums": {"kl": 4.0}, "weights": {"kl": 1.0}})
        averages.add(2, tensors(kl=2.0), 1, idx=0)
        averages.read()
        assert averages.means == {"kl": 3.0}

    def test_an_error_has_the_name_that_is_shown(self):
        averages = Averages(gather=lambda own: [own, [seen(0, 3, "kl", 1.0)]])
        averages.add(3, tensors(kl=math.nan), 1, idx=1)
        with pytest.raises(FloatingPointError, match=r"^step 3: kl-1 is nan"):
            averages.read()


class TestScalars:
    def test_plain_numbers_are_kept_and_others_left_out(self):
        found = scalars({"loss": torch.tensor(1.0), "kl_weight": 0.25, "count": 3, "note": "x", "skipped": None})
        assert {name: value.tolist() for name, value in found.items()} == {"loss": 1.0, "kl_weight": 0.25, "count": 3.0}

    def test_all_are_on_the_device_of_the_loss(self):
        found = scalars({"loss": torch.zeros((), device="meta"), "kl": 1.0, "mel": torch.tensor(1.0)})
        assert {value.device.type for value in found.values()} == {"meta"}


class TestTargetLoss:
    means = {"loss": 1.0, "loss_0": 2.0, "loss_1": 4.0, "mel": 3.0}

    @pytest.mark.parametrize(
        ("target", "optimizers", "expected"), [(None, 1, 1.0), (None, 2, 3.0), ("mel", 1, 3.0), ("loss_1", 2, 4.0)]
    )
    def test_value(self, target, optimizers, expected):
        assert target_loss(self.means, target, optimizers) == expected

    def test_unknown(self):
        with pytest.raises(ValueError, match="target_loss='mell': not among the losses loss, loss_0, loss_1, mel"):
            target_loss(self.means, "mell", 1)

    @pytest.mark.parametrize(
        ("means", "optimizers", "expected"),
        [
            ({"loss_1": 4.0}, 2, 4.0),  # the first optimizer was skipped
            ({"loss": 2.0, "real": 9.0}, 2, 2.0),  # one eval_step for both
            ({"loss_gen": 1.0}, 2, None),
            ({"mel": 1.0}, 1, None),
        ],
    )
    def test_losses_that_are_not_there(self, means, optimizers, expected):
        assert target_loss(means, None, optimizers) == expected


def test_ranks_are_averaged_together():
    others = [(7, None, "loss", 4.0, 3.0, True), (7, None, "grad_norm", 2.0, 1.0, False)]
    averages = Averages(gather=lambda own: [own, others])
    averages.add(6, tensors(loss=9.0), 2)
    averages.add(7, tensors(loss=1.0), 1)
    averages.add(7, tensors(loss=100.0), 0)  # of a rank without samples
    averages.read()
    assert averages.last == {"loss": (1.0 + 4.0 * 3) / 4, "grad_norm": 2.0}
    assert averages.means["loss"] == (9.0 * 2 + 1.0 + 4.0 * 3) / 6


def test_sums_over_ranks_do_not_depend_on_when_they_are_read():
    """A run that is stopped reads them once more."""
    values, sums = ([1e16, -1e16], [1.0, 1.0]), set()
    for reads in ([1], [0, 1]):
        others: list = []
        averages = Averages(gather=lambda own, others=others: [own, others.copy()])
        for step in range(2):
            averages.add(step, tensors(loss=values[0][step]), 1)
            others.append((step, None, "loss", values[1][step], 1.0, True))
            if step in reads:
                averages.read()
                others.clear()
        sums.add(averages.state_dict()["sums"]["loss"])
    assert sums == {1.0}


def test_every_rank_hears_of_a_value_that_is_not_finite():
    averages = Averages(gather=lambda own: [own, [seen(None, 3, "loss", math.nan)]])
    averages.add(3, tensors(loss=1.0), 1)
    with pytest.raises(FloatingPointError, match="step 3: loss is nan"):
        averages.read()


def test_values_that_need_not_be_finite_are_left_out():
    averages = Averages("evaluation batch", "leave out")
    averages.add(1, tensors(loss=math.nan, mel=2.0), 1)
    averages.add(2, tensors(loss=3.0, mel=4.0), 1)
    averages.read()
    assert averages.means == {"loss": 3.0, "mel": 3.0}


def test_coquis_names():
    averages = Averages()
    averages.add(1, tensors(loss=1.0), 1)
    assert averages["avg_loss"] == 1.0
    assert averages.avg_values == {"avg_loss": 1.0}

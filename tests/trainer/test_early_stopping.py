"""Early stopping: what counts as better, when it stops, and what it says."""

import math

import pytest

from trainer.early_stopping import EarlyStopping


def stops_after(losses: list, patience: int | None, min_delta: float = 0.0) -> int | None:
    """How many of the losses are seen before it stops."""
    stopping = EarlyStopping(patience, min_delta)
    for count, loss in enumerate(losses, start=1):
        stopping.update(loss)
        if stopping.should_stop:
            return count
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([3, 2, 1, 0], 1, 0.0, None),
        ([3, 2, 2.5, 2.25, 1], 2, 0.0, 4),
        ([3, 4, 2, 4, 1, 4], 2, 0.0, None),  # the count begins again with every better loss
        ([2, 2, 2], 2, 0.0, 3),  # equal is not better
        ([2, 1.75, 1.5, 1.25], 1, 0.5, 2),
        ([2, 1.75, 1.25, 1.0], 2, 0.5, None),  # small steps add up: 1.25 is better than 2 by more than 0.5
        ([2, 1.5, 1.0], 1, 0.5, 2),  # by exactly min_delta is not enough
        ([math.nan, math.nan, 1], 2, 0.0, 2),
        ([1, math.nan, math.nan], 2, 0.0, 3),
        ([math.nan, 1, 0.5, 0.25], 2, 0.0, None),
        ([math.inf, math.inf], 2, 0.0, 2),
        ([-1, -2, -1.5], 1, 0.0, 3),
        ([1, 2, 3, 4], None, 0.0, None),
    ],
)
def test_when_it_stops(losses, patience, min_delta, expected):
    assert stops_after(losses, patience, min_delta) == expected


def test_message():
    stopping = EarlyStopping(5)
    for loss in [1, 0.12345678, *[0.2] * 5]:
        stopping.update(loss)
    assert stopping.message == "no better loss than 0.12346 in 5 evaluations"
    stopping = EarlyStopping(1, 0.01)
    for loss in [0.5, 0.495]:
        stopping.update(loss)
    assert stopping.message == "no loss better by more than 0.01 than 0.5 in 1 evaluation"


def test_it_goes_on_from_its_state():
    first = EarlyStopping(3)
    for loss in [1, 2, 2]:
        first.update(loss)
    second = EarlyStopping(3)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"best": 1, "waited": 2}
    assert not second.should_stop
    second.update(1.0)
    assert second.should_stop


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 1, "min_delta": -1}])
def test_wrong_values(arguments):
    name, value = list(arguments.items())[-1]
    with pytest.raises(ValueError, match=rf"early_stopping_{name}={value}: "):
        EarlyStopping(**arguments)

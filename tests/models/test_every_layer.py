"""Every nn.Module class in models/ has a Case in its test file, and passes the checks of trainer.testing."""

import importlib
import types
from pathlib import Path

import pytest
from torch import nn

from trainer.testing import Case, check_case_learns, check_case_padding, check_case_shapes, layers_of

MODELS = Path(__file__).resolve().parents[2] / "models"
FILES = sorted(path.stem for path in MODELS.glob("*.py") if path.stem != "__init__")


def cases_of(stem: str) -> dict[str, Case]:
    """LAYERS of the test file of a model file; empty when there is none."""
    if not (Path(__file__).parent / f"test_{stem}.py").is_file():
        return {}
    return getattr(importlib.import_module(f"test_{stem}"), "LAYERS", {})


def missing_and_stale(module: types.ModuleType, cases: dict[str, Case]) -> list[str]:
    """What is wrong with the cases of a model file: classes without one, and cases without a class."""
    layers, where = layers_of(module).keys(), f"LAYERS of tests/models/test_{module.__name__.split('.')[-1]}.py"
    problems = [f"{name} has no Case: add one to {where}" for name in sorted(layers - cases.keys())]
    return problems + [
        f"{name} is no layer of the file: take it out of {where}" for name in sorted(cases.keys() - layers)
    ]


CASES = [(stem, name) for stem in FILES for name in cases_of(stem)]


@pytest.mark.parametrize("stem", FILES)
def test_every_layer_has_a_case(stem):
    assert missing_and_stale(importlib.import_module(f"models.{stem}"), cases_of(stem)) == []


def test_a_layer_without_a_case_is_found():
    module = types.ModuleType("models.toy")
    module.Tested = type("Tested", (nn.Module,), {"__module__": "models.toy"})
    module.Forgotten = type("Forgotten", (nn.Module,), {"__module__": "models.toy"})
    module.Imported = nn.Linear
    case = Case(build=module.Tested, inputs=lambda B, T: (), shapes=lambda B, T: ())
    where = "LAYERS of tests/models/test_toy.py"
    assert missing_and_stale(module, {"Tested": case}) == [f"Forgotten has no Case: add one to {where}"]
    assert missing_and_stale(module, {"Tested": case, "Forgotten": case, "Gone": case}) == [
        f"Gone is no layer of the file: take it out of {where}"
    ]
    assert missing_and_stale(module, {"Tested": case, "Forgotten": case}) == []


@pytest.mark.parametrize(("stem", "name"), CASES)
def test_shapes_and_gradients(stem, name):
    check_case_shapes(cases_of(stem)[name])


@pytest.mark.parametrize(("stem", "name"), CASES)
def test_padding_changes_nothing(stem, name):
    check_case_padding(cases_of(stem)[name])


@pytest.mark.parametrize(("stem", "name"), CASES)
def test_learns(stem, name):
    check_case_learns(cases_of(stem)[name])

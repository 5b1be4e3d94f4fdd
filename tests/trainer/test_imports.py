"""Who may import whom, what `import trainer` costs, and that the loop fits on a few screens."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).resolve().parents[2]
# what recipes get their data from
DATA_PACKAGES = {"sklearn"}
MAY_IMPORT_THE_LOOP = {"trainer/__init__.py", "trainer/testing.py", "trainer/reproduce.py"}
HEAVY = (
    "torch",
    "numpy",
    "coqpit",
    "matplotlib",
    "tensorboard",
    "rich",
    "inflect",
    "phonemizer",
    "sklearn",
    "soundfile",
)


def run_python(code: str) -> str:
    """What a fresh interpreter prints, run in the repository."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, in functions too; not what stands under TYPE_CHECKING."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf8")))
    return found


def is_in(module: str, package: str) -> bool:
    """Whether a dotted name is a package or lies in it."""
    return module == package or module.startswith(package + ".")


def rule_breaks(root: Path) -> list[str]:
    """`file imports module` for every import that the layout forbids."""
    breaks = []
    for folder in ("trainer", "models", "recipes"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for module in sorted(imported_modules(path)):
                if not _may_import(folder, name, module):
                    breaks.append(f"{name} imports {module}")
    return breaks


def _may_import(folder: str, name: str, module: str) -> bool:
    top = module.partition(".")[0]
    if folder == "trainer":
        loop = is_in(module, "trainer.trainer") or module == "trainer.Trainer"
        return top not in ("models", "recipes", "tests") and (not loop or name in MAY_IMPORT_THE_LOOP)
    allowed = {"trainer", "torch"} | ({"models"} | DATA_PACKAGES if folder == "recipes" else set())
    return top in allowed or top in sys.stdlib_module_names


def test_the_layout_holds():
    assert rule_breaks(ROOT) == []
    assert len(list((ROOT / "trainer").rglob("*.py"))) > 20  # it was looked at


@pytest.mark.parametrize(
    ("file", "code", "found"),
    [
        ("trainer/a.py", "import models.vits", "models.vits"),
        ("trainer/data/a.py", "def f():\n    from recipes import x", "recipes"),
        ("trainer/a.py", "from trainer.trainer import Trainer", "trainer.trainer"),
        ("trainer/a.py", "from trainer import trainer", "trainer.trainer"),
        ("trainer/a.py", "from trainer import Trainer", "trainer.Trainer"),
        ("trainer/a.py", "import importlib\nimportlib.import_module('models.vits')", "models.vits"),
        ("trainer/a.py", "if TYPE_CHECKING:\n    import torch\nelse:\n    import models", "models"),
        ("models/a.py", "import numpy as np", "numpy"),
        ("models/a.py", "from models.b import Layer", "models.b"),
        ("models/a.py", "def f():\n    import librosa", "librosa"),
        ("models/a.py", "from recipes.ljspeech import x", "recipes.ljspeech"),
        ("recipes/x/a.py", "import pandas", "pandas"),
        ("recipes/x/a.py", "import recipes.y.b", "recipes.y.b"),
    ],
)
def test_a_break_is_found(tmp_path, file, code, found):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert f"{file} imports {found}" in rule_breaks(tmp_path)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("trainer/a.py", "import fsspec\nfrom trainer.config import field\nfrom trainer import config"),
        ("trainer/a.py", "if TYPE_CHECKING:\n    from trainer.trainer import Trainer"),
        ("trainer/a.py", "if typing.TYPE_CHECKING:\n    from trainer.trainer import Trainer"),
        ("trainer/testing.py", "from trainer.trainer import Trainer"),
        ("models/a.py", "import math\nimport torch.nn.functional as F\nfrom trainer import field, TrainerModel"),
        ("recipes/x/a.py", "import argparse\nimport torch\nfrom sklearn import datasets\nfrom models.a import A"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert rule_breaks(tmp_path) == []


def test_the_loop_can_be_read_in_ten_minutes():
    assert len((ROOT / "trainer/trainer.py").read_text(encoding="utf8").splitlines()) <= 400


class TestPublicNames:
    def test_importing_trainer_imports_nothing_heavy(self):
        code = f"import sys, trainer\nprint([name for name in {HEAVY} if name in sys.modules])"
        assert run_python(code) == "[]"

    def test_importing_the_trainer_imports_no_plotting_and_no_language(self):
        names = [name for name in HEAVY if name not in ("torch", "numpy", "coqpit", "rich", "soundfile")]
        code = f"import sys\nfrom trainer import *\nprint([name for name in {names} if name in sys.modules], Trainer)"
        assert run_python(code) == "[] <class 'trainer.trainer.Trainer'>"

    def test_every_public_name_is_where_it_says(self):
        assert sorted(trainer.__all__) == trainer.__all__ == sorted(trainer._HOMES)
        for name in trainer.__all__:
            value = getattr(trainer, name)
            assert (value.__name__, inspect.getmodule(value).__name__) == (name, trainer._HOMES[name])

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'Trainerr'"):
            trainer.Trainerr  # noqa: B018
        with pytest.raises(ImportError, match="cannot import name 'Trainerr'"):
            from trainer import Trainerr  # noqa: F401

    def test_version(self):
        assert [part.isdigit() for part in trainer.__version__.split(".")] == [True] * 3

"""What docs/migrating.md shows is run, and what it names is there."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel
from trainer.coqui_modules import MODULES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/migrating.md").read_text(encoding="utf8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first two lines."""
    section = PAGE[PAGE.index(heading) :].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_python_blocks_run_one_after_the_other(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    check = """
print("weight", model.layer.weight.item(), "bias", model.layer.bias.item())
print("updates", trainer.total_steps_done, "best", trainer.best_loss["train_loss"])
"""
    command = [sys.executable, "-c", "\n".join(blocks) + check, "--coqpit.print_step", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    weight, bias = map(float, re.search(r"^weight (\S+) bias (\S+)$", result.stdout, flags=re.MULTILINE).groups())
    # y = 2 x + 1 is what the samples say
    assert (weight, bias) == pytest.approx((2, 1), abs=0.01)
    # 32 samples in 8 batches, two of them in an update
    assert result.stdout.count("epoch 2/2: 4 updates") == 2
    assert re.search(r"^updates 8 best \d\.\d+$", result.stdout, flags=re.MULTILINE)
    assert "step 4: " in result.stdout  # the command line was read
    assert len(list((tmp_path / "output").iterdir())) == 3


def test_all_eighteen_cases_are_told():
    assert [int(row[0]) for row in rows("### The eighteen cases")] == list(range(1, 19))


def test_what_stays_is_there():
    stays = {row[0]: row[1] for row in rows("## What stays")}
    assert set(re.findall(r"`(trainer\.[\w.]+)`", stays["imports"])) <= set(MODULES)
    for flag in re.findall(r"--(\w+)`", stays["arguments"]):
        assert flag in TrainerArgs.__dataclass_fields__
    for hook in re.findall(r"`(\w+)`", stays["model"]):
        assert callable(getattr(TrainerModel, hook))
    names = re.findall(r"`(\w+)(?:\[.*?\])?`", stays["Trainer"])
    assert len(names) > 10
    config = TrainerConfig(optimizer="SGD", device="cpu")
    model = type("Model", (TrainerModel,), {"get_criterion": lambda self: None})()
    model.layer = nn.Linear(1, 1)
    trainer = Trainer(TrainerArgs(), config, model=model, parse_command_line_args=False)
    for name in names:
        assert name in vars(trainer) or hasattr(type(trainer), name), name


@pytest.mark.parametrize(
    "name",
    [
        *("lr", "grad_clip", "target_loss", "nan_policy", "scheduler_after_epoch", "lr_scheduler_unit", "save_step"),
        *("print_step", "plot_step", "run_eval_steps", "log_model_step", "cudnn_enable", "dashboard_logger"),
    ],
)
def test_fields_that_it_names_are_there(name):
    assert re.search(rf"\b{name}\b", PAGE)
    assert name in TrainerConfig.__dataclass_fields__


def test_what_is_not_carried_over_is_not_there():
    text = "".join(row[0] for row in rows("## What is not carried over") if "get_experiment" in row[0])
    names = set(re.findall(r"`(\w+)`", text))
    assert len(names) == 6
    for module in ("trainer.io", "trainer.generic_utils"):
        assert not names & set(vars(importlib.import_module(module)))
    for dashboard in re.findall(r"`(\w+)`", rows("## What is not carried over")[0][0])[:-1]:
        with pytest.raises(ValueError, match="dashboard_logger"):
            TrainerConfig(dashboard_logger=dashboard)

"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import Trainer, TrainerArgs, TrainerConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")


def test_the_python_blocks_run_one_after_the_other(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    # y = 2 x + 1 is what the samples say
    check = "\nprint('weight', model.layer.weight.item(), 'bias', model.layer.bias.item())"
    script = "\n".join(blocks).replace("model=Line()", "model=(model := Line())") + check
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    weight, bias = re.search(r"weight (\S+) bias (\S+)", result.stdout).groups()
    assert float(weight) == pytest.approx(2, abs=0.1)
    assert float(bias) == pytest.approx(1, abs=0.1)


def test_files_and_pictures_that_it_links_to_are_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 5
    missing = [link for link in links if not (ROOT / link).is_file()]
    assert not missing


def test_make_targets_that_it_names_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    for target in re.findall(r"^ {4}make (\w+)$", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE), target
    for target in ("install", "train", "test", "chaos", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("command", re.findall(r"\.venv/bin/python (recipes/\S+)(.*)", README))
def test_recipe_commands_are_understood(command):
    """The flags of each command parse; ``--help`` ends it before anything is trained."""
    script, arguments = command
    flags = [flag for flag in arguments.split() if not flag.startswith(("output/", "--continue_path"))]
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *flags, "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_several_ranks(tmp_path):
    """The command for processes without a GPU, cut short."""
    command = re.search(r"\.venv/bin/python (-m trainer\.distribute --nproc .*)", README)[1].split()
    command[-1] = str(ROOT / command[-1])
    arguments = [f"--coqpit.output_path={tmp_path}", "--coqpit.max_steps=2"]
    result = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.iterdir()
    assert {"trainer_0_log.txt", "trainer_1_log.txt", "checkpoint_2.pth"} <= {path.name for path in run.iterdir()}
    assert "2 ranks of" in (run / "trainer_0_log.txt").read_text(encoding="utf8")


def test_fields_and_arguments_that_it_names_are_there():
    fields = set(re.findall(r"--coqpit\.(\w+)", README)) - {"dataset_path", "cache_dir"}  # those of VITS
    assert len(fields) >= 8
    assert fields <= set(TrainerConfig.__dataclass_fields__)
    for name in ("grad_accum_steps", "continue_path", "restore_path"):
        assert f"--{name}" in README
        assert name in TrainerArgs.__dataclass_fields__
    for name in ("fit_with_largest_batch_size", "profile_fit"):
        assert f"trainer.{name}(" in README
        assert callable(getattr(Trainer, name))

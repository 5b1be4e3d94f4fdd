"""recipes/digits/train_digits.py as a user starts it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.provenance import as_a_shell_calls

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits" / "train_digits.py"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The recipe from any working directory."""
    command = [sys.executable, str(RECIPE), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """The run folder, output and seconds of a default training."""
    folder = tmp_path_factory.mktemp("digits")
    start = time.monotonic()
    result = run(f"--coqpit.output_path={folder}", "--coqpit.plot_step=50", cwd=folder)
    assert result.returncode == 0, result.stderr
    (run_folder,) = folder.iterdir()
    return run_folder, result.stdout, time.monotonic() - start


def test_over_97_percent_in_half_a_minute(trained):
    _, output, seconds = trained
    accuracies = [float(a) for a in re.findall(r"eval at step \d+: loss \S+  accuracy (\S+)", output)]
    assert len(accuracies) == 15
    assert accuracies[-1] > 0.97
    assert seconds < 30


def test_the_output_is_plain_lines_when_it_is_no_terminal(trained):
    _, output, _ = trained
    assert "\x1b" not in output
    assert re.search(r"step 25: loss \S+  .*step_time \S+ s  loader_time \S+ s  left \d+:\d\d:\d\d", output)


def test_the_last_lines_say_what_to_do_next(trained):
    folder, output, _ = trained
    last = output.splitlines()[-3:]
    assert last == [
        f"run folder: {folder}",
        f"look at it:  {as_a_shell_calls('tensorboard')} --logdir {folder}",
        f"continue it: {as_a_shell_calls('python')} {RECIPE} --continue_path {folder}",
    ]


def test_tensorboard_holds_scalars_and_figures(trained):
    folder, _, _ = trained
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("TrainIterStats/loss")] == [50, 100, 150, 200, 250, 300]
    evals = events.Scalars("EvalStats/accuracy")
    assert [e.step for e in evals] == [23 * i for i in range(1, 16)]
    assert evals[-1].value > 0.97
    assert len(events.Images("EvalFigures/confusion")) >= 1


def test_a_second_run_is_bitwise_the_same(trained, tmp_path):
    """Two processes, the same weights."""
    import torch

    folder, _, _ = trained
    result = run(f"--coqpit.output_path={tmp_path}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (other,) = tmp_path.iterdir()
    a, b = (torch.load(f / "checkpoint_345.pth", weights_only=True)["model"] for f in (folder, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_continue_from_another_working_directory(trained, tmp_path):
    folder, _, _ = trained
    result = run("--continue_path", str(folder), "--coqpit.epochs=16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    assert "step 345, epoch 16" in result.stdout
    assert (folder / "checkpoint_368.pth").is_file()
    assert json.loads((folder / "config.json").read_text())["epochs"] == 16


def test_help_lists_every_field(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for flag in ("--small_run", "--coqpit.channels", "--coqpit.lr", "--coqpit.max_steps"):
        assert flag in result.stdout
    assert "Channels of the first block" in result.stdout
    # the template gives this field another default alone
    assert "Epochs to train. (default: 15)" in " ".join(result.stdout.split())


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    result = run("--coqpit.epochz=3", "--coqpit.lr=fast", "--coqpit.channels=0", "--coqpit.epochs=0", cwd=tmp_path)
    assert result.returncode == 2
    assert "--coqpit.epochz: unknown argument; did you mean '--coqpit.epochs'?" in result.stderr
    assert "--coqpit.lr='fast': must be float" in result.stderr
    assert "--coqpit.channels=0: must be at least 1" in result.stderr
    assert "--coqpit.epochs=0: must be at least 1" in result.stderr
    assert not list(tmp_path.iterdir())

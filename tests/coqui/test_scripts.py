"""Scripts written for Coqui's Trainer, started as their users start them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.provenance import as_a_shell_calls

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    *("--coqpit.epochs", "2", "--coqpit.lr", "0.01", "--coqpit.grad_clip", "1.0", "--grad_accum_steps", "2"),
    *("--coqpit.lr_scheduler", "StepLR", "--coqpit.lr_scheduler_params.step_size", "1"),
)


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """A script of this folder, in a working directory."""
    command = [sys.executable, str(ROOT / "tests/coqui" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def folder_of(result: subprocess.CompletedProcess) -> Path:
    """The run's folder, of a run that ended well."""
    assert result.returncode == 0, result.stderr
    return Path(re.search(r"^run folder: (.*)$", result.stdout, flags=re.MULTILINE)[1])


def numbers(output: str, line: str, name: str) -> list[float]:
    """The values of a name in all lines that begin so."""
    return [float(v) for v in re.findall(rf"^{line} \d+: .*?\b{name} (\S+)", output, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The classifier, trained with overrides: its folder, absolute, and its output."""
    cwd = tmp_path_factory.mktemp("classifier")
    result = run("classifier.py", *OVERRIDES, cwd=cwd)
    return cwd / folder_of(result), result.stdout


class TestClassifier:
    def test_learns_with_the_overrides(self, trained):
        _, output = trained
        # 1,437 digits in 23 batches of 64, two of them in an update: 12 updates an epoch, the last of one batch
        assert numbers(output, "step", "current_lr") == [0.01, 0.01, 0.001]  # steps 1, 10 and 20
        losses = numbers(output, "step", "loss")
        assert losses[0] == pytest.approx(2.3, abs=0.1)  # ln 10
        assert losses[0] > losses[1] > losses[2]
        assert numbers(output, "eval at step", "accuracy")[-1] > 0.75
        assert "epoch end: 12 steps of the model, rate 0.010000" in output
        assert "epoch end: 24 steps of the model, rate 0.001000" in output
        assert output.count("callback: the trainer is built") == 1

    def test_the_runs_folder(self, trained):
        folder, output = trained
        assert folder.parent.name == "output"
        assert folder.name.startswith("classifier-")
        checkpoints = {"best_model.pth", "checkpoint_10.pth", "checkpoint_20.pth", "checkpoint_24.pth"}
        found = {path.name for path in folder.iterdir()}
        assert {"config.json", "trainer_0_log.txt", *checkpoints} <= found
        log = [line[len("2026-01-01 00:00:00 ") :] for line in (folder / "trainer_0_log.txt").read_text().splitlines()]
        printed = [line for line in output.splitlines() if not line.startswith(("callback:", "epoch end:"))]
        assert log == printed
        events = EventAccumulator(str(folder))
        events.Reload()
        shown = [event.step for event in events.Scalars("TrainIterStats/loss")]
        assert shown == [10, 20]
        accuracies = [event.value for event in events.Scalars("EvalStats/accuracy")]
        assert accuracies == pytest.approx(numbers(output, "eval at step", "accuracy"), abs=1e-3)

    def test_config_json_holds_the_overrides(self, trained):
        config = json.loads((trained[0] / "config.json").read_text())
        assert {name: config[name] for name in ("epochs", "lr", "grad_clip", "lr_scheduler", "hidden")} == {
            "epochs": 2,
            "lr": 0.01,
            "grad_clip": 1.0,
            "lr_scheduler": "StepLR",
            "hidden": 64,
        }
        assert config["lr_scheduler_params"] == {"step_size": 1}

    def test_an_exception_of_the_model_comes_out_and_the_run_goes_on_from_its_checkpoint(self, trained, tmp_path):
        failed = run("classifier.py", *OVERRIDES, "--coqpit.fail_at_step", "15", cwd=tmp_path)
        assert failed.returncode == 1
        assert failed.stderr.startswith("Traceback (most recent call last):")
        assert 'raise RuntimeError("the model fails on purpose")' in failed.stderr
        assert failed.stderr.endswith("RuntimeError: the model fails on purpose\n")
        (folder,) = (tmp_path / "output").iterdir()
        assert "step 10: loss" in (folder / "trainer_0_log.txt").read_text()
        assert (
            f"continue it: {as_a_shell_calls('python')} {ROOT / 'tests/coqui/classifier.py'} --continue_path output"
            in failed.stdout
        )

        again = ("--continue_path", str(folder), "--grad_accum_steps", "2", "--coqpit.fail_at_step", "none")
        continued = run("classifier.py", *again, cwd=tmp_path)
        assert folder_of(continued) == folder
        # the newest file: of the evaluation after the first epoch
        assert f"continuing from {folder}/best_model.pth: step 12, epoch 1\n" in continued.stdout
        # bitwise the weights of the run that was not interrupted
        states = [torch.load(f / "checkpoint_24.pth", weights_only=True)["model"] for f in (folder, trained[0])]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_a_finished_run_is_continued_with_more_epochs(self, trained):
        folder, _ = trained
        arguments = ("--continue_path", str(folder), "--grad_accum_steps", "2", "--coqpit.epochs", "4")
        result = run("classifier.py", *arguments, cwd=folder.parents[1])
        assert folder_of(result) == folder
        assert list(folder.parent.iterdir()) == [folder]
        assert re.findall(r"^epoch (\d)/4", result.stdout, flags=re.MULTILINE) == ["3", "4"]
        # 0.01, a tenth of it after every epoch, of which two were done
        assert numbers(result.stdout, "step", "current_lr") == pytest.approx([1e-4, 1e-5])
        assert json.loads((folder / "config.json").read_text())["epochs"] == 4
        assert torch.load(folder / "checkpoint_48.pth", weights_only=True)["step"] == 48
        assert (folder / "trainer_0_log.txt").read_text().count("eval at step") == 4

    def test_another_run_starts_from_its_weights(self, trained, tmp_path):
        source = trained[0] / "best_model.pth"
        arguments = ("--restore_path", str(source), "--coqpit.epochs", "1", "--coqpit.mixed_precision", "True")
        result = run("classifier.py", *arguments, cwd=tmp_path)
        folder = tmp_path / folder_of(result)
        assert folder != trained[0]
        assert f"weights restored from {source}" in result.stdout
        assert "4,810 parameters, cpu, fp16" in result.stdout
        losses = numbers(result.stdout, "step", "loss")
        assert losses[0] < 1.6  # not ln 10
        assert torch.load(folder / "checkpoint_23.pth", weights_only=True)["step"] == 23
        assert numbers(result.stdout, "step", "amp_scaler")[0] == pytest.approx(2**16, rel=1e-3)


class TestCommandLine:
    def test_help(self, tmp_path):
        result = run("classifier.py", "--help", cwd=tmp_path)
        assert result.returncode == 0
        for flag in (
            "--continue_path",
            "--grad_accum_steps",
            "--coqpit.lr ",
            "--coqpit.hidden",
            "--coqpit.fail_at_step",
        ):
            assert flag in result.stdout
        assert list(tmp_path.iterdir()) == []

    def test_misspelt_flags_end_it_before_anything_is_made(self, tmp_path):
        arguments = ("--coqpit.epochz", "7", "--restore_pth", "x.pth", "--coqpit.lr", "fast", "--coqpit.hidden", "8")
        result = run("classifier.py", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        problems = result.stderr.splitlines()[1:]
        assert len(problems) == 3
        assert "--coqpit.epochz: unknown argument; did you mean '--coqpit.epochs'?" in result.stderr
        assert "--restore_pth: unknown argument; did you mean '--restore_path'?" in result.stderr
        assert "--coqpit.lr='fast'" in result.stderr
        assert list(tmp_path.iterdir()) == []


class TestGan:
    def test_learns_with_accumulation_under_mixed_precision_and_goes_on(self, tmp_path):
        precision = ("--coqpit.mixed_precision", "true", "--coqpit.precision", "bf16")
        target = ("--coqpit.target_loss", "distance")
        result = run("gan.py", "--grad_accum_steps", "2", "--coqpit.epochs", "8", *precision, *target, cwd=tmp_path)
        folder = tmp_path / folder_of(result)
        # 1,024 samples in 32 batches, two of them in an update
        assert re.findall(r"^epoch \d/8: (\d+) updates", result.stdout, flags=re.MULTILINE) == ["16"] * 8
        distances = numbers(result.stdout, "eval at step", "distance")
        assert distances[0] > 2  # from the origin to (2, -1)
        assert distances[-1] < 0.6
        losses = numbers(result.stdout, "step", "loss_gen")
        assert losses[0] > 0.65  # ln 2: a discriminator that knows nothing
        assert losses[-1] < 0.4
        assert all(norm > 0 for i in (0, 1) for norm in numbers(result.stdout, "step", f"grad_norm_{i}"))
        best = torch.load(folder / "best_model.pth", weights_only=True)
        assert best["model_loss"]["eval_loss"] == pytest.approx(min(distances), rel=1e-3)
        assert best["config"]["grad_clip"] is None

        continued = run("gan.py", "--continue_path", str(folder), "--coqpit.epochs", "9", cwd=tmp_path)
        assert tmp_path / folder_of(continued) == folder
        assert "epoch 9/9: 32 updates" in continued.stdout
        assert torch.load(folder / "checkpoint_160.pth", weights_only=True)["step"] == 8 * 16 + 32

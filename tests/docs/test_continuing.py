"""What docs/continuing.md names is there, and its command runs."""

import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.trainer.toys import build
from trainer import TrainerConfig
from trainer.checkpoint_command import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "continuing.md").read_text(encoding="utf8")


def test_fields_that_it_names_are_there():
    rows = [row.split("|")[1] for row in TEXT.splitlines() if row.startswith("| `save_")]
    fields = {*re.findall(r"--coqpit\.(\w+)", TEXT), *re.findall(r"`(\w+)`", " ".join(rows))}
    assert len(fields) >= 9
    assert fields <= set(TrainerConfig.__dataclass_fields__)


def test_files_that_it_names_are_there():
    files = re.findall(r"`((?:docs|tests)/[\w./]+)`", TEXT)
    assert len(files) >= 2
    assert not [name for name in files if not (ROOT / name).exists()]


def test_exit_codes_are_those_of_the_signals():
    rows = re.findall(r"^\| (SIG\w+).*?\| (\d+) \|", TEXT, flags=re.MULTILINE)
    assert dict(rows) == {name: str(128 + signal.Signals[name]) for name in ("SIGINT", "SIGTERM", "SIGUSR1")}


@pytest.mark.parametrize("command", re.findall(r"python -m trainer\.checkpoint (.*)", TEXT))
def test_its_command_runs(command, tmp_path, capsys):
    trainer = build(epochs=1, output_path=str(tmp_path))
    trainer.fit()
    verb, run = shlex.split(command)
    assert run.startswith("output/")
    assert main([verb, str(trainer.output_path)]) == 0
    assert "all sound" in capsys.readouterr().out

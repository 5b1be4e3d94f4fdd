"""A short form of `make chaos`, and what it rests on: that it sees what is wrong."""

import copy
import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from tests.chaos.compare import compare_checkpoints, compare_logs, compare_scalars, differences
from tests.chaos.harm import Harm, Watch, unsafe
from tests.chaos.lives import damage, leftovers, steps_of

ROOT = Path(__file__).resolve().parents[1]


def test_nothing_is_lost_and_nothing_differs(tmp_path):
    """Some runs, of always the same choices; what a random time hits is another instant each time."""
    command = [sys.executable, "-m", "tests.chaos", "--runs", "16", "--seed", "5", "--damage", "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    sums = {name: int(n) for n, name in (part.split(" ", 1) for part in result.stdout.splitlines()[-2].split(", "))}
    assert sums["runs"] == 16
    assert sums["kills"] >= 16
    assert 4 <= sums["aimed"] <= sums["kills"] - 4
    assert sums["resumed"] >= 8


# ---- what it compares ----

STATE = {
    "model": {"weight": torch.tensor([0.0, 1.0]), "count": torch.tensor(3)},
    "optimizer": {"0": {"state": {0: {"step": 2}}, "param_groups": [{"lr": 0.1}]}},
    "loss": (1.0, None, "text"),
    "date": "today",
}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda state: state["model"]["weight"].mul_(-1), "/model/weight"),  # -0.0 is another number
        (lambda state: state["model"].update(weight=state["model"]["weight"].double()), "/model/weight"),
        (lambda state: state["model"].update(count=torch.tensor([3])), "/model/count"),
        (lambda state: state["model"].pop("count"), "/model"),
        (lambda state: state["optimizer"]["0"]["state"][0].update(step=3), "/optimizer/0/state/0/step"),
        (lambda state: state["optimizer"]["0"]["param_groups"].append({}), "/optimizer/0/param_groups"),
        (lambda state: state["optimizer"]["0"]["param_groups"][0].update(lr=0.1 + 1e-17 + 2**-56), "/lr"),
        (lambda state: state.update(loss=(1, None, "text")), "/loss/0"),
        (lambda state: state.update(more=1), ""),
    ],
)
def test_differences(change, where):
    other = copy.deepcopy(STATE)
    assert differences(STATE, {**other, "date": "yesterday", "logs": {}}) == []
    change(other)
    (line,) = differences(STATE, other)
    assert where in line


@pytest.fixture
def runs(tmp_path):
    """Two runs that are the same."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        torch.save({"step": 4, **STATE}, folder / "checkpoint_4.pth")
        (folder / "trainer_0_log.txt").write_text(
            "2026-11-21 10:00:00 step 4: loss 1  step_time 0.1 s\n2026-11-21 10:00:00 eval at step 4: loss 2  (0.1 s)\n"
        )
        log(folder, [("loss", 1.0, 3), ("loss", 1.5, 4), ("x/step_time", random.random(), 4)])
    return folders


def log(folder: Path, values: list) -> None:
    writer = SummaryWriter(str(folder), filename_suffix=f".{len(list(folder.iterdir()))}")
    for tag, value, step in values:
        writer.add_scalar(tag, value, step)
    writer.close()


def found_in(runs: list[Path]) -> list[str]:
    return [*compare_checkpoints(*runs, damaged=set()), *compare_scalars(*runs), *compare_logs(*runs)]


def test_equal_runs(runs):
    assert found_in(runs) == []
    assert steps_of(runs[0]) == {"checkpoint_4.pth": 4}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: log(run, [("loss", 1.5, 4)]), "loss at step 4: logged 2 times, not 1"),
        (lambda run: log(run, [("loss", 1.5, 5)]), "loss at step 5: logged 1 times, not 0"),
        (lambda run: (run / "trainer_0_log.txt").write_text("2026-11-21 10:00:00 step 4: loss 1  (0 s)\n"), "1 lines"),
        (lambda run: torch.save({"step": 4}, run / "best_model.pth"), "there are"),
        (lambda run: (run / "checkpoint_4.pth").unlink(), "there are"),
        (lambda run: torch.save({"step": 4, **STATE, "loss": 0}, run / "checkpoint_4.pth"), "checkpoint_4.pth/loss"),
    ],
)
def test_unequal_runs(runs, change, expected):
    change(runs[1])
    (line,) = found_in(runs)
    assert expected in line


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "zeros"])
def test_damage(tmp_path, kind):
    before, path = bytes(range(1, 256)), tmp_path / "file"
    for seed in range(20):
        path.write_bytes(before)
        damage(path, kind, random.Random(seed))
        after = path.read_bytes()
        assert after != before
        assert (len(after) == len(before)) is (kind in ("flipped", "zeros"))


# ---- what it does to a process ----


def write_durably(folder: Path, harm: Harm) -> None:
    """In a process of its own: a checkpoint, and the one before it is deleted."""
    watch = Watch(folder, harm, os.open(folder / "ledger.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    watch.install()
    with open(folder / ".checkpoint_2.pth.1.tmp", "wb") as file:
        file.write(b"1234")
        file.write(b"5678")
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / ".checkpoint_2.pth.1.tmp", folder / "checkpoint_2.pth")
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    (folder / "checkpoint_1.pth").unlink()
    watch.save_trace(folder / "trace.json")


def outcome(folder: Path, harm: Harm) -> tuple[int, dict[str, str], str]:
    """Exit code, contents of the checkpoints, and the ledger."""
    (folder / "checkpoint_1.pth").write_text("old")
    process = multiprocessing.get_context("fork").Process(target=write_durably, args=(folder, harm))
    process.start()
    process.join()
    contents = {path.name: path.read_text() for path in folder.iterdir() if "checkpoint" in path.name}
    return process.exitcode, contents, (folder / "ledger.txt").read_text()


NEW, OLD, HALF = {"checkpoint_2.pth": "12345678"}, {"checkpoint_1.pth": "old"}, ".checkpoint_2.pth.1.tmp"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("harm", "code", "expected", "last"),
    [
        (Harm(), 0, NEW, "deleted checkpoint_1.pth"),
        (Harm("kill", "write", 1, "halfway"), -9, {**OLD, HALF: "12"}, "killed halfway write 1"),
        (Harm("kill", "write", 2, "before"), -9, {**OLD, HALF: ""}, "killed before write 2"),  # in python's buffer
        (Harm("kill", "fsync", 1, "after"), -9, {**OLD, HALF: "12345678"}, "killed after fsync 1"),
        (Harm("kill", "replace", 1, "before"), -9, {**OLD, HALF: "12345678"}, "killed before replace 1"),
        (Harm("kill", "replace", 1, "after"), -9, {**OLD, **NEW}, "killed after replace 1"),
        (Harm("kill", "sync folder", 1, "after"), -9, {**OLD, **NEW}, "killed after sync folder 1"),
        (Harm("kill", "unlink", 1, "before"), -9, {**OLD, **NEW}, "killed before unlink 1"),
        (Harm("kill", "unlink", 1, "after"), -9, NEW, "killed after unlink 1"),
        (Harm("full", "write", 2, "before"), 1, {**OLD, HALF: "1234"}, ""),
        (Harm("read-only"), 1, OLD, ""),
    ],
)
def test_harm(tmp_path, capfd, harm, code, expected, last):
    found, contents, ledger = outcome(tmp_path, harm)
    assert (found, contents) == (code, expected)
    assert (ledger.splitlines() or [""])[-1] == last
    errors = capfd.readouterr().err
    assert ("No space left" in errors, "Read-only" in errors) == (harm.kind == "full", harm.kind == "read-only")


def test_safe_and_unsafe_orders(tmp_path):
    outcome(tmp_path, Harm())
    safe = json.loads((tmp_path / "trace.json").read_text())
    write, _, sync, replace, sync_folder, unlink = safe
    assert unsafe(safe) == []
    assert unsafe([write, replace, sync_folder]) == ["checkpoint_2.pth was renamed before it was synced"]
    (line,) = unsafe([write, sync, replace, unlink, sync_folder])
    assert line == "checkpoint_1.pth was deleted before the entry of checkpoint_2.pth was durable"
    assert unsafe([unlink, write, sync, replace]) == ["checkpoint_1.pth was deleted before there was a newer one"]


def test_leftovers(tmp_path):
    for name in ("checkpoint_1.pth", ".checkpoint_2.pth.77.tmp", "checkpoint_3.pth.damaged", "config.json"):
        (tmp_path / name).touch()
    assert {path.name for path in leftovers(tmp_path)} == {".checkpoint_2.pth.77.tmp"}

"""The launcher: what it hands to the ranks, and what becomes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer import distribute

ROOT = Path(__file__).resolve().parents[2]
CPU = ["--nproc", "2", "--device", "cpu"]

WRITES_DOWN = """
import json, os, sys
rank = os.environ["RANK"]
names = ("WORLD_SIZE", "LOCAL_RANK", "TRAINER_DEVICE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MARK")
found = {"argv": sys.argv, "python": sys.executable, "environment": {name: os.environ.get(name) for name in names}}
with open(f"rank_{rank}.json", "w") as file:
    json.dump(found, file)
"""
SUMS = """
import os, sys, torch
from trainer import TrainerArgs, TrainerConfig
from trainer.distributed import Ranks
args = TrainerArgs()
ranks = Ranks.from_environment(TrainerConfig(), args)
ranks.open(torch.device("cpu"))
total, _ = ranks.agree(float(sys.argv[1]) + ranks.rank)
with open(f"{sys.argv[1]}_{ranks.rank}.txt", "w") as file:
    file.write(f"{total} {args.group_id} {os.environ['MASTER_PORT']}")
"""
ONE_FAILS = """
import time, torch
from trainer import TrainerArgs, TrainerConfig
from trainer.distributed import Ranks
ranks = Ranks.from_environment(TrainerConfig(), TrainerArgs())
ranks.open(torch.device("cpu"))
if ranks.rank == 1:
    open("failed", "w").close()
    raise ValueError("the error that came first")
ranks.barrier()
"""
ONE_EXITS = """
import os, sys, time
if os.environ["RANK"] == "0":
    open("sleeping", "w").write(str(os.getpid()))
    time.sleep(600)
while not os.path.exists("sleeping"):
    time.sleep(0.05)
sys.exit(7)
"""
SAVES_ON_CTRL_C = """
import os, signal, sys, time
rank = os.environ["RANK"]
def save(number, frame):
    time.sleep(0.3)
    open(f"saved_{rank}", "w").write(str(number))
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
open(f"ready_{rank}", "w").close()
time.sleep(600)
"""


def start(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start the launcher in a folder with this script."""
    (folder / "script.py").write_text(script)
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    variables.update({"PYTHONPATH": str(ROOT), **environment})
    command = [sys.executable, "-m", "trainer.distribute", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    """The launcher's exit code, and its stderr; it is killed when it takes too long."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it stops its ranks
        process.communicate(timeout=20)
        raise
    return process.returncode, errors


def wait_for(*paths: Path, seconds: float = 60) -> None:
    """Wait until files are there."""
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{paths} are not there"
        time.sleep(0.02)


class TestRegressions:
    """What Coqui's launcher does wrong."""

    def test_all_arguments_are_passed_on_by_this_interpreter(self, tmp_path):
        fake = tmp_path / "bin" / "python3"
        fake.parent.mkdir()
        fake.write_text("#!/bin/sh\nexit 5\n")
        fake.chmod(0o755)
        arguments = [
            "--continue_path=runs/a",
            "--coqpit.lr",
            "1e-3",
            "--small_run",
            "5",
            "data dir",
            "$$x${local_rank}",
            "",
        ]
        process = start(
            tmp_path,
            WRITES_DOWN,
            "--script",
            "script.py",
            *CPU,
            *arguments,
            PATH=f"{fake.parent}:{os.environ['PATH']}",
            MARK="kept",
            OMP_NUM_THREADS="3",
        )
        code, errors = finish(process)
        assert code == 0, errors
        for rank in range(2):
            found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
            assert found["argv"] == ["script.py", *arguments]
            assert found["python"] == sys.executable
            assert found["environment"] == {
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
                "TRAINER_DEVICE": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "3",
                "MARK": "kept",
            }

    def test_a_failing_rank_gives_an_exit_code_and_the_first_traceback(self, tmp_path):
        process = start(tmp_path, ONE_FAILS, "script.py", *CPU)
        code, errors = finish(process)
        assert code == 1
        end = errors[errors.rindex("failed (exit code 1):") - len("rank 1 ") :]
        assert end.startswith("rank 1 failed")
        assert "Traceback (most recent call last)" in end
        assert end.rstrip().endswith("ValueError: the error that came first")

    def test_the_other_ranks_are_stopped_within_seconds(self, tmp_path):
        process = start(tmp_path, ONE_EXITS, "script.py", *CPU)
        wait_for(tmp_path / "sleeping")
        begin = time.monotonic()
        code, errors = finish(process)
        assert time.monotonic() - begin < 8
        assert code == 7
        assert "rank 1 failed (exit code 7)" in errors
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "sleeping").read_text()), 0)

    def test_two_launches_at_the_same_time_do_not_collide(self, tmp_path):
        names = ("10", "20")
        processes = [start(tmp_path, SUMS, "--script=script.py", *CPU, name) for name in names]
        for process in processes:
            code, errors = finish(process)
            assert code == 0, errors
        found = [[(tmp_path / f"{name}_{rank}.txt").read_text().split() for rank in range(2)] for name in names]
        for name, (first, second) in zip(names, found):
            assert first == second
            assert float(first[0]) == 2 * float(name) + 1
            assert first[1].startswith("group_")
        assert found[0][0][1:] != found[1][0][1:]


def test_the_rank_whose_error_is_oldest_is_reported(tmp_path, capsys):
    failures = {}
    for rank, age in ((0, 1.0), (1, 2.0), (2, 0.0)):
        path = tmp_path / f"{rank}.json"
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
        message = {"message": "", "extraInfo": {"py_callstack": f"trace of rank {rank}"}}
        failures[rank] = SimpleNamespace(error_file=str(path), exitcode=rank + 1, message=message)
    failures[3] = SimpleNamespace(error_file="<N/A>", exitcode=-9, message="killed")
    assert distribute._report(failures) == 2
    assert capsys.readouterr().err == "\nrank 1 failed (exit code 2):\ntrace of rank 1\n"
    stopped = SimpleNamespace(error_file="<N/A>", exitcode=-15, message="stopped")
    assert distribute._report({0: stopped, 3: failures[3]}) == 137
    assert "rank 3 failed (exit code -9):\nkilled" in capsys.readouterr().err


def test_ctrl_c_reaches_the_ranks_and_waits_until_they_have_saved(tmp_path):
    process = start(tmp_path, SAVES_ON_CTRL_C, "script.py", *CPU)
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    process.send_signal(signal.SIGINT)
    code, _ = finish(process)
    assert code == 130
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == ["2", "2"]


class TestArguments:
    """What is the launcher's, and what the script's."""

    @pytest.mark.parametrize(
        ("argv", "own", "rest"),
        [
            (["--script", "x.py", "--gpus", "0,1", "--lr", "3"], ["--script", "x.py", "--gpus", "0,1"], ["--lr", "3"]),
            (["--lr", "3", "--gpus=0", "--script=x.py"], ["--gpus=0", "--script=x.py"], ["--lr", "3"]),
            (["x.py", "--nproc", "2", "a"], ["--nproc", "2"], ["x.py", "a"]),
            (["x.py", "--gpu", "1", "--script_args", "b"], [], ["x.py", "--gpu", "1", "--script_args", "b"]),
            (["--nproc=2", "x.py", "--", "--device", "z", "--"], ["--nproc=2"], ["x.py", "--device", "z", "--"]),
            (["--script", "x.py", "--help"], ["--script", "x.py"], ["--help"]),
            (["x.py", "-h"], [], ["x.py", "-h"]),
            (["--gpus", "0", "-h"], ["--gpus", "0", "-h"], []),
        ],
    )
    def test_they_are_told_apart(self, argv, own, rest):
        assert distribute.split_arguments(argv) == (own, rest)

    @pytest.mark.parametrize("argv", [["script.py", "--nproc", "2"], ["--nproc", "2", "--script", "script.py"]])
    def test_the_script_may_come_first_or_by_name(self, argv, tmp_path, monkeypatch):
        launched = []
        (tmp_path / "script.py").touch()
        monkeypatch.chdir(tmp_path)
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRAINER_DEVICE"):
            monkeypatch.setenv(name, "x")  # put back after the test
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
        monkeypatch.setattr(distribute, "launch", lambda command, nproc: launched.append((command, nproc)) or 4)
        assert distribute.main([*argv, "--device=cpu", "a", "-b"]) == 4
        assert launched == [(["script.py", "a", "-b"], 2)]
        assert (os.environ["OMP_NUM_THREADS"], os.environ["TRAINER_DEVICE"]) == ("3", "cpu")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "no script: give it with --script"),
            (["--lr", "3"], "no script: give it with --script"),
            (["--script", "nowhere.py", "--nproc", "2"], "--script=nowhere.py: there is no such file"),
            (["--nproc", "two", "conftest.py"], "invalid int value: 'two'"),
            (["setup.py", "--gpus"], "--gpus: expected one argument"),
            (["setup.py", "--nproc", "0", "--device", "cpu"], "--nproc=0: at least 1"),
            (["setup.py", "--device", "cpu"], "--device=cpu: give the number of ranks with --nproc"),
            (["setup.py", "--gpus", "0", "--nproc", "2"], "--gpus=0 with --nproc=2: give one of them"),
        ],
    )
    def test_what_is_wrong_is_told_before_anything_starts(self, argv, message, capsys, monkeypatch):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(distribute, "launch", lambda *_: pytest.fail("it was started"))
        with pytest.raises(SystemExit) as stopped:
            distribute.main(argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_help_is_the_launchers_until_there_is_a_script(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            distribute.main(["--help"])
        assert stopped.value.code == 0
        assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().out


class TestGpus:
    """Which GPUs are used, on machines with some number of them."""

    def plan(self, monkeypatch, count, visible, gpus=None, nproc=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return distribute.plan(gpus, nproc, "cuda")

    @pytest.mark.parametrize(
        ("count", "visible", "gpus", "nproc", "expected"),
        [
            (4, None, "0,1", None, (2, "0,1")),
            (4, None, " 3, 1", None, (2, "3,1")),
            (4, None, None, None, (4, "0,1,2,3")),
            (4, None, "all", None, (4, "0,1,2,3")),
            (4, None, None, 2, (2, "0,1")),
            (2, "4,7", "1", None, (1, "7")),
            (2, "4,7", "all", None, (2, "4,7")),
            (2, "GPU-aa, GPU-bb", "1,0", None, (2, "GPU-bb,GPU-aa")),
        ],
    )
    def test_they_are_chosen_among_the_visible(self, monkeypatch, count, visible, gpus, nproc, expected):
        found, environment = self.plan(monkeypatch, count, visible, gpus, nproc)
        assert (found, environment) == (expected[0], {"CUDA_VISIBLE_DEVICES": expected[1]})

    @pytest.mark.parametrize(
        ("count", "visible", "gpus", "nproc", "message"),
        [
            (2, None, "0,2", None, "--gpus=0,2: there is no GPU '2'; there are 0, 1"),
            (1, "5", "5", None, "there is no GPU '5' of CUDA_VISIBLE_DEVICES=5; there are 0"),
            (2, None, "1,1", None, "GPU 1 is given twice"),
            (2, None, "0,", None, "there is no GPU ''"),
            (2, None, None, 3, "--nproc=3: there are only 2 GPUs"),
            (0, None, "0", None, "there is no GPU; for two ranks on the CPU: --nproc 2 --device cpu"),
            (0, "", None, None, r"there is no GPU \(CUDA_VISIBLE_DEVICES=''\)"),
        ],
    )
    def test_what_is_not_there_is_refused(self, monkeypatch, count, visible, gpus, nproc, message):
        with pytest.raises(ValueError, match=message):
            self.plan(monkeypatch, count, visible, gpus, nproc)

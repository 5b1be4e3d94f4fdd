"""The launcher: what it hands to the ranks, and what becomes of them."""

import json
import os
import re
import shlex
import socket
import sys

import pytest
import torch

from tests.trainer.launching import CPU, ROOT, finish, start
from trainer import agent, distribute

MEET = (*CPU, "setup.py", "--nnodes", "2", "--rdzv_endpoint", "localhost:29500")
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
total = sum(ranks.gather(float(sys.argv[1]) + ranks.rank))
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


# what the launcher puts into its environment
SET = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRAINER_DEVICE", "TRAINER_LAUNCHER", "TORCH_CPP_LOG_LEVEL")


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
        code, _, errors = finish(process)
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
        code, _, errors = finish(process)
        assert code == 1
        _, end = errors.split("rank 1 failed (exit code 1):\n")
        assert end.startswith("Traceback (most recent call last)")
        assert end.rstrip().endswith("ValueError: the error that came first")

    def test_two_launches_at_the_same_time_do_not_collide(self, tmp_path):
        names = ("10", "20")
        processes = [start(tmp_path, SUMS, "--script=script.py", *CPU, name) for name in names]
        ends = [finish(process) for process in processes]
        assert [code for code, _, _ in ends] == [0, 0], ends
        found = [[(tmp_path / f"{name}_{rank}.txt").read_text().split() for rank in range(2)] for name in names]
        for name, (first, second) in zip(names, found):
            assert first == second
            assert float(first[0]) == 2 * float(name) + 1
            assert first[1].startswith("group_")
        assert found[0][0][1:] != found[1][0][1:]


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
        for name in SET:
            monkeypatch.setenv(name, "x")  # put back after the test
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
        monkeypatch.setattr(agent, "launch", lambda command, job: launched.append((command, job)) or 4)
        assert distribute.main([*argv, "--device=cpu", "a", "-b"]) == 4
        [(command, job)] = launched
        assert (command, job.nproc, job.max_nodes, job.may_restart) == (["script.py", "a", "-b"], 2, 1, False)
        assert (os.environ["OMP_NUM_THREADS"], os.environ["TRAINER_DEVICE"]) == ("3", "cpu")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--lr", "3"], "no script: give it with --script"),
            (["--script", "nowhere.py", "--nproc", "2"], "--script=nowhere.py: there is no such file"),
            (["--nproc", "two", "conftest.py"], "invalid int value: 'two'"),
            (["setup.py", "--gpus"], "--gpus: expected one argument"),
            (["setup.py", "--nproc", "0", "--device", "cpu"], "--nproc=0: at least 1"),
            (["setup.py", "--device", "cpu"], "--device=cpu: give the number of ranks with --nproc"),
            (["setup.py", "--gpus", "0", "--nproc", "2"], "--gpus=0 with --nproc=2: give one of them"),
            (["--nproc", "1", "--device", "cpu"], "no script, and one rank: the check needs two or more"),
            ([*CPU, "setup.py", "--max_restarts", "-1"], "--max_restarts=-1: 0 or more"),
            ([*CPU, "setup.py", "--log_dir", "setup.py"], "--log_dir=setup.py: is a file"),
            ([*CPU, "setup.py", "--log_dir", "setup.py/sub"], "--log_dir=setup.py/sub: Not a directory; give a folder"),
            ([*CPU, "setup.py", "--rdzv_endpoint", "a:1"], "--rdzv_endpoint=a:1: give --nnodes too"),
            ([*CPU, "setup.py", "--rdzv_id", "a"], "--rdzv_id=a: goes with --nnodes and --rdzv_endpoint"),
            (["--nprocs", "2", "setup.py"], "before --nprocs; or did you mean --nproc?"),
            ([*CPU, "setup.py", "--nnodes", "two"], "--nnodes=two: give a number, or MIN:MAX"),
            ([*CPU, "setup.py", "--nnodes", "3:2", "--rdzv_endpoint", "a:1"], "--nnodes=3:2: at least 1, and MIN"),
            ([*CPU, "setup.py", "--nnodes", "0"], "--nnodes=0: at least 1"),
            ([*CPU, "setup.py", "--nnodes", "2"], "--nnodes=2: give --rdzv_endpoint HOST:PORT too"),
            ([*CPU, "setup.py", "--node_rank", "1"], "--node_rank=1: goes with --nnodes"),
            ([*CPU, "setup.py", "--rdzv_endpoint", "node-1"], "--rdzv_endpoint=node-1: give HOST:PORT"),
            ([*CPU, "setup.py", "--rdzv_endpoint", "node-1:70000"], "--rdzv_endpoint=node-1:70000: give HOST:PORT"),
            ([*MEET, "--node_rank", "2"], "--node_rank=2: of 2 machines; count from 0"),
            ([*MEET, "--rdzv_id", "a/b"], "--rdzv_id=a/b: use letters"),
            ([*MEET, "--rdzv_timeout", "0"], "--rdzv_timeout=0: at least 1 second"),
            ([*MEET[:-1], "no.such.invalid:29500"], "this machine knows no way to the host"),
        ],
    )
    def test_what_is_wrong_is_told_before_anything_starts(self, argv, message, capsys, monkeypatch):
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "x")  # put back after the test
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(agent, "launch", lambda *_: pytest.fail("it was started"))
        with pytest.raises(SystemExit) as stopped:
            distribute.main(argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def launched(self, monkeypatch, *argv):
        found = []
        for name in SET:
            monkeypatch.setenv(name, "x")  # put back after the test
        monkeypatch.setattr(agent, "launch", lambda command, job: found.append((command, job)) or 0)
        assert distribute.main([*CPU, *argv]) == 0
        return found[0]

    def test_without_a_script_it_is_the_check(self, monkeypatch):
        command, job = self.launched(monkeypatch)
        assert command == ["-m", "trainer.preflight"]
        assert job.nproc == 2

    def test_several_machines(self, monkeypatch, tmp_path):
        logs = tmp_path / "a" / "b"
        arguments = ["--nnodes", "2:4", "--rdzv_endpoint", "127.0.0.1:29500", "--node_rank", "3"]
        arguments += ["--rdzv_timeout", "7", "--max_restarts", "2", "--log_dir", str(logs)]
        _, job = self.launched(monkeypatch, *arguments)
        assert logs.is_dir()
        assert job == distribute.Job(
            nproc=2,
            run_id="127.0.0.1_29500",
            min_nodes=2,
            max_nodes=4,
            endpoint="127.0.0.1:29500",
            node_rank=3,
            local_address="127.0.0.1",
            rdzv_timeout=7,
            max_restarts=2,
            log_dir=str(logs),
        )
        assert job.may_restart
        assert self.launched(monkeypatch, "--nnodes=2", "--rdzv_endpoint=[::1]:5", "--rdzv_id=x")[1].run_id == "x"

    def test_the_address_is_that_of_the_way_to_the_endpoint(self, monkeypatch):
        class Socket(socket.socket):
            def connect(self, address):
                pass

            def getsockname(self):
                return ("10.1.2.3", 40000)

        def address():
            return self.launched(monkeypatch, "--nnodes=2", "--rdzv_endpoint=192.0.2.1:5")[1].local_address

        monkeypatch.setattr(socket, "socket", Socket)
        assert address() == "10.1.2.3"
        # as Debian names a host to itself
        monkeypatch.setattr(Socket, "getsockname", lambda self: ("127.0.1.1", 40000))
        assert address() == "192.0.2.1"

    def test_the_commands_in_the_docs_are_right(self, monkeypatch):
        text = (ROOT / "docs/distributed.md").read_text(encoding="utf8")
        commands = re.findall(r"^    python -m trainer\.distribute (.*)$", text, flags=re.MULTILINE)
        launched = []
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(distribute, "_own_address", lambda host, port: host)
        monkeypatch.setattr(agent, "launch", lambda command, job: launched.append((command[0], job.nproc)) or 0)
        for name in SET:
            monkeypatch.setenv(name, "0,1")  # put back after the test
        for command in commands:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
            assert distribute.main(shlex.split(command)) == 0
        vits, digits = ("recipes/ljspeech/train_vits.py", 2), ("recipes/digits/train_digits.py", 2)
        assert launched == [vits, vits, digits, ("-m", 2), ("-m", 2), vits]

    def test_help_is_the_launchers_until_there_is_a_script(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            distribute.main(["--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert [flag for flag in distribute.FLAGS if f"{flag} " not in shown] == []


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

"""The launcher and what becomes of its ranks: failures, hangs, signals, logs, restarts, several machines."""

import io
import os
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest

from tests.trainer.launching import CPU, finish, runs, start, wait_for
from trainer import agent
from trainer.signals import ECHO

# rank 1 is killed, rank 0 does not care for SIGTERM; both have a process of their own, as DataLoaders have
KILLED = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"first line of {rank}")
if rank == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"pids_{rank}", "w").write(f"{os.getpid()} {child.pid}")
while not os.path.exists("pids_0"):
    time.sleep(0.02)
if rank == "1":
    print("last line of 1", end="")
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
# fails twice: once with the launcher's patience for others, once at the end
FAILS = """
import os, sys
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt} of {rank}")
if rank == "1":
    print("why it failed", file=sys.stderr)
    sys.exit(7)
"""
SAVES = """
import os, signal, subprocess, sys, time
rank, stubborn = os.environ["RANK"], sys.argv[1:] == ["stubborn"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(f"child_{rank}", "w").write(str(child.pid))
def save(number, frame):
    with open(f"saved_{rank}", "a") as file:
        file.write(f"{number} " if child.poll() is None else f"{number} without its child")
    if not stubborn:
        time.sleep(0.3)
        sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, save)
open(f"ready_{rank}", "w").close()
while True:
    time.sleep(1)
"""


def test_a_killed_rank_ends_the_job_and_nothing_is_left(tmp_path):
    process = start(tmp_path, KILLED, "script.py", *CPU, "--log_dir", "logs")
    wait_for(tmp_path / "pids_0", tmp_path / "pids_1")
    begin = time.monotonic()
    code, output, errors = finish(process)
    assert time.monotonic() - begin < 10
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed (killed by SIGKILL; was the memory short?)" in errors
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / f"pids_{rank}").read_text().split()]
    time.sleep(0.2)  # until the system has cleared away what was killed
    assert [pid for pid in pids if runs(pid)] == []
    # each line once, with its rank; the last one too, and in the file of the rank
    assert sorted(output.splitlines()) == [
        "[rank 0] first line of 0",
        "[rank 1] first line of 1",
        "[rank 1] last line of 1",
    ]
    [file] = (tmp_path / "logs").glob("group_*/attempt_0/rank_1.out")
    assert file.read_text() == "first line of 1\nlast line of 1"
    assert f"started 2 of 2 ranks (0, 1); what they print is kept in {file.relative_to(tmp_path).parents[1]}" in errors
    assert f"logs of all ranks: {file.relative_to(tmp_path).parent}" in errors


def test_restarts_are_counted_and_the_last_failure_is_told(tmp_path):
    process = start(tmp_path, FAILS, "script.py", *CPU, "--max_restarts", "2", "--log_dir", "logs")
    code, output, errors = finish(process)
    assert code == 7
    assert re.findall(r"rank 1 failed; restart (\d) of 2", errors) == ["1", "2"]
    assert errors.endswith("rank 1 failed (exit code 7):\nwhy it failed\n")
    for attempt in range(3):
        assert output.count(f"[rank 1] attempt {attempt} of 1\n") == 1
        [file] = (tmp_path / "logs").glob(f"group_*/attempt_{attempt}/rank_1.err")
        assert file.read_text() == "why it failed\n"


def test_lines_of_ranks_do_not_mix():
    stream = io.StringIO()
    console = agent.WholeLines(stream)
    for part in ("[rank 0] a", "[rank 1] one\n", "[rank 0] b] c\n", "[rank 1] no end"):
        console.write(part)
    assert stream.getvalue() == "[rank 1] one\n[rank 0] ab] c\n"
    console.finish()
    assert stream.getvalue().endswith("c\n[rank 1] no end\n")


class TestSignals:
    """What reaches the launcher reaches each rank, once."""

    def begin(self, folder, *arguments, **options):
        process = start(folder, SAVES, "script.py", *CPU, *arguments, **options)
        wait_for(folder / "ready_0", folder / "ready_1")
        return process

    @pytest.mark.parametrize(
        ("number", "heard"),
        [(signal.SIGINT, signal.SIGINT), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGHUP, signal.SIGTERM)],
    )
    def test_the_ranks_save_once_and_have_what_they_need_for_it(self, tmp_path, number, heard):
        process = self.begin(tmp_path)
        os.killpg(process.pid, number)  # as a terminal sends Ctrl-C: to all that were started from it
        time.sleep(0.1)
        process.send_signal(number)  # by another launcher that passes it on: no second one
        code, _, errors = finish(process)
        assert code == 128 + number
        assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == [f"{int(heard)} "] * 2
        assert "Traceback" not in errors
        time.sleep(0.2)  # until the system has cleared away what was killed
        assert not any(runs(int((tmp_path / f"child_{rank}").read_text())) for rank in range(2))

    def test_what_nohup_has_asked_for_stays(self, tmp_path):
        process = self.begin(tmp_path, through=["nohup"])
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 143
        assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == ["15 "] * 2

    def test_the_second_does_not_wait(self, tmp_path):
        process = self.begin(tmp_path, "stubborn")
        process.send_signal(signal.SIGINT)
        wait_for(tmp_path / "saved_0", tmp_path / "saved_1")
        time.sleep(ECHO)
        assert process.poll() is None  # they may be saving
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)  # nor does the third leave anybody behind
        code, _, _ = finish(process)
        assert time.monotonic() - begin < 10
        assert code == 130
        assert (tmp_path / "saved_0").read_text() == "2 15 "


class TestSeveralMachines:
    """Launchers that meet on this machine."""

    def free_port(self):
        with socket.socket() as listening:
            listening.bind(("", 0))
            return listening.getsockname()[1]

    def start(self, folder, port, script, *arguments):
        meeting = ["--nnodes", "2", "--rdzv_endpoint", f"localhost:{port}", "--nproc=1", "--device=cpu"]
        return start(folder, script, "script.py", *meeting, *arguments)

    def test_a_machine_that_does_not_come(self, tmp_path):
        port = self.free_port()
        code, _, errors = finish(self.start(tmp_path, port, FAILS, "--node_rank=0", "--rdzv_timeout=2"), 30)
        assert code == 1
        assert f"waiting for 2 machines at localhost:{port}, 2 s at most" in errors
        assert f"--rdzv_endpoint=localhost:{port}: fewer than 2 machines came within 2 s" in errors
        assert "Traceback" not in errors

    def test_a_port_that_is_taken(self, tmp_path):
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            port = taken.getsockname()[1]
            hosting = self.start(tmp_path, port, FAILS, "--node_rank=0", "--rdzv_timeout=2")
            joining = self.start(tmp_path, port, FAILS, "--node_rank=1", "--rdzv_timeout=2")
            ends = [finish(process, 30) for process in (hosting, joining)]
        assert [code for code, _, _ in ends] == [1, 1]
        hosts, joins = (errors for _, _, errors in ends)
        assert f"--rdzv_endpoint=localhost:{port}: the port is taken on this machine" in hosts
        # somebody listens there, who says nothing
        assert f"--rdzv_endpoint=localhost:{port}: cannot be reached" in joins
        assert "no answer within 2 s; nothing listens there, or something else" in joins
        assert "Traceback" not in joins

    def test_the_one_that_hosts_waits_for_the_other(self, tmp_path):
        port, folders = self.free_port(), [tmp_path / "0", tmp_path / "1"]
        processes = []
        for number, folder in enumerate(folders):
            folder.mkdir()
            script = f"import time\ntime.sleep({4 * number})\nprint('done')\n"
            processes.append(self.start(folder, port, script, f"--node_rank={number}"))
        ends = [finish(process) for process in processes]
        assert [code for code, _, _ in ends] == [0, 0], ends
        assert sorted(output for _, output, _ in ends) == ["[rank 0] done\n", "[rank 1] done\n"]

    def test_a_failure_on_one_stops_the_other(self, tmp_path):
        port, folders = self.free_port(), [tmp_path / "0", tmp_path / "1"]
        script = FAILS + "import time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
        processes = []
        for number, folder in enumerate(folders):
            folder.mkdir()
            processes.append(self.start(folder, port, script, f"--node_rank={number}"))
        ends = [finish(process) for process in processes]
        assert sorted(code for code, _, _ in ends) == [1, 7]
        [pid] = [int(path.read_text()) for path in tmp_path.glob("*/pid")]
        assert not runs(pid)
        [(_, _, other)] = [end for end in ends if end[0] == 1]
        assert "another machine has stopped its ranks" in other or "cannot be reached, or is lost" in other


def failure(tmp_path, exitcode, age=None, trace=None):
    """A rank that failed, with an error file that is so old, in seconds."""
    path = tmp_path / f"{exitcode}_{age}.json"
    if age is not None:
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    message = {"message": "", "extraInfo": {"py_callstack": trace}} if trace else "none"
    return SimpleNamespace(
        error_file=str(path), exitcode=exitcode, message=message, signal_name=lambda: signal.Signals(-exitcode).name
    )


class TestReport:
    """Which of several failures is shown."""

    def test_that_whose_error_is_oldest(self, tmp_path, capsys):
        failures = {
            rank: failure(tmp_path, rank + 1, age, f"trace of rank {rank}\n")
            for rank, age in enumerate((1.0, 2.0, 0.0))
        }
        assert agent.report(failures, tmp_path) == 2
        shown = f"\nlogs of all ranks: {tmp_path}\nrank 1 failed (exit code 2):\ntrace of rank 1\n"
        assert capsys.readouterr().err == shown

    def test_a_kill_comes_first_and_an_abort_last(self, tmp_path, capsys):
        (tmp_path / "rank_3.err").write_text("".join(f"line {i}\n" for i in range(30)))
        raised, aborted = failure(tmp_path, 1, 1.0, "lost the others"), failure(tmp_path, -signal.SIGABRT)
        assert agent.report({0: aborted, 1: raised, 3: failure(tmp_path, -signal.SIGSEGV)}, tmp_path) == 139
        lines = "\n".join(f"line {i}" for i in range(10, 30))
        assert capsys.readouterr().err.endswith(f"rank 3 failed (killed by SIGSEGV):\n{lines}\n")
        assert agent.report({0: aborted, 1: raised}, tmp_path) == 1
        assert capsys.readouterr().err.endswith("rank 1 failed (exit code 1):\nlost the others\n")

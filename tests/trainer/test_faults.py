"""What becomes of a training of two ranks when one of them goes wrong."""

import time

import pytest

from tests.trainer.launching import CPU, finish, runs, start
from trainer.provenance import as_a_shell_calls

TIMEOUT = 6  # [s] that ranks wait for each other
SCRIPT = f"""
import os, sys, time
import torch
from tests.trainer.toys import Toy, build

class Faulty(Toy):
    def train_step(self, batch, criterion):
        if self.training and len(self.seen) == 4 and os.environ["RANK"] == "1":
            if sys.argv[1] == "hang":
                open("hangs", "w").close()
                this_call_never_ends()
            if sys.argv[1] == "drift":
                with torch.no_grad():
                    self.layer.bias += 1e-6
            if sys.argv[1] == "raise":
                raise KeyError("a bug of rank 1")
        return super().train_step(batch, criterion)

def this_call_never_ends():
    while True:
        time.sleep(1)

if "forever" in sys.argv:
    open("pid_" + os.environ["RANK"], "w").write(str(os.getpid()))
settings = {{"distributed_timeout": {TIMEOUT}, "drift_check_steps": 3, "output_path": "output"}}
build(Faulty, train=40, batch_size=2, epochs=10**5 if "forever" in sys.argv else 2, **settings).fit()
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Exit code, output and errors of each kind of fault; of the one that hangs, how long it did [s]."""
    folders = {fault: tmp_path_factory.mktemp(fault) for fault in ("raise", "drift", "hang")}
    processes = {fault: start(folder, SCRIPT, "script.py", *CPU, fault) for fault, folder in folders.items()}
    found = {fault: finish(process, seconds=90) for fault, process in processes.items()}
    return {**found, "seconds": time.time() - (folders["hang"] / "hangs").stat().st_mtime}


def test_a_rank_that_hangs_is_named(ends):
    code, _, errors = ends["hang"]
    assert code == 1
    assert ends["seconds"] < TIMEOUT + 30
    assert "TimeoutError: rank 1 did not answer for 6 s (distributed_timeout)" in errors
    # and shows by itself where it is
    assert "in this_call_never_ends" in "\n".join(line for line in errors.splitlines() if line.startswith("[rank 1]"))


def test_the_error_of_one_rank_ends_all(ends):
    code, _, errors = ends["raise"]
    assert code == 1
    report = errors[errors.rindex("rank 1 failed") :]
    assert report.rstrip().endswith("KeyError: 'a bug of rank 1'")


def test_weights_that_have_drifted_apart_are_named(ends):
    code, _, errors = ends["drift"]
    assert code == 1
    assert "RuntimeError: step 6: weight layer.bias differs between ranks (rank 1 from rank 0)" in errors


def test_ranks_whose_launcher_is_killed_save_and_exit(tmp_path):
    process = start(tmp_path, SCRIPT, "script.py", *CPU, "forever")
    for line in process.stdout:
        if "step 25:" in line:
            break
    process.kill()
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in range(2)]
    end = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    process.communicate()
    assert not any(map(runs, pids))
    [folder] = (tmp_path / "output").iterdir()
    assert len(list(folder.glob("checkpoint_*.pth"))) == 1
    # the printed command starts as many ranks again
    log = (folder / "trainer_0_log.txt").read_text()
    launcher = f"{as_a_shell_calls('python')} -m trainer.distribute {' '.join(CPU)}"
    command = f"{launcher} script.py --continue_path {folder.relative_to(tmp_path)}"
    assert f"continue it: {command}" in log

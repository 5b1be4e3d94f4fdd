"""Signals to a training process, to its whole group, and once more: what is finished, saved, printed and left behind.

Each case is a process of its own, forked from one that has imported torch.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader

from tests.trainer.launching import ROOT, runs, wait_for
from tests.trainer.toys import Toy, assert_same_weights, build, collate, make_samples, weights_of
from trainer import TrainerArgs
from trainer.checkpoint import load_checkpoint

if not hasattr(os, "fork"):
    pytest.skip("needs os.fork", allow_module_level=True)

FORKS = f"""
import functools, json, multiprocessing, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch._dynamo  # the first optimizer does it otherwise, in each case anew
from torch.utils.data import DataLoader
from tests.trainer.toys import *
import trainer.trainer, trainer.checkpoint, torch.utils.data._utils as loading
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    open(case["folder"] + "/pid.new", "w").write(str(child))
    os.rename(case["folder"] + "/pid.new", case["folder"] + "/pid")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(case["folder"] + "/code.new", "w").write(str(code))
    os.rename(case["folder"] + "/code.new", case["folder"] + "/code")
else:
    os._exit(0)
os.setsid()
os.chdir(case["folder"])
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)

def wait_until(path):
    while not os.path.exists(path):
        time.sleep(0.01)

def note_workers():
    pids = " ".join(str(worker.pid) for worker in multiprocessing.active_children())
    open("workers.new", "w").write(pids)
    os.rename("workers.new", "workers")

class Samples(list):
    '''Reading one takes a while; reading one of those from "slow" on takes forever, as long as there is that file.'''
    def __init__(self, samples, slow=None, seconds=0.0):
        super().__init__(samples)
        self.slow, self.seconds = slow, seconds
    def __getitem__(self, index):
        time.sleep(self.seconds)
        if self.slow is not None and index >= self.slow and os.path.exists("slow"):
            open(f"reading_{{index}}", "w").close()
            time.sleep(600)
        return super().__getitem__(index)

class InStep(Toy):
    '''Waits in its second update, and says so.'''
    def train_step(self, batch, criterion):
        if self.training and len(self.seen) == 1:
            note_workers()
            open("in_step", "w").close()
            wait_until("go_on")
        return super().train_step(batch, criterion)

exec(case["script"])
"""


class Case:
    """A process that runs a script."""

    def __init__(self, forks, folder, script):
        self.folder = folder
        forks.stdin.write(json.dumps({"folder": str(folder), "script": script}) + "\n")
        forks.stdin.flush()
        wait_for(folder / "pid")
        self.pid = int((folder / "pid").read_text())

    def wait_for(self, name):
        end = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert not (self.folder / "code").exists(), self.text("stderr")
            assert time.monotonic() < end, f"{name} is not there"
            time.sleep(0.01)

    def text(self, name):
        return (self.folder / name).read_text()

    def code(self, seconds=30):
        """Its exit code, as the parent process sees it."""
        wait_for(self.folder / "code", seconds=seconds)
        return int(self.text("code"))

    def saved_step(self):
        """Of the newest checkpoint."""
        [run] = (self.folder / "output").iterdir()
        return max(load_checkpoint(path)["step"] for path in run.glob("checkpoint_*.pth"))


@pytest.fixture(scope="module")
def forks():
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def begin(forks, tmp_path):
    """Starts a case; what it leaves behind is killed."""
    started = []

    def begin(script):
        started.append(Case(forks, tmp_path, script))
        return started[-1]

    yield begin
    for case in started:
        if not (case.folder / "code").exists():
            os.killpg(case.pid, signal.SIGKILL)
            case.code()


IN_A_STEP = """
LOADER
build(InStep, train_loader=loader, run_eval=False, epochs=5).fit()
"""
LOADERS = {
    "build_loader": "loader = build_loader(Samples(make_samples(40), seconds=0.2), 2, collate_fn=collate, seed=0,"
    " shuffle=True, num_workers=2)",
    "own": """
def init(worker):
    open(f"own_{worker}", "w").close()
loader = DataLoader(Samples(make_samples(40), seconds=0.2), 2, collate_fn=collate, num_workers=2, worker_init_fn=init)
""",
    "own, persistent": "loader = DataLoader(Samples(make_samples(40), seconds=0.2), 2, collate_fn=collate,"
    " num_workers=2, persistent_workers=True, prefetch_factor=1)",
    "no workers": "loader = DataLoader(make_samples(40), 2, collate_fn=collate)",
}


@pytest.mark.parametrize(
    ("number", "loader"),
    [
        (signal.SIGINT, "build_loader"),
        (signal.SIGTERM, "build_loader"),
        (signal.SIGTERM, "own"),
        (signal.SIGUSR1, "own, persistent"),
        (signal.SIGUSR1, "no workers"),
    ],
)
def test_a_signal_to_the_group_lets_the_step_finish(begin, number, loader):
    case = begin(IN_A_STEP.replace("LOADER", LOADERS[loader]))
    case.wait_for("in_step")
    for _ in range(2):  # by a launcher, and by whoever it has it from
        os.killpg(case.pid, number)
    time.sleep(0.5)  # while the workers go on reading
    workers = case.text("workers").split()
    assert len(workers) == (0 if loader == "no workers" else 2)
    assert all(runs(int(worker)) for worker in workers)
    (case.folder / "go_on").touch()
    assert case.code() == 128 + number
    assert case.saved_step() == 2
    assert case.text("stderr") == ""
    assert case.text("stdout").count(f"stopped by {signal.Signals(number).name}") == 1
    assert "Traceback" not in case.text("stdout")
    assert not any(runs(int(worker)) for worker in workers)
    if loader == "own":
        assert sorted(path.name for path in case.folder.glob("own_*")) == ["own_0", "own_1"]


STARTING = """
install = loading.signal_handling._set_worker_signal_handlers
def slowly():
    install()
    open(f"starting_{os.getpid()}", "w").close()
    time.sleep(1)
loading.signal_handling._set_worker_signal_handlers = slowly
threading.Thread(target=lambda: (time.sleep(0.5), note_workers()), daemon=True).start()
loader = DataLoader(make_samples(8), 2, collate_fn=collate, num_workers=1, multiprocessing_context="CONTEXT",
                    worker_init_fn=print)
build(train_loader=loader, run_eval=False, epochs=2).fit()
"""


@pytest.mark.parametrize(
    ("context", "number"),
    [("fork", signal.SIGINT), ("fork", signal.SIGTERM), ("fork", signal.SIGUSR1), ("spawn", signal.SIGUSR1)],
)
def test_a_signal_while_the_workers_start(begin, context, number):
    case = begin(STARTING.replace("CONTEXT", context))
    case.wait_for("workers")
    os.killpg(case.pid, number)
    assert case.code() == 128 + number
    assert case.text("stderr") == ""


SECOND = """
fsync, once = os.fsync, []
def stuck(file):
    if trainer.total_steps_done == 2:
        open("saving", "w").close()
        time.sleep(600)
    fsync(file)
os.fsync = stuck
loader = DataLoader(Samples(make_samples(40), slow=8), 2, collate_fn=collate, num_workers=2, prefetch_factor=2)
trainer = build(InStep, train_loader=loader, run_eval=False, epochs=5, save_step=1, save_n_checkpoints=9)
trainer.fit()
"""


@pytest.mark.parametrize("where", ["in_step", "saving"])
def test_a_second_signal_ends_the_process_at_once(begin, where):
    """In an update, and while a checkpoint is being written; the workers are busy for ten minutes."""
    (case := begin(SECOND)).folder.joinpath("slow").touch()
    case.wait_for("in_step")
    os.kill(case.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(case.pid, signal.SIGTERM)  # the same once more: passed on by a launcher
    time.sleep(0.6)
    assert not (case.folder / "code").exists()
    if where == "saving":
        (case.folder / "go_on").touch()
        case.wait_for("saving")
    workers = [int(worker) for worker in case.text("workers").split()]
    assert len([worker for worker in workers if runs(worker)]) == 2
    start = time.monotonic()
    os.kill(case.pid, signal.SIGUSR1)
    assert case.code() == 128 + signal.SIGUSR1
    assert time.monotonic() - start < 5
    line = "SIGUSR1: a second signal; exiting at once, without another checkpoint\n"
    assert case.text("stderr") == line
    assert not any(runs(worker) for worker in workers)
    assert case.saved_step() == 1


AFTER_AN_ERROR = """
class Failing(Toy):
    def train_step(self, batch, criterion):
        wait_until("reading_8")
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGUSR1)
        raise RuntimeError("this model fails")
loader = DataLoader(Samples(make_samples(40), slow=8), 2, collate_fn=collate, num_workers=2)
build(Failing, train_loader=loader, run_eval=False).fit()
"""


def test_an_error_ends_workers_that_are_busy(begin):
    """Python sends them one SIGTERM, and waits without end."""
    (case := begin(AFTER_AN_ERROR)).folder.joinpath("slow").touch()
    assert case.code() == 1
    assert "this model fails" in case.text("stderr")
    assert "exited unexpectedly" not in case.text("stderr")


WHILE_SAVING = """
fsync = os.fsync
def interrupted(file):
    os.kill(os.getpid(), signal.SIGTERM)
    fsync(file)
class Testing(Toy):
    def on_train_step_end(self, trainer):
        if trainer.total_steps_done == 2:
            os.fsync = interrupted
build(Testing, epochs=100, save_step=2).fit()
"""


def test_a_signal_while_a_checkpoint_is_written(begin):
    case = begin(WHILE_SAVING)
    assert case.code() == 128 + signal.SIGTERM
    assert case.saved_step() in (2, 3)  # written in a thread, meanwhile the next update may have begun
    assert case.text("stderr") == ""


class Stopping(Toy):
    """Gets a signal in the middle of what it is told, once."""

    where, heard = "", ()

    def _hear(self, here):
        self.heard = (*self.heard, here)
        if here == self.where and self.heard.count(here) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def train_step(self, batch, criterion):
        found = super().train_step(batch, criterion)
        if self.training and len(self.seen) == 3:
            self._hear("window")
        return found

    def eval_step(self, batch, criterion):
        self._hear("evaluation")
        return super().eval_step(batch, criterion)

    def test_run(self, trainer):
        self._hear("test")


@pytest.mark.parametrize(
    ("where", "heard", "steps"),
    [
        ("window", ("window",), 2),  # of two batches: the third is the first of the second
        ("evaluation", ("window", "evaluation"), 3),  # left at its next batch, and nothing is tested
        ("test", ("window", "evaluation", "evaluation", "test"), 3),  # finished
    ],
)
def test_a_signal_outside_of_updates_and_in_the_middle_of_one(tmp_path, monkeypatch, where, heard, steps):
    monkeypatch.chdir(tmp_path)
    settings = {"train": 24, "epochs": 2, "evaluation": 8}

    def trained(where, **args):
        trainer = build(Stopping, args=TrainerArgs(grad_accum_steps=2, **args), **settings)
        trainer.model.where = where
        return trainer

    whole, stopped = trained(""), trained(where)
    whole.fit()
    with pytest.raises(SystemExit) as error:
        stopped.fit()
    assert error.value.code == 128 + signal.SIGINT
    assert stopped.model.heard[: len(heard) + 1] == heard
    assert stopped.total_steps_done == steps
    second = trained("", continue_path=str(stopped.output_path))
    second.fit()
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    assert second.best_loss == whole.best_loss


WAITING = """
def loader(slow, **settings):
    samples = Samples(make_samples(16), slow=FROM if slow else None)
    return DataLoader(samples, 2, collate_fn=collate, num_workers=2, **settings)
in_evaluation = WHERE == "evaluation"
train_loader = loader(not in_evaluation, persistent_workers=WHERE == "epoch, persistent")
eval_loader = loader(in_evaluation)
build(Toy, train_loader=train_loader, eval_loader=eval_loader, epochs=1, args=TrainerArgs(grad_accum_steps=3)).fit()
"""


@pytest.mark.parametrize(
    ("where", "slow", "steps"),
    [("epoch", 8, 1), ("epoch, persistent", 8, 1), ("epoch, first batch", 0, 0), ("evaluation", 8, 3)],
)
def test_a_batch_that_does_not_come_is_not_waited_for(begin, tmp_path, monkeypatch, where, slow, steps):
    """Not even for the other batches of an accumulation window; what was read of it is read again."""
    (tmp_path / "slow").touch()
    case = begin(WAITING.replace("WHERE", repr(where)).replace("FROM", str(slow)))
    case.wait_for(f"reading_{slow}")
    time.sleep(0.3)
    os.killpg(case.pid, signal.SIGINT)
    assert case.code() == 128 + signal.SIGINT
    assert (case.text("stderr"), case.saved_step()) == ("", steps)
    assert "no loss for any batch" not in case.text("stdout")
    monkeypatch.chdir(tmp_path)

    def continued(**args):
        loaders = {f"{name}_loader": DataLoader(make_samples(16), 2, collate_fn=collate) for name in ("train", "eval")}
        trainer = build(epochs=1, args=TrainerArgs(grad_accum_steps=3, **args), **loaders)
        trainer.fit()
        return trainer

    [run] = (case.folder / "output").iterdir()
    second, whole = continued(continue_path=str(run)), continued()
    assert second.total_steps_done == whole.total_steps_done == 3
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    assert second.best_loss == whole.best_loss

"""Ranks that srun has started: whether they are found, and who they are."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.trainer.launching import ROOT, finish, wait_for
from tests.trainer.toys import build
from trainer import TrainerArgs, TrainerConfig
from trainer.distributed import Ranks
from trainer.slurm import first_host, ranks_of_step

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
RANK_5 = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": str(10000 + 7 * 123456 % 20000),
}


def test_a_task_of_a_step_is_a_rank():
    assert ranks_of_step(STEP) == RANK_5


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # the batch script itself
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # a launcher in the step has started this process
        {**STEP, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_what_is_no_rank_of_slurms(environment):
    assert ranks_of_step(environment) == {}


def test_what_is_set_is_left():
    found = ranks_of_step({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000", "LOCAL_RANK": "3"})
    assert found == {"RANK": "5", "WORLD_SIZE": "8"}


def test_ports_of_jobs_and_steps_differ():
    def port(job, step):
        return int(ranks_of_step({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])

    ports = {port(job, step) for job in range(4000000, 4000200) for step in range(7)}
    assert len(ports) == 200 * 7
    assert min(ports) >= 10000
    assert max(ports) < 30000


@pytest.mark.parametrize(("visible", "local_rank"), [("3", "0"), ("GPU-5a", "0"), ("0,1", "1"), ("", "1")])
def test_a_task_with_one_gpu_of_its_own_finds_it_at_0(visible, local_rank):
    assert ranks_of_step({**STEP, "CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == local_rank


def test_what_is_missing_is_named():
    step = {name: value for name, value in STEP.items() if name not in ("SLURM_LOCALID", "SLURM_JOB_ID")}
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS=8 without SLURM_LOCALID, SLURM_JOB_ID: start"):
        ranks_of_step(step)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node01,node02", "node01"),
        ("node[01-03,07],login", "node01"),
        ("node[9,12-13]", "node9"),
        ("rack[2-3]node[005-009]-ib", "rack2node005-ib"),
        ("a-b.c.org,x[1-2]", "a-b.c.org"),
    ],
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_a_list_without_a_host_is_refused():
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST=''"):
        first_host("")


def test_the_trainer_finds_them(monkeypatch):
    for name in RANK_5:
        monkeypatch.setenv(name, "x")  # put back after the test
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    args = TrainerArgs()
    ranks = Ranks.from_environment(TrainerConfig(), args)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, args.use_ddp) == (5, 8, 1, True)
    assert {name: os.environ[name] for name in RANK_5} == RANK_5


# srun passes on what it hears; a script that is started by it cannot be told from one that is not
COMMANDS = {
    "srun": """
import signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
task = subprocess.Popen(command)
signal.signal(signal.SIGUSR1, lambda number, frame: task.send_signal(number))
sys.exit(task.wait())
""",
    "scontrol": "import sys; open('scontrol', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n",
}
TRAIN = """
import os, sys, time
import torch
from tests.trainer.toys import build
def wait_at_step_4(trainer):
    if trainer.total_steps_done == 4 and not os.path.exists("at_step_4"):
        open("at_step_4", "w").close()
        while not trainer._signals.heard():
            time.sleep(0.02)
trainer = build(epochs=3, callbacks={"on_train_step_end": wait_at_step_4})
trainer.fit()
torch.save(trainer.model.state_dict(), "weights.pth")
"""


def test_the_template_puts_its_job_back_and_the_job_goes_on(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "script.py").write_text(TRAIN)
    added = {"SLURM_JOB_ID": "77", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **added, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def submit():
        command = ["bash", str(ROOT / "docs/train.sbatch"), "script.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)

    job = submit()
    wait_for(tmp_path / "at_step_4")
    job.send_signal(signal.SIGUSR1)  # to the script alone
    code, output, errors = finish(job)
    assert (code, errors) == (138, "")
    assert "stopped by SIGUSR1" in output
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    code, output, errors = finish(submit())
    assert (code, errors) == (0, "")
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    [run] = (tmp_path / "output").iterdir()
    assert sorted(path.name for path in run.glob("checkpoint_*")) == ["checkpoint_4.pth", "checkpoint_9.pth"]
    monkeypatch.chdir(tmp_path)
    (whole := build(epochs=3)).fit()
    assert torch.equal(torch.load("weights.pth")["layer.weight"], whole.model.layer.weight)

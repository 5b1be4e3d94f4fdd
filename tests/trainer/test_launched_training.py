"""One training, started in every way: by torchrun, by the launcher on two machines, by srun; killed, and restarted."""

import os
import socket
import stat
import subprocess
import sys
import time

import pytest
import torch

from tests.trainer.launching import CPU, ROOT, finish, runs, start, wait_for
from tests.trainer.toys import Toy, build, collate
from trainer.data.loader import build_loader

SETTINGS = {"train": 13, "evaluation": 6, "epochs": 3, "optimizer": "AdamW", "lr": 0.05}
# two trainings in one script; in the second, rank 1 is killed in the middle of the eighth update of its first attempt
TRAIN = f"""
import multiprocessing, os, signal, sys
import torch
from tests.trainer.toys import Toy, build, collate
from trainer import TrainerArgs
from trainer.data.loader import build_loader

class Killed(Toy):
    kills = False
    def train_step(self, batch, criterion):
        found = super().train_step(batch, criterion)
        if self.kills and self.training and len(self.seen) == 8 and os.environ["RANK"] == "1":
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                open("worker", "w").write(str(multiprocessing.active_children()[0].pid))
                os.kill(os.getpid(), signal.SIGKILL)
        return found
    def get_data_loader(self, config, is_eval, samples, verbose):
        return build_loader(samples, 2, collate_fn=collate, seed=1, shuffle=not is_eval, num_workers=int(not is_eval))

for number in range(2):
    Killed.kills = number == 1 and "kill" in sys.argv
    trainer = build(Killed, batch_size=2, eval_batch_size=2, save_step=3, output_path="output", seed=number,
                    run_name=f"run{{number}}", print_step=1, dropout=0.5 * number, **{SETTINGS!r})
    trainer.fit()
    if os.environ["RANK"] == "0":
        found = {{"weights": trainer.model.state_dict(), "best": trainer.best_loss, "steps": trainer.total_steps_done,
                 "made": len(trainer.model.seen), "folder": str(trainer.output_path)}}
        torch.save(found, f"result{{number}}.pth")
"""


def results(folder):
    """What rank 0 has left of both trainings."""
    return [torch.load(folder / f"result{number}.pth") for number in range(2)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Started by torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    process = start(folder, TRAIN, "--nproc_per_node", "2", "script.py", module="torch.distributed.run")
    code, _, errors = finish(process)
    assert code == 0, errors
    return results(folder)


def assert_same_training(found, expected):
    """Bitwise."""
    for mine, other in zip(found, expected):
        assert (mine["best"], mine["steps"]) == (other["best"], other["steps"])
        assert all(torch.equal(mine["weights"][name], value) for name, value in other["weights"].items())


class Joint(Toy):
    """Reads the batches of both ranks."""

    def get_data_loader(self, config, is_eval, samples, verbose):
        return build_loader(samples, 4, collate_fn=collate, seed=1, shuffle=not is_eval)


def test_torchrun_trains_as_one_process_on_the_joint_batch(undisturbed, tmp_path):
    alone = build(Joint, seed=0, output_path=str(tmp_path), **SETTINGS)
    alone.fit()
    assert undisturbed[0]["steps"] == 12
    for name, value in alone.model.state_dict().items():
        # fp32: sums over at most four samples in another order, through twelve updates
        torch.testing.assert_close(undisturbed[0]["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_killed_ranks_are_restarted_to_the_same_weights(undisturbed, tmp_path):
    process = start(tmp_path, TRAIN, "script.py", *CPU, "kill", "--max_restarts", "1")
    wait_for(tmp_path / "worker")
    worker, end = int((tmp_path / "worker").read_text()), time.monotonic() + 10
    while runs(worker):
        assert time.monotonic() < end, "the DataLoader worker of the killed rank is still there"
        time.sleep(0.05)
    code, output, errors = finish(process)
    assert code == 0, errors
    assert errors.count("rank 1 failed; restart 1 of 1") == 1
    found = results(tmp_path)
    assert_same_training(found, undisturbed)
    # the first training was over, the second goes on after its sixth update
    assert [len(list(tmp_path.glob(f"output/run{number}-*"))) for number in range(2)] == [1, 1]
    assert [result["made"] for result in found] == [0, 6]
    assert output.count("[rank 0] nothing left to train") == 1


def test_two_launchers_are_two_machines(undisturbed, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    arguments = ("--nproc=1", "--device=cpu", "--nnodes=2", f"--rdzv_endpoint={endpoint}")
    processes = [start(tmp_path, TRAIN, "script.py", *arguments, f"--node_rank={rank}") for rank in range(2)]
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert not any("frame #" in errors for _, _, errors in ends)  # torch's C++ backtraces of lost connections
    assert_same_training(results(tmp_path), undisturbed)
    assert sum("[rank 0] " in output for _, output, _ in ends) == 1


SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
def variables(task):
    found = {{"SLURM_PROCID": task, "SLURM_LOCALID": task, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_ID": 0}}
    return {{**os.environ, **{{name: str(value) for name, value in found.items()}}}}
tasks = [subprocess.Popen(command, env={{**variables(task), "SLURM_STEP_NODELIST": "localhost"}}) for task in range(2)]
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_sbatch_template_trains(undisturbed, tmp_path):
    (tmp_path / "bin").mkdir()
    srun, script = tmp_path / "bin" / "srun", tmp_path / "script.py"
    srun.write_text(SRUN)
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    script.write_text(TRAIN)
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    # as sbatch sets them for the batch script, which is no rank
    environment.update(
        {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    )
    environment.update(
        {"PATH": f"{srun.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    )
    command = ["bash", str(ROOT / "docs/train.sbatch"), "script.py"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_same_training(results(tmp_path), undisturbed)


def test_the_sbatch_template_is_bash(tmp_path):
    template = ROOT / "docs/train.sbatch"
    subprocess.run(["bash", "-n", str(template)], check=True)
    lines = template.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    # sbatch reads them up to the first command
    assert lines.index(options[-1]) < lines.index("set -euo pipefail")
    assert all(line.startswith("#SBATCH --") and " #" not in line for line in options)

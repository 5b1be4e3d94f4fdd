"""Ranks that were started by SLURM's srun: their variables, as a launcher would have set them."""

import re
from collections.abc import Mapping

_FIRST_PORT, _PORTS = 10000, 20000  # below those that the system hands out


def ranks_of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this task of an srun step of several tasks.

    SLURM_NTASKS is not looked at: sbatch sets it for the batch script too, which is no rank.

    Args:
        environment: of this process.

    Returns:
        What is not in the environment yet; nothing outside of such a step, or where a launcher has set RANK or
        WORLD_SIZE.

    Raises:
        ValueError: some of SLURM's variables are missing.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return {}
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1":
        return {}
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    if missing := [name for name in names if name not in environment]:
        raise ValueError(f"SLURM_STEP_NUM_TASKS={tasks} without {', '.join(missing)}: start the ranks with srun")
    rank, local_rank, nodes, job = (environment[name] for name in names)
    # one GPU of its own for each task (--gpus-per-task=1): its index is 0 in all of them
    if re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")):
        local_rank = "0"
    # two jobs on a machine, or two steps of a job, must not meet
    port = _FIRST_PORT + (7 * int(job) + int(environment.get("SLURM_STEP_ID", "0"))) % _PORTS
    found = {
        "RANK": rank,
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(port),
    }
    return {name: value for name, value in found.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: ``node01`` of ``node[01-03,07],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r}: names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])

"""Start a training script on several GPUs, on one machine or on several, or on CPU ranks.

    python -m trainer.distribute --gpus 0,1 --script recipes/ljspeech/train_vits.py --coqpit.batch_size=16
    python -m trainer.distribute recipes/ljspeech/train_vits.py --nproc 2 --device cpu --small
    python -m trainer.distribute --gpus 0,1

A front to torch's elastic launcher. Its flags may stand anywhere before a ``--``; everything else is handed to the
script as it is. Without a script the ranks check that they can work together (trainer/preflight.py). When a rank fails,
the others are stopped, its traceback is shown last, and the exit code is not 0. Ctrl-C, SIGTERM and SIGUSR1 are passed
on to the ranks, which save and exit. docs/distributed.md tells the rest.
"""

import argparse
import difflib
import ipaddress
import os
import re
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.provenance import as_a_shell_calls

FLAGS = (
    *("--script", "--gpus", "--nproc", "--device", "--max_restarts", "--log_dir"),
    *("--nnodes", "--rdzv_endpoint", "--node_rank", "--rdzv_id", "--rdzv_timeout"),
)


@dataclass
class Job:
    """What is to be started.

    Attributes:
        nproc: ranks on this machine.
        run_id: name of the job, the same on all machines.
        min_nodes: machines that must be there; max_nodes: those that may.
        endpoint: where the machines meet, ``HOST:PORT``; None for one machine.
        node_rank: number of this machine; 0 hosts the endpoint. None: found out from the endpoint's host.
        local_address: under which the other machines reach this one.
        rdzv_timeout: seconds until all machines must be there.
        max_restarts: how often all ranks are started again after a failure.
        log_dir: folder for what the ranks print; None means that of temporary files.
    """

    nproc: int
    run_id: str
    min_nodes: int = 1
    max_nodes: int = 1
    endpoint: str | None = None
    node_rank: int | None = None
    local_address: str = "localhost"  # the host's own name may lead nowhere
    rdzv_timeout: int = 300
    max_restarts: int = 0
    log_dir: str | None = None

    @property
    def may_restart(self) -> bool:
        """Whether ranks may be started more than once."""
        return self.max_restarts > 0 or self.min_nodes < self.max_nodes


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, and wait for them.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0, that of the rank that failed first, or 128 and the number of the signal that came.

    Raises:
        SystemExit: 0 after ``--help``; 2 when the arguments are wrong, before anything is started.
    """
    parser = _parser()
    own, rest = split_arguments(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(own)
    if options.script is None and rest and not rest[0].startswith("-"):
        options.script = rest.pop(0)
    if options.script is None and rest:
        near = difflib.get_close_matches(rest[0].partition("=")[0], FLAGS, 1)
        hint = f"; or did you mean {near[0]}?" if near else ""
        parser.error(f"no script: give it with --script, or as the first argument, before {rest[0]}{hint}")
    if options.script is not None and not Path(options.script).is_file():
        parser.error(f"--script={options.script}: there is no such file (from {Path.cwd()})")
    # connections that are lost are told in words, not by torch's C++ backtraces
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        nproc, environment = plan(options.gpus, options.nproc, options.device)
        job = make_job(options, nproc)
    except ValueError as error:
        parser.error(str(error))
    if options.script is None and nproc * job.max_nodes == 1:
        parser.error("no script, and one rank: the check needs two or more, such as --nproc 2 --device cpu")
    os.environ.update(environment)
    launcher = shlex.join(["-m", "trainer.distribute", *_without_script(own)])
    os.environ["TRAINER_LAUNCHER"] = f"{as_a_shell_calls('python')} {launcher}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    from trainer import agent  # heavy: --help and wrong arguments come without torch

    return agent.launch([options.script, *rest] if options.script else ["-m", "trainer.preflight"], job)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.distribute",
        usage="%(prog)s [--gpus 0,1 | --nproc N --device cpu] [flags below] [--script SCRIPT [its arguments]]",
        description="Start a training script on several GPUs, on one machine or on several, or on CPU ranks. Without "
        "a script: check that the ranks can work together, and measure how fast.",
        epilog="All other arguments are handed to the script; after -- these flags as well. Exit code: 0; 2 for wrong "
        "arguments; 1 when machines did not find each other; that of the rank that failed first (128 + N if signal N "
        "killed it); 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.",
        allow_abbrev=False,
    )
    parser.add_argument("--script", help="the training script; or the first argument")
    parser.add_argument("--gpus", help="GPUs to use: 0,1 or all (default); of CUDA_VISIBLE_DEVICES, if that is set")
    parser.add_argument("--nproc", type=int, help="number of ranks on this machine; on GPUs the first N are used")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks train on (default: cuda)"
    )
    parser.add_argument(
        "--log_dir", help="where a folder for the output of each rank is made (default: that of temporary files)"
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=0,
        help="after a failure, start all ranks again from the newest checkpoint, up to N times (default: %(default)s)",
    )
    _add_machines(parser)
    return parser


def _add_machines(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group("several machines", "Start the same command on each of them.")
    several.add_argument(
        "--nnodes",
        help="number of machines: N, or MIN:MAX to start with those of MAX "
        "that are there, if at least MIN are (default: 1)",
    )
    several.add_argument("--rdzv_endpoint", metavar="HOST:PORT", help="where they meet: one of them, and a free port")
    several.add_argument(
        "--node_rank",
        type=int,
        help="number of this machine: 0 is the endpoint's HOST; needed only where it does not know itself by that name",
    )
    several.add_argument("--rdzv_id", help="name of the job, the same on all (default: made of the endpoint)")
    several.add_argument(
        "--rdzv_timeout",
        type=int,
        default=Job.rdzv_timeout,
        help="seconds within which all must be there (default: %(default)s)",
    )


def _without_script(own: Sequence[str]) -> list[str]:
    """The launcher's own arguments without ``--script SCRIPT``."""
    words = list(own)
    if "--script" in words:
        at = words.index("--script")
        del words[at : at + 2]
    return [word for word in words if not word.startswith("--script=")]


def make_job(options: argparse.Namespace, nproc: int) -> Job:
    """What the options ask for.

    Raises:
        ValueError: they contradict each other, or a value is out of range.
    """
    if options.max_restarts < 0:
        raise ValueError(f"--max_restarts={options.max_restarts}: 0 or more")
    if options.rdzv_id is not None and not re.fullmatch(r"[\w.-]+", options.rdzv_id):
        raise ValueError(f"--rdzv_id={options.rdzv_id}: use letters, digits and . _ - only; it names a folder too")
    if options.log_dir is not None:
        if Path(options.log_dir).is_file():
            raise ValueError(f"--log_dir={options.log_dir}: is a file; give a folder")
        try:
            Path(options.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--log_dir={options.log_dir}: {error.strerror}; give a folder") from error
    job = Job(nproc, options.rdzv_id or "", max_restarts=options.max_restarts, log_dir=options.log_dir)
    if (found := re.fullmatch(r"(\d+)(?::(\d+))?", options.nnodes or "1")) is None:
        raise ValueError(f"--nnodes={options.nnodes}: give a number, or MIN:MAX")
    job.min_nodes, job.max_nodes = int(found[1]), int(found[2] or found[1])
    if not 1 <= job.min_nodes <= job.max_nodes:
        raise ValueError(f"--nnodes={options.nnodes}: at least 1, and MIN not above MAX")
    if options.rdzv_endpoint is not None:
        _meet_others(job, options)
        return job
    if job.max_nodes > 1:
        raise ValueError(f"--nnodes={options.nnodes}: give --rdzv_endpoint HOST:PORT too, where the machines meet")
    for name in ("node_rank", "rdzv_id"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}={getattr(options, name)}: goes with --nnodes and --rdzv_endpoint")
    job.run_id = job.run_id or f"group_{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    return job


def _meet_others(job: Job, options: argparse.Namespace) -> None:
    """Fill in how the machines find each other."""
    host, _, port = options.rdzv_endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--rdzv_endpoint={options.rdzv_endpoint}: give HOST:PORT, such as node-1:29500")
    if options.node_rank is not None and not 0 <= options.node_rank < job.max_nodes:
        raise ValueError(f"--node_rank={options.node_rank}: of {job.max_nodes} machines; count from 0")
    if options.rdzv_timeout < 1:
        raise ValueError(f"--rdzv_timeout={options.rdzv_timeout}: at least 1 second")
    if options.nnodes is None:
        raise ValueError(f"--rdzv_endpoint={options.rdzv_endpoint}: give --nnodes too, the number of machines")
    job.endpoint, job.node_rank, job.rdzv_timeout = options.rdzv_endpoint, options.node_rank, options.rdzv_timeout
    job.run_id = job.run_id or re.sub(r"[^\w.-]", "_", job.endpoint)
    job.local_address = _own_address(host.strip("[]"), int(port))


def _own_address(host: str, port: int) -> str:
    """The address from which this machine reaches a host, and so the one under which it is reached from there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: only the route is chosen
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"--rdzv_endpoint={host}:{port}: this machine knows no way to the host ({error})") from error
    # the host's own name may mean 127.0.1.1 there; the others know it by that name
    return host if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and those of the script, each in their order and unchanged.

    argparse would do, but it takes values of flags that it does not know for arguments of its own.
    """
    own, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if word == "--":
            return own, rest + words
        if name in FLAGS:
            own += [word] if equals else [word, *words[:1]]
            words = words if equals else words[1:]
        elif word in ("-h", "--help") and not rest and not any(w.startswith("--script") for w in own):
            own.append(word)
        else:
            rest.append(word)
    return own, rest


def plan(gpus: str | None, nproc: int | None, device: str) -> tuple[int, dict[str, str]]:
    """How many ranks to start, and what to put into their environment.

    Raises:
        ValueError: a GPU that is not there, or arguments that contradict each other.
    """
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc={nproc}: at least 1 is needed")
    if gpus is not None and nproc is not None:
        raise ValueError(f"--gpus={gpus} with --nproc={nproc}: give one of them")
    if device == "cpu":
        if gpus is not None or nproc is None:
            raise ValueError("--device=cpu: give the number of ranks with --nproc, and no --gpus")
        return nproc, {"TRAINER_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    chosen = _choose_gpus(gpus or "all")
    if nproc is not None and nproc > len(chosen):
        raise ValueError(f"--nproc={nproc}: there are only {len(chosen)} GPUs; add --device cpu for CPU ranks")
    chosen = chosen[:nproc]
    return len(chosen), {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def _choose_gpus(wanted: str) -> list[str]:
    """The names, for CUDA_VISIBLE_DEVICES, of GPUs that are given by their indices among those that are visible."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        raise ValueError(f"there is no GPU{hidden}; for two ranks on the CPU: --nproc 2 --device cpu")
    names = [name.strip() for name in visible.split(",")][:count] if visible else [str(i) for i in range(count)]
    if wanted == "all":
        return names
    indices = [index.strip() for index in wanted.split(",")]
    known = {str(i): name for i, name in enumerate(names)}
    for index in indices:
        if index not in known:
            among = f" of CUDA_VISIBLE_DEVICES={visible}" if visible else ""
            raise ValueError(f"--gpus={wanted}: there is no GPU {index!r}{among}; there are {', '.join(known)}")
        if indices.count(index) > 1:
            raise ValueError(f"--gpus={wanted}: GPU {index} is given twice")
    return [known[index] for index in indices]


if __name__ == "__main__":
    sys.exit(main())

"""Start a training script on several GPUs of this machine, or on CPU ranks.

    python -m trainer.distribute --gpus 0,1 --script recipes/ljspeech/train_vits.py --coqpit.batch_size=16
    python -m trainer.distribute recipes/ljspeech/train_vits.py --nproc 2 --device cpu --small

A front to torch's elastic launcher. The four flags below may stand anywhere before a ``--``; everything else is handed
to the script as it is. When a rank fails, the others are stopped, its traceback is shown last, and the exit code is
not 0. Ctrl-C and SIGTERM are passed on to the ranks, which save and exit.
"""

import argparse
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# a rank that was told to stop saves first, which takes time; a second Ctrl-C does not wait for it
_SECONDS_TO_SAVE = "300"


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
    if options.script is None:
        parser.error("no script: give it with --script, or as the first argument")
    if not Path(options.script).is_file():
        parser.error(f"--script={options.script}: there is no such file (from {Path.cwd()})")
    try:
        nproc, environment = plan(options.gpus, options.nproc, options.device)
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(environment)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    return launch([options.script, *rest], nproc)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.distribute",
        usage="%(prog)s [--gpus 0,1 | --nproc N --device cpu] --script SCRIPT [arguments of the script]",
        description="Start a training script on several GPUs of this machine, or on CPU ranks.",
        epilog="All other arguments are handed to the script; after -- these four as well.",
        allow_abbrev=False,
    )
    parser.add_argument("--script", help="the training script; or the first argument")
    parser.add_argument("--gpus", help="GPUs to use: 0,1 or all (default); of CUDA_VISIBLE_DEVICES, if that is set")
    parser.add_argument("--nproc", type=int, help="number of ranks; on GPUs the first N are used")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the ranks train on")
    return parser


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
        if name in ("--script", "--gpus", "--nproc", "--device"):
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


def launch(command: list[str], nproc: int) -> int:
    """Run a script and its arguments once for each rank, with this interpreter; returns the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=f"group_{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",  # the host's own name may lead nowhere
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        # the launcher fills in templates such as ${local_rank}, and makes $ of $$
        words = [word.replace("$", "$$") for word in ["-u", *command]]
        try:
            elastic_launch(config, sys.executable)(*words)
        except ChildFailedError as error:
            return _report(error.failures)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def _report(failures: dict[int, Any]) -> int:
    """Show why the rank that failed first did so; returns the exit code."""

    def when(entry: tuple[int, Any]) -> tuple[float, bool, int]:
        # a rank writes its error file before it ends, and only then do the others notice; SIGTERM came from here
        rank, failure = entry
        path = Path(failure.error_file)
        return path.stat().st_mtime_ns if path.is_file() else float("inf"), failure.exitcode == -15, rank

    rank, failure = min(failures.items(), key=when)
    message = failure.message
    if isinstance(message, dict):
        message = message["extraInfo"]["py_callstack"]
    elif failure.exitcode > 0:
        message = "it said why above"
    print(f"\nrank {rank} failed (exit code {failure.exitcode}):\n{message}", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())

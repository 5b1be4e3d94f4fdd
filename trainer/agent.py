"""The process that starts the ranks of this machine and watches over them, on torch's elastic agent.

Ranks that are told to stop by the user get minutes to save. When one has failed, the others get seconds, and so does a
rank that hangs. What a killed rank leaves behind (DataLoader workers) is killed as well.
"""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainer.signals import ECHO, STOPPING

if TYPE_CHECKING:
    from trainer.distribute import Job

_TO_SAVE = 300  # seconds, after Ctrl-C, SIGTERM or SIGUSR1; a second one does not wait
_TO_JOIN = 30  # seconds, when the machines gather anew: the ranks save if they can still reach each other
_TO_STOP = 5  # seconds, after a failure
_LAST_LINES = 20
_ONE_AT_A_TIME = threading.Lock()  # a long line is written in pieces, and both streams may be one terminal


class RankLogs(LogsSpecs):
    """Files for each attempt and rank, ``attempt_0/rank_1.out`` and ``.err``, shown on the console as they grow."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder, self.attempts = folder, 0

    @property
    def root_log_dir(self) -> str:
        """The folder of all attempts."""
        return str(self.folder)

    @property
    def newest(self) -> Path:
        """The folder of the attempt under way."""
        return self.folder / f"attempt_{self.attempts - 1}"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of one attempt, by local rank; tells each rank where to leave what ends it."""
        self.attempts += 1
        self.newest.mkdir(parents=True)
        names = {local: str(self.newest / f"rank_{variables['RANK']}") for local, variables in envs.items()}
        out, err, errors = ({local: name + end for local, name in names.items()} for end in (".out", ".err", ".json"))
        for local, path in errors.items():
            envs[local]["TORCHELASTIC_ERROR_FILE"] = path
        return LogsDest(stdouts=out, stderrs=err, tee_stdouts=out, tee_stderrs=err, error_files=errors)


class Agent(LocalElasticAgent):
    """Torch's agent with other ends.

    Attributes:
        ended_first: local ranks that had failed when the others were stopped.
    """

    def __init__(self, spec: WorkerSpec, logs: RankLogs) -> None:
        super().__init__(spec, logs, log_line_prefix_template="[rank ${rank}] ")
        self.ended_first: set[int] = set()
        self._heard: tuple[int, float] | None = None  # the first signal, and when
        self.logs, self.consoles = logs, (WholeLines(sys.stdout), WholeLines(sys.stderr))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # torch shows what the ranks print on what it finds there
        with contextlib.redirect_stdout(self.consoles[0]), contextlib.redirect_stderr(self.consoles[1]):
            started = super()._start_workers(worker_group)
        for name in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"].split(","):
            signal.signal(signal.Signals[name], self._hear)  # torch's has been set in between, and hears echoes
        ranks, size = [worker.global_rank for worker in worker_group.workers], worker_group.workers[0].world_size
        numbers = ", ".join(map(str, ranks))
        say(f"started {len(ranks)} of {size} ranks ({numbers}); what they print is kept in {self.logs.newest}")
        return started

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Raise what torch's handler raises, but once for a signal that comes twice (see trainer/signals.py)."""
        now = time.monotonic()
        if self._heard is None:
            self._heard = number, now
        elif number == self._heard[0] and now - self._heard[1] <= ECHO:
            return
        raise SignalException(f"{signal.Signals(number).name} came", sigval=signal.Signals(number))

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:
        # looked at here first: torch would give the others 30 s
        codes = {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}
        self.ended_first = {rank for rank, code in codes.items() if code}
        if self.ended_first:
            self._shutdown()
        elif worker_group.group_world_size > 1:
            self._raise_if_closed()
        result = super()._monitor_workers(worker_group)
        if not self.ended_first:  # failed in between: torch has stopped the others
            self.ended_first = {failure.local_rank for failure in result.failures.values()}
        return result

    def _raise_if_closed(self) -> None:
        """Another machine has given up: its ranks are gone, and those here may wait for them for long."""
        if self._rdzv_handler.is_closed():
            raise RendezvousClosedError

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY:
            say("the machines gather anew: all ranks save, stop and start again")
            self._stop(signal.SIGTERM, _TO_JOIN)
        else:
            limit = worker_group.spec.max_restarts
            ranks = ", ".join(str(worker_group.workers[local].global_rank) for local in sorted(self.ended_first))
            say(f"rank {ranks} failed; restart {limit - self._remaining_restarts} of {limit}")
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals | None = None, **_: Any) -> None:
        """Stop the ranks; torch hands over a signal only when it came from outside, and its own patience always."""
        if death_sig is None:
            with _signals_held_back():
                self._stop(signal.SIGTERM, _TO_STOP)
        else:
            say(f"{death_sig.name}: the ranks have {_TO_SAVE} s to save; a second signal does not wait for them")
            # nobody handles SIGHUP, which comes when the terminal is closed, and SIGQUIT
            unknown = death_sig in (signal.SIGHUP, signal.SIGQUIT)
            self._stop(signal.SIGTERM if unknown else death_sig, _TO_SAVE)

    def _stop(self, number: signal.Signals, seconds: int) -> None:
        """Send a signal, and SIGKILL after a time; nothing is left of a rank that did not end with 0."""
        if self._pcontext is None:
            return
        processes = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
        for process in processes:
            # torch would signal its DataLoader workers too, without which it could not go on to its checkpoint
            process.send_signal(number)
        end = time.monotonic() + seconds
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self._pcontext.close(signal.SIGKILL, _TO_STOP)
        for process in processes:
            if process.poll() != 0:
                # its process group has its number; there may be nothing left of it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _exit_barrier(self) -> None:
        """Wait for the other machines, as long as they take: the one that hosts the rendezvous is needed to the end."""
        machines = self._worker_group.group_world_size
        if machines == 1:
            return
        self._store.add("done", 1)
        while self._store.add("done", 0) < machines:
            self._raise_if_closed()
            time.sleep(0.2)
        time.sleep(2)  # until the others have seen it too


class WholeLines:
    """A console on which the lines of several ranks do not mix: what does not end a line waits for the rest of it.

    Args:
        stream: where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun = stream, {}

    def write(self, text: str) -> None:
        """Show what torch has read of a rank's output, behind its rank; a part of a line is kept."""
        rank, _, part = text.partition("] ")
        line = self._begun.pop(rank, "") + part
        if line.endswith("\n"):
            with _ONE_AT_A_TIME:
                self._stream.write(f"{rank}] {line}")
        else:
            self._begun[rank] = line

    def finish(self) -> None:
        """Show last lines that have no end."""
        for rank, line in self._begun.items():
            self._stream.write(f"{rank}] {line}\n")


def say(text: str) -> None:
    """A line of the launcher's own on the console."""
    with _ONE_AT_A_TIME:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Signals come after the block: nobody is left behind by an impatient Ctrl-C while ranks are being killed."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = {number: signal.signal(number, hold) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


def launch(command: list[str], job: "Job") -> int:
    """Run a script and its arguments once for each rank of this machine, with this interpreter.

    Returns:
        The exit code: 0, that of the rank that failed first (128 and the signal's number if a signal killed it), 1 when
        the machines did not find each other, or 128 and the number of the signal that came.
    """
    _prepare_streams()
    # a folder of its own in log_dir too: two launches may share that
    folder = Path(tempfile.mkdtemp(prefix=f"{job.run_id}-", dir=job.log_dir))
    os.environ.setdefault("TRAINER_RESTART_FILE", str(folder / "runs.txt"))  # docs/train.sbatch names one
    # what a nohup has asked for stays; torch would handle SIGHUP all the same
    kept = [number.name for number in (*STOPPING, signal.SIGQUIT)]
    kept += ["SIGHUP"] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(kept)
    if job.may_restart:
        # with the launcher's own store, which outlives an attempt, gloo would read the keys of the last one and hang
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logs = RankLogs(folder)
    try:
        if job.endpoint is not None:
            machines = "-".join(str(n) for n in sorted({job.min_nodes, job.max_nodes}))
            say(f"waiting for {machines} machines at {job.endpoint}, {job.rdzv_timeout} s at most")
        rendezvous = _join(job)
        return _run(command, job, rendezvous, logs)
    except (SignalException, KeyboardInterrupt) as error:
        return 128 + getattr(error, "sigval", signal.SIGINT)
    except (RendezvousError, DistError) as error:
        say(f"\n{_why_apart(error, job)}\nlogs: {folder}")
        return 1


def _prepare_streams() -> None:
    """Show lines of the ranks when they come, into a pipe too; leave out what the report says better."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    if "LOGLEVEL" not in os.environ:
        noisy = ("multiprocessing.api", "multiprocessing.tail_log", "agent.server.api", "rendezvous.dynamic_rendezvous")
        for name in noisy:
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)


def _join(job: "Job") -> RendezvousHandler:
    """Host the store at which the machines meet, or connect to it."""
    options: dict[str, Any] = {"join_timeout": job.rdzv_timeout, "read_timeout": job.rdzv_timeout}
    if job.endpoint is None:
        options["is_host"] = True
    elif job.node_rank is not None:
        options["is_host"] = job.node_rank == 0
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=job.endpoint or "localhost:0",  # a free port
        run_id=job.run_id,
        min_nodes=job.min_nodes,
        max_nodes=job.max_nodes,
        local_addr=job.local_address,
        **options,
    )
    found: list[RendezvousHandler | RendezvousError] = []

    def connect() -> None:
        try:
            found.append(get_rendezvous_handler(parameters))
        except RendezvousError as error:
            found.append(error)

    # in a thread: torch waits without end for something else that listens there, and does not hear Ctrl-C
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(job.rdzv_timeout + _TO_STOP)
    if not found:
        raise RendezvousConnectionError(
            f"no answer within {job.rdzv_timeout} s; nothing listens there, or something else"
        )
    if isinstance(found[0], RendezvousError):
        raise found[0]
    return found[0]


def _run(command: list[str], job: "Job", rendezvous: RendezvousHandler, logs: RankLogs) -> int:
    # the agent fills in templates such as ${local_rank}, and makes $ of $$
    words = [word.replace("$", "$$") for word in ["-u", *command]]
    spec = WorkerSpec(
        role="trainer",
        local_world_size=job.nproc,
        entrypoint=sys.executable,
        args=tuple(words),
        rdzv_handler=rendezvous,
        max_restarts=job.max_restarts,
        local_addr=job.local_address,
    )
    agent = Agent(spec, logs)
    try:
        result = agent.run()
    except SignalException:
        raise  # left open: this machine may come back
    except BaseException:
        rendezvous.shutdown()
        raise
    finally:
        for console in agent.consoles:
            console.finish()
    rendezvous.shutdown()  # the other machines hear that this one has ended
    if not result.is_failed():
        return 0
    first = {rank: f for rank, f in result.failures.items() if f.local_rank in agent.ended_first}
    return report(first, logs.newest)


def _why_apart(error: RendezvousError | DistError, job: "Job") -> str:
    """What went wrong between the machines, and what to do."""
    if isinstance(error, RendezvousClosedError):
        return "another machine has stopped its ranks; it says why, in its own logs"
    at = f"--rdzv_endpoint={job.endpoint}"
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"{at}: fewer than {job.min_nodes} machines came within {job.rdzv_timeout} s; start the same command on "
            f"each, with the same --nnodes and --rdzv_id={job.run_id}, and see that they reach this address"
        )
    cause = str(error.__cause__ or error).splitlines()[0]
    if isinstance(error, RendezvousConnectionError) and "EADDRINUSE" in cause:
        return f"{at}: the port is taken on this machine, by an earlier launch perhaps; take another on all machines"
    return f"{at}: cannot be reached, or is lost: does the machine of that name still run its launcher? ({cause})"


def report(failures: dict[int, ProcessFailure], folder: Path) -> int:
    """Show why the rank that failed first did so.

    Args:
        failures: by rank, of the ranks that failed before the others were stopped.
        folder: where the files of all ranks are.

    Returns:
        The exit code of that rank; 128 and the signal's number if a signal killed it.
    """

    def when(entry: tuple[int, ProcessFailure]) -> tuple[bool, float, int]:
        # a kill is no consequence of what other ranks do; SIGABRT is: NCCL ends waiting ranks by it, and SIGTERM comes
        # from here. A rank writes its error file before it ends, and only then do the others notice.
        rank, failure = entry
        was_killed = failure.exitcode < 0 and -failure.exitcode not in (signal.SIGABRT, signal.SIGTERM)
        path = Path(failure.error_file)
        return not was_killed, path.stat().st_mtime_ns if path.is_file() else float("inf"), rank

    rank, failure = min(failures.items(), key=when)
    how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else f"killed by {failure.signal_name()}"
    if failure.exitcode == -signal.SIGKILL:
        how += "; was the memory short?"
    if isinstance(failure.message, dict):
        found = failure.message["extraInfo"]["py_callstack"]
    else:
        printed = (folder / f"rank_{rank}.err").read_text(errors="replace").splitlines()
        found = "\n".join(printed[-_LAST_LINES:])
    say(f"\nlogs of all ranks: {folder}\nrank {rank} failed ({how})" + (f":\n{found.rstrip()}" if found else ""))
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode

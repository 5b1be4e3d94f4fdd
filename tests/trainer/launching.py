"""Starting the launcher, for its tests: scripts as their users start them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU = ("--nproc", "2", "--device", "cpu")


def start(
    folder: Path,
    script: str,
    *arguments: str,
    module: str = "trainer.distribute",
    through: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen:
    """Start the launcher (through another command), in a session of its own, with ``script.py`` of this text there."""
    (folder / "script.py").write_text(script)
    unset = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    # one thread, as the launcher would take on one core; what it prints is kept below the test's folder
    variables.update({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), **environment})
    return subprocess.Popen(
        [*through, sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str, str]:
    """The launcher's exit code, stdout and stderr; it is stopped when it takes too long."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it stops its ranks
        process.communicate(timeout=20)
        raise
    return process.returncode, output, errors


def wait_for(*paths: Path, seconds: float = 60) -> None:
    """Wait until files are there."""
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{paths} are not there"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether there is a process of this number that is not dead."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1] not in ("", "Z")

"""What a run records of where it comes from: its folder's name, of time and commit; the programs of its Python."""

import datetime
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def as_a_shell_calls(program: str) -> str:
    """``python`` or a program of its environment, for a command to print: with its path unless a shell finds it."""
    own = Path(sys.executable) if program == "python" else Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if (found is not None and Path(found).absolute() == own) or not own.is_file():
        return program
    return shlex.quote(str(own))


def git_commit(folder: Path) -> str:
    """Short commit of the repository that ``folder`` lies in, or ``nocommit`` outside of one."""
    command = ["git", "-C", str(folder), "rev-parse", "--short=8", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "nocommit"
    return result.stdout.strip() if result.returncode == 0 else "nocommit"


def new_run_folder(output_path: str, run_name: str) -> Path:
    """Create ``<output_path>/<run_name>-<time>-<commit>``; two runs that start together get two folders.

    Raises:
        ValueError: the output path is not a local folder.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", output_path):  # a Path makes s3:/bucket of s3://bucket
        raise ValueError(f"output_path={output_path!r}: only local folders can be written to")
    script = Path(sys.argv[0])
    commit = git_commit(script.resolve().parent if script.is_file() else Path.cwd())
    name = f"{run_name}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{commit}"
    for attempt in range(1000):
        folder = Path(output_path) / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise RuntimeError(f"{output_path}: a thousand runs named {name} are there already")

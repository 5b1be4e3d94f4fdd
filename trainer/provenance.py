"""What a run records of where it comes from. Here: its folder, named after the time and the code's commit."""

import datetime
import re
import subprocess
import sys
from pathlib import Path


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

"""After a restart by the launcher, each Trainer of a script goes on in the folder that it had before.

The launcher, or docs/train.sbatch, names a file. The n-th run that a process opens writes a line with its number and
folder, or finds it there; several machines may share the file, and write the same line.
"""

import os
from pathlib import Path

_VARIABLE = "TRAINER_RESTART_FILE"
_file: Path | None = None
_runs_opened = 0


def earlier_folder() -> Path | None:
    """The folder that the run which this process opens next had before a restart; None at the first attempt."""
    folder = _folders().get(str(_runs_opened))
    return None if folder is None else Path(folder)


def remember(folder: Path, writes: bool) -> None:
    """This process has opened a run.

    Args:
        folder: the run's.
        writes: whether this process is the one of its machine that writes it down.
    """
    global _runs_opened
    if writes and str(_runs_opened) not in _folders() and _file is not None:
        with _file.open("a", encoding="utf8") as file:
            file.write(f"{_runs_opened} {folder.resolve()}\n")
    _runs_opened += 1


def _folders() -> dict[str, str]:
    global _file
    # taken out of the environment: processes that this one starts have runs of their own
    if (name := os.environ.pop(_VARIABLE, None)) is not None:
        _file = Path(name)
    lines = _file.read_text(encoding="utf8").splitlines() if _file is not None and _file.is_file() else []
    return dict(line.split(" ", 1) for line in lines)

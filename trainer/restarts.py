"""After a restart by the launcher, each Trainer of a script goes on in the folder that it had before.

The launcher names a file. The n-th run that a process opens writes its folder into the n-th line, or finds it there.
"""

import os
from pathlib import Path

_VARIABLE = "TRAINER_RESTART_FILE"
_file: Path | None = None
_runs_opened = 0


def earlier_folder() -> Path | None:
    """The folder that the run which this process opens next had before a restart; None at the first attempt."""
    lines = _lines()
    return Path(lines[_runs_opened]) if _runs_opened < len(lines) else None


def remember(folder: Path, writes: bool) -> None:
    """This process has opened a run.

    Args:
        folder: the run's.
        writes: whether this process is the one of its machine that writes it down.
    """
    global _runs_opened
    if writes and _runs_opened == len(_lines()) and _file is not None:
        with _file.open("a", encoding="utf8") as file:
            file.write(f"{folder.resolve()}\n")
    _runs_opened += 1


def _lines() -> list[str]:
    global _file
    # taken out of the environment: processes that this one starts have runs of their own
    if (name := os.environ.pop(_VARIABLE, None)) is not None:
        _file = Path(name)
    return _file.read_text(encoding="utf8").splitlines() if _file is not None and _file.is_file() else []

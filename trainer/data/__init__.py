"""The shared loading API: audio files, texts, datasets, and batches in an order that a resumed run can take up."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME` or `~/.cache`, then `onefile-trainer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onefile-trainer"

"""A lightweight PyTorch trainer: every model in one file, every run repeatable.

The public names are imported when they are first used, so that ``import trainer`` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

from trainer import coqui_modules

if TYPE_CHECKING:
    from trainer.checked_config import ConfigError, field
    from trainer.command_line import parse_command_line
    from trainer.config import TrainerArgs, TrainerConfig
    from trainer.model import TrainerModel
    from trainer.seeding import seed_everything
    from trainer.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "trainer.checked_config",
    "Trainer": "trainer.trainer",
    "TrainerArgs": "trainer.config",
    "TrainerConfig": "trainer.config",
    "TrainerModel": "trainer.model",
    "field": "trainer.checked_config",
    "parse_command_line": "trainer.command_line",
    "seed_everything": "trainer.seeding",
}

__all__ = [
    "ConfigError",
    "Trainer",
    "TrainerArgs",
    "TrainerConfig",
    "TrainerModel",
    "field",
    "parse_command_line",
    "seed_everything",
]


coqui_modules.install()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

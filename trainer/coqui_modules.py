"""Coqui's module names: ``from trainer.trainer_utils import get_optimizer`` finds what it asks for.

The names that Coqui's models import lie elsewhere here. A finder makes these modules when they are imported, from the
table below, so that there is no folder of files with one import each.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_NAMES, _BASE = "trainer.coqui_names", "trainer.loggers.base"
# module: {name: (module here, name here)}
MODULES: dict[str, dict[str, tuple[str, str]]] = {
    "trainer.io": {name: (_NAMES, name) for name in ("load_fsspec", "save_fsspec", "get_user_data_dir")},
    "trainer.trainer_utils": {name: (_NAMES, name) for name in ("get_optimizer", "get_scheduler")},
    "trainer.torch": {
        "NoamLR": ("trainer.schedulers", "NoamLR"),
        "StepwiseGradualLR": ("trainer.schedulers", "StepwiseGradualLR"),
        "DistributedSampler": ("torch.utils.data.distributed", "DistributedSampler"),
        "DistributedSamplerWrapper": ("trainer.data.loader", "DistributedSamplerWrapper"),
    },
    "trainer.generic_utils": {
        "count_parameters": (_NAMES, "count_parameters"),
        "set_partial_state_dict": (_NAMES, "set_partial_state_dict"),
        "is_pytorch_at_least_2_3": (_NAMES, "is_pytorch_at_least_2_4"),
        "is_pytorch_at_least_2_4": (_NAMES, "is_pytorch_at_least_2_4"),
    },
    "trainer.logging": {
        "BaseDashboardLogger": (_BASE, "DashboardLogger"),
        "DummyLogger": (_BASE, "DashboardLogger"),
        "ConsoleLogger": ("trainer.loggers.console", "ConsoleLogger"),
        "logger_factory": ("trainer.loggers.tensorboard", "new_dashboard"),
    },
    "trainer.logging.base_dash_logger": {"BaseDashboardLogger": (_BASE, "DashboardLogger")},
    "trainer.logging.console_logger": {"ConsoleLogger": ("trainer.loggers.console", "ConsoleLogger")},
    "trainer.logging.tensorboard_logger": {"TensorboardLogger": ("trainer.loggers.tensorboard", "TensorboardLogger")},
    "trainer.utils": {},
    "trainer.utils.distributed": {
        name: (_NAMES, name)
        for name in ("is_dist_avail_and_initialized", "get_rank", "is_main_process", "rank_zero_only")
    },
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        is_package = any(name.startswith(fullname + ".") for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: types.ModuleType) -> None:
        for name, (home, there) in MODULES[module.__name__].items():
            setattr(module, name, getattr(importlib.import_module(home), there))


def install() -> None:
    """Let Coqui's module names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

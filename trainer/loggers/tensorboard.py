"""TensorBoard event files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.loggers.base import DashboardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.config import TrainerConfig


class TensorboardLogger(DashboardLogger):
    """Writes event files into a run's folder; look at them with ``tensorboard --logdir FOLDER``."""

    def __init__(self, folder: Path) -> None:
        # tensorboard takes half a second to import
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def add_scalar(self, title: str, value: float, step: int) -> None:
        self.writer.add_scalar(title, value, step)

    def add_figure(self, title: str, figure: "Figure", step: int) -> None:
        from trainer.loggers.figures import to_image

        self.writer.add_image(title, to_image(figure), step, dataformats="HWC")

    def add_audio(self, title: str, audio: Any, step: int, sample_rate: int) -> None:
        waveform = torch.as_tensor(audio).detach().float().cpu().reshape(1, -1).clamp(-1, 1)
        self.writer.add_audio(title, waveform, step, sample_rate)

    def add_text(self, title: str, text: str, step: int) -> None:
        self.writer.add_text(title, text, step)

    def flush(self) -> None:
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def new_dashboard(config: "TrainerConfig", folder: Path) -> DashboardLogger:
    """The dashboard that the config names."""
    return TensorboardLogger(folder) if config.dashboard_logger == "tensorboard" else DashboardLogger()

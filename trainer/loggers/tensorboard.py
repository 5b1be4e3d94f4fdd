"""TensorBoard event files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.loggers.base import DashboardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.config import TrainerConfig


class TensorboardLogger(DashboardLogger):
    """Writes event files into a run's folder; look at them with ``tensorboard --logdir FOLDER``.

    Coqui's scripts also give the model's name, which TensorBoard has no place for.
    """

    def __init__(self, folder: str | Path, model_name: str = "") -> None:
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

    def model_weights(self, model: nn.Module, step: int) -> None:
        for name, parameter in model.named_parameters():
            values = parameter.detach().float()
            if values.numel() > 1:
                self.writer.add_histogram(f"ModelWeights/{name}", values, step)
            numbers = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
            self.add_scalars(f"ModelWeights/{name}", {key: float(value) for key, value in numbers.items()}, step)

    def flush(self) -> None:
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def new_dashboard(config: "TrainerConfig", folder: Path) -> DashboardLogger:
    """The dashboard that the config names, writing into ``logger_uri`` or the run's folder."""
    if config.dashboard_logger == "none":
        return DashboardLogger()
    return TensorboardLogger(config.logger_uri or folder)  # no Path: TensorBoard writes to URLs as well

"""TensorBoard event files."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.loggers.base import DashboardLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.config import TrainerConfig

logger = logging.getLogger("trainer")


class TensorboardLogger(DashboardLogger):
    """Writes event files into a run's folder; look at them with ``tensorboard --logdir FOLDER``.

    Coqui's scripts also give the model's name, which TensorBoard has no place for. When nothing can be written, since
    the disk is full say, that ends the dashboard, and not the training.

    Args:
        folder: where to write; a URL will do.
        model_name: not used.
        mark: end of the names of one run's event files in a local folder. When the run goes on from a checkpoint,
            files with this mark are cut or deleted, so it must not be another run's; without it they stay as they are.
    """

    def __init__(self, folder: str | Path, model_name: str = "", mark: str = "") -> None:
        # tensorboard takes half a second to import
        from torch.utils.tensorboard import SummaryWriter

        self._suffix = f".{mark}" if mark else ""
        self._folder = Path(folder) if mark and "://" not in str(folder) else None
        self._earlier = self._files()
        self.writer, self._has_failed = SummaryWriter(str(folder), filename_suffix=self._suffix), False

    def _files(self) -> list[Path]:
        """The run's event files, of all starts; none where they cannot be cut."""
        if self._folder is None or not self._folder.is_dir():
            return []
        paths = sorted(self._folder.glob("events.out.tfevents.*"))
        return [path for path in paths if path.name.endswith(self._suffix)]

    def position(self) -> dict[str, int] | None:
        """The sizes [bytes] of the run's event files, by name; every one ends with a whole record."""
        if self._folder is None:
            return None
        self.flush()
        return {path.name: path.stat().st_size for path in self._files()}

    def rewind(self, position: Mapping[str, int] | None, step: int) -> None:
        if self._folder is None:
            self._hide_after(step)
        elif position is not None:
            if lost := [name for name, size in position.items() if size > self._size(name)]:
                logger.warning(f"{self._folder}: what was logged before is gone, or a part of it: {', '.join(lost)}")
            for path in self._earlier:
                if path.name not in position:  # of a start after the checkpoint
                    path.unlink()
                elif path.stat().st_size > position[path.name]:
                    with path.open("r+b") as file:
                        file.truncate(position[path.name])

    def _write(self, method: Callable[..., object], *args: Any, **options: Any) -> None:
        """Call a method of the writer, as long as it works."""
        if self._has_failed:  # its thread has ended
            return
        try:
            method(*args, **options)
        except OSError as error:
            self._has_failed = True
            logger.warning(
                f"{self.writer.log_dir}: event files could not be written ({error.strerror or error}); the training "
                "goes on, and TensorBoard will not show the rest of this start"
            )

    def _size(self, name: str) -> int:
        path = self._folder / name
        return path.stat().st_size if path.is_file() else 0

    def _hide_after(self, step: int) -> None:
        """Ask readers to drop what has a later step; no file can be cut here."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        event = Event(session_log=SessionLog(status=SessionLog.START))
        self._write(self.writer.file_writer.add_event, event, step + 1)
        logger.warning(
            f"{self.writer.log_dir}: its event files are not cut, so that what was logged after step {step} is there "
            "twice; TensorBoard shows what is logged from now on. Files that the Trainer makes in local folders are cut"
        )

    def add_scalar(self, title: str, value: float, step: int) -> None:
        self._write(self.writer.add_scalar, title, value, step)

    def add_figure(self, title: str, figure: "Figure", step: int) -> None:
        from trainer.loggers.figures import to_image

        self._write(self.writer.add_image, title, to_image(figure), step, dataformats="HWC")

    def add_audio(self, title: str, audio: Any, step: int, sample_rate: int) -> None:
        waveform = torch.as_tensor(audio).detach().float().cpu().reshape(1, -1).clamp(-1, 1)
        self._write(self.writer.add_audio, title, waveform, step, sample_rate)

    def add_text(self, title: str, text: str, step: int) -> None:
        self._write(self.writer.add_text, title, text, step)

    def model_weights(self, model: nn.Module, step: int) -> None:
        for name, parameter in model.named_parameters():
            values = parameter.detach().float()
            if values.numel() > 1:
                self._write(self.writer.add_histogram, f"ModelWeights/{name}", values, step)
            numbers = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
            self.add_scalars(f"ModelWeights/{name}", {key: float(value) for key, value in numbers.items()}, step)

    def flush(self) -> None:
        self._write(self.writer.flush)

    def finish(self) -> None:
        self._write(self.writer.close)


def new_dashboard(config: "TrainerConfig", folder: Path, run: str = "") -> DashboardLogger:
    """The dashboard that the config names.

    Args:
        config: its ``logger_uri`` is where the dashboard writes, if it names one.
        folder: where it writes otherwise.
        run: name of the run whose own ``folder`` is; without it, event files are not cut when a run goes on.
    """
    if config.dashboard_logger == "none":
        return DashboardLogger()
    if not config.logger_uri:
        return TensorboardLogger(folder, mark="trainer" if run else "")
    # no Path: TensorBoard writes to URLs as well; and other runs may write there
    return TensorboardLogger(config.logger_uri, mark=f"trainer-{run}" if run else "")

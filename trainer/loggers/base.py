"""The interface of a dashboard, with Coqui Trainer's method names."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from trainer.config import TrainerConfig


def config_text(config: "TrainerConfig") -> str:
    """A config as a dashboard shows it (markdown)."""
    return f"```json\n{config.to_json()}\n```"


class DashboardLogger:
    """Writes what a training shows. This one writes nothing; a dashboard overrides the ``add_`` methods.

    Scalars, figures and audio are grouped by where they come from: ``TrainIterStats/loss``, ``EvalAudios/sample``.
    Audio is a float array [S] in [-1, 1].

    A run that goes on from a checkpoint logs again, bit for bit, what was logged after it. ``position`` and ``rewind``
    keep that from being there twice; a dashboard where a step that is written again takes the place of the first one
    needs neither.
    """

    def add_scalar(self, title: str, value: float, step: int) -> None:
        """Write one number."""

    def add_figure(self, title: str, figure: "Figure", step: int) -> None:
        """Write a matplotlib figure."""

    def add_audio(self, title: str, audio: Any, step: int, sample_rate: int) -> None:
        """Write a waveform [S]; ``sample_rate`` in Hz."""

    def add_text(self, title: str, text: str, step: int) -> None:
        """Write a text (markdown)."""

    def add_artifact(
        self, file_or_dir: str | os.PathLike, name: str, artifact_type: str, aliases: list[str] | None = None
    ) -> None:
        """Keep a file, such as a checkpoint, with the run; a dashboard that holds no files ignores it."""

    def model_weights(self, model: "nn.Module", step: int) -> None:
        """Write statistics of all parameters."""

    def flush(self) -> None:
        """Bring everything to where it can be read."""

    def finish(self) -> None:
        """Flush and close."""

    def position(self) -> Any:
        """What a checkpoint keeps of this dashboard, as plain values: how far it was written, after a flush.

        It is called at every save, on rank 0, while the training waits. None: there is nothing to keep.
        """

    def rewind(self, position: Any, step: int) -> None:
        """Drop what was logged after a checkpoint, from which this start of the run goes on.

        Called at most once, when this start has logged nothing, or only what ``on_init_start`` does, which stays.

        Args:
            position: what ``position()`` returned for the checkpoint; None if it did, or if another dashboard was used.
            step: updates that the checkpoint holds. What was logged at this very step is in part older than it.
        """

    def add_config(self, config: "TrainerConfig") -> None:
        """Write the config, and what the run is for; called by a run's first start."""
        self.add_text("config", config_text(config), 0)
        if config.run_description:
            self.add_text("run_description", config.run_description, 0)

    def add_scalars(self, scope: str, values: Mapping[str, float], step: int) -> None:
        """Write numbers under ``scope/``."""
        for name, value in values.items():
            self.add_scalar(f"{scope}/{name}", value, step)

    def add_figures(self, scope: str, figures: Mapping[str, "Figure"], step: int) -> None:
        """Write figures under ``scope/``."""
        for name, figure in figures.items():
            self.add_figure(f"{scope}/{name}", figure, step)

    def add_audios(self, scope: str, audios: Mapping[str, Any], step: int, sample_rate: int) -> None:
        """Write waveforms under ``scope/``."""
        for name, audio in audios.items():
            self.add_audio(f"{scope}/{name}", audio, step, sample_rate)

    def train_step_stats(self, step: int, stats: Mapping[str, float]) -> None:
        """Numbers of one update."""
        self.add_scalars("TrainIterStats", stats, step)

    def train_epoch_stats(self, step: int, stats: Mapping[str, float]) -> None:
        """Means over a training epoch."""
        self.add_scalars("TrainEpochStats", stats, step)

    def train_figures(self, step: int, figures: Mapping[str, "Figure"]) -> None:
        """Figures of a training batch."""
        self.add_figures("TrainFigures", figures, step)

    def train_audios(self, step: int, audios: Mapping[str, Any], sample_rate: int) -> None:
        """Waveforms of a training batch."""
        self.add_audios("TrainAudios", audios, step, sample_rate)

    def eval_stats(self, step: int, stats: Mapping[str, float]) -> None:
        """Means over an evaluation."""
        self.add_scalars("EvalStats", stats, step)

    def eval_figures(self, step: int, figures: Mapping[str, "Figure"]) -> None:
        """Figures of an evaluation batch."""
        self.add_figures("EvalFigures", figures, step)

    def eval_audios(self, step: int, audios: Mapping[str, Any], sample_rate: int) -> None:
        """Waveforms of an evaluation batch."""
        self.add_audios("EvalAudios", audios, step, sample_rate)

    def test_figures(self, step: int, figures: Mapping[str, "Figure"]) -> None:
        """Figures of a test run."""
        self.add_figures("TestFigures", figures, step)

    def test_audios(self, step: int, audios: Mapping[str, Any], sample_rate: int) -> None:
        """Waveforms of a test run."""
        self.add_audios("TestAudios", audios, step, sample_rate)

"""The figures that models show. Built on matplotlib's Figure alone: pyplot keeps global state and figures alive."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_matrix(values_XY: Any, title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (6, 5)) -> "Figure":
    """A matrix [X, Y] in colours, its first row at the left and its first column at the bottom."""
    from matplotlib.figure import Figure

    values_XY = torch.as_tensor(values_XY).detach().float().cpu().numpy()
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values_XY.T, aspect="auto", origin="lower", interpolation="none")
    figure.colorbar(image, ax=axes)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


def plot_spectrogram(spectrogram_CF: Any, title: str = "") -> "Figure":
    """A (mel) spectrogram [C, F], low frequencies at the bottom."""
    return plot_matrix(torch.as_tensor(spectrogram_CF).T, title, "frame", "channel", (8, 4))


def plot_alignment(alignment_FT: Any, title: str = "") -> "Figure":
    """An alignment [F, T]: which token every frame speaks."""
    return plot_matrix(alignment_FT, title, "frame", "token")


def to_image(figure: "Figure") -> np.ndarray:
    """A drawn figure as uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]

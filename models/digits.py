"""Digits: a small convolutional classifier, and the file to copy when you begin a model.

Everything that a model needs is here, top to bottom: config, layers, model, data. Copy it, rename it, change it.

    python recipes/digits/train_digits.py

Shapes: B batch, C channels, H height, W width, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from trainer import TrainerConfig, TrainerModel, field
from trainer.data.loader import build_loader
from trainer.loggers.figures import plot_matrix


@dataclass
class DigitsConfig(TrainerConfig):
    """What can be set; ``--coqpit.channels=32`` on the command line."""

    channels: int = field(16, "Channels of the first block; the second has twice as many.", min=1)
    num_classes: int = field(10, "Classes to tell apart.", min=2)
    dropout: float = field(0.1, "Share of the features dropped in training.", min=0, max=1)
    run_name: str = "digits"
    epochs: int = 15
    batch_size: int = 64
    eval_batch_size: int = 256
    optimizer: str = "AdamW"
    lr: float = 3e-3


class ConvBlock(nn.Module):
    """Convolution, normalisation, ReLU, and a pooling that halves height and width.

    Maps [B, C_in, H, W] to [B, C_out, H // 2, W // 2].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(1, out_channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x_BCHW))), kernel_size=2)


class Digits(TrainerModel):
    """Classifies 8x8 grey images [B, 1, 8, 8] with values in [0, 1]."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.blocks = nn.Sequential(ConvBlock(1, c), ConvBlock(c, 2 * c))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(2 * c * 2 * 2, config.num_classes)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of the classes."""
        return self.head(self.dropout(self.blocks(image_BCHW).flatten(1)))

    def train_step(self, batch: dict, criterion: nn.Module) -> tuple[dict, dict]:
        logits_BK = self(batch["image"])
        accuracy = (logits_BK.argmax(1) == batch["label"]).float().mean()
        return {"logits": logits_BK}, {"loss": criterion(logits_BK, batch["label"]), "accuracy": accuracy}

    def eval_step(self, batch: dict, criterion: nn.Module) -> tuple[dict, dict]:
        return self.train_step(batch, criterion)

    @torch.inference_mode()
    def inference(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """The most likely class [B] and the probabilities [B, K] of all."""
        probabilities_BK = self(image_BCHW).softmax(1)
        return {"label": probabilities_BK.argmax(1), "probabilities": probabilities_BK}

    def eval_log(self, batch: dict, outputs: dict, logger, steps: int) -> None:
        guess_BK = F.one_hot(outputs["logits"].argmax(1), self.config.num_classes).float()
        label_BK = F.one_hot(batch["label"], self.config.num_classes).float()
        confusion = plot_matrix(label_BK.T @ guess_BK, "samples", "label", "guess")
        logger.eval_figures(steps, {"confusion": confusion})

    def get_scheduler(self, optimizer: list):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer[0], T_max=self.config.epochs)

    def get_criterion(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    def get_data_loader(self, config: DigitsConfig, is_eval: bool, samples: list, verbose: bool):
        """A loader of ``samples``: pairs of an image [8, 8] with values from 0 to 16 and its label."""
        return build_loader(
            samples,
            config.eval_batch_size if is_eval else config.batch_size,
            collate_fn=collate,
            seed=config.training_seed,
            shuffle=not is_eval,
            num_workers=config.num_loader_workers,
        )


def collate(samples: list) -> dict[str, torch.Tensor]:
    """Pairs of image and label to a batch."""
    image_BHW = torch.stack([torch.as_tensor(image, dtype=torch.float32) for image, _ in samples])
    return {"image": image_BHW.unsqueeze(1) / 16, "label": torch.tensor([int(label) for _, label in samples])}

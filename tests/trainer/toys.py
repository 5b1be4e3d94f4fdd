"""Tiny models and a helper to train them, for the tests of the loop."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel, field, seed_everything
from trainer.data.loader import build_loader


@dataclass
class ToyConfig(TrainerConfig):
    """Six epochs of a linear regression."""

    features: int = field(3, "Inputs of the linear layer.", min=1)
    epochs: int = 6
    batch_size: int = 4
    eval_batch_size: int = 4
    optimizer: str = "SGD"
    lr: float = 0.1
    device: str = "cpu"
    dashboard_logger: str = "none"
    dropout: float = 0.0


def make_samples(n: int, features: int = 3, seed: int = 0) -> list:
    """(x, y) with y a linear function of x and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    y = x @ torch.arange(1.0, features + 1) + 0.1 * torch.randn(n, generator=generator)
    return list(zip(x, y))


def collate(samples: list) -> dict:
    """Pairs to a batch."""
    return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}


class Toy(TrainerModel):
    """A linear layer with dropout, trained by the mean squared error."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.features, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.seen: list = []

    def train_step(self, batch, criterion):
        if self.training:
            self.seen.append(batch["x"][:, 0].tolist())
        prediction = self.layer(self.dropout(batch["x"])).squeeze(1)
        return {"prediction": prediction}, {"loss": criterion(prediction, batch["y"])}

    def eval_step(self, batch, criterion):
        return self.train_step(batch, criterion)

    def get_criterion(self):
        return nn.MSELoss()

    def get_data_loader(self, config, is_eval, samples, verbose):
        size = config.eval_batch_size if is_eval else config.batch_size
        return build_loader(samples, size, collate_fn=collate, seed=config.training_seed, shuffle=not is_eval)


class ToyGan(TrainerModel):
    """Two optimizers: a discriminator, and a generator whose outputs of the first pass are used again in the second."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = nn.Linear(config.features, 1)
        self.disc = nn.Linear(1, 1)
        self.forwards = 0

    def train_step(self, batch, criterion, optimizer_idx):
        if optimizer_idx == 0:
            assert not self.training or "fake" not in batch, "a step was handed the dict of an earlier one"
            self.forwards += 1
            batch["fake"] = self.generator(batch["x"])
            real, fake = self.disc(batch["y"].unsqueeze(1)), self.disc(batch["fake"].detach())
            return {"fake": fake}, {"loss": ((1 - real) ** 2).mean() + (fake**2).mean(), "real": real.mean()}
        score = self.disc(batch["fake"])
        return {"score": score}, {"loss": ((1 - score) ** 2).mean(), "score": score.mean()}

    def eval_step(self, batch, criterion, optimizer_idx):
        with torch.no_grad():
            batch["fake"] = self.generator(batch["x"])
            return self.train_step(batch, criterion, optimizer_idx)

    def get_criterion(self):
        return None

    def get_optimizer(self):
        make = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[self.config.optimizer]
        return [make(self.disc.parameters(), lr=self.config.lr), make(self.generator.parameters(), lr=self.config.lr)]

    get_data_loader = Toy.get_data_loader


def build(model_class=Toy, train=12, evaluation=6, args=None, seed=0, config=None, model=None, **kwargs) -> Trainer:
    """A Trainer of a freshly seeded toy; keyword arguments that are config fields go into the config."""
    config = config or ToyConfig()
    for name in [k for k in kwargs if hasattr(config, k)]:
        setattr(config, name, kwargs.pop(name))
    seed_everything(seed)
    model = model or model_class(config)
    kwargs.setdefault("train_samples", make_samples(train))
    kwargs.setdefault("eval_samples", make_samples(evaluation, seed=1))
    return Trainer(args or TrainerArgs(), config, model=model, parse_command_line_args=False, **kwargs)


def weights_of(model: nn.Module) -> dict:
    """A copy of the model's state."""
    return copy.deepcopy(model.state_dict())


def assert_same_weights(a: dict, b: dict) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}: {a[name]} != {b[name]}"

"""A classifier of digits as one writes it for Coqui's Trainer, whose release 0.4.0 runs this file as it is.

python classifier.py --coqpit.epochs 2 --coqpit.lr 0.01
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel


@dataclass
class ClassifierConfig(TrainerConfig):
    run_name: str = "classifier"
    optimizer: str = "Adam"
    lr: float = 0.003
    epochs: int = 2
    batch_size: int = 64
    eval_batch_size: int = 128
    print_step: int = 10
    plot_step: int = 10
    save_step: int = 10
    hidden: int = 64
    fail_at_step: int = None


class Classifier(TrainerModel):
    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(nn.Linear(64, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 10))
        self.updates = 0

    def forward(self, x):
        return self.layers(x)

    def format_batch(self, batch):
        x, y = batch
        return {"x": x, "y": y}

    def train_step(self, batch, criterion):
        logits = self(batch["x"])
        return {"model_outputs": logits}, {"loss": criterion(logits, batch["y"])}

    @torch.no_grad()
    def eval_step(self, batch, criterion):
        logits = self(batch["x"])
        accuracy = (logits.argmax(1) == batch["y"]).float().mean()
        return {"model_outputs": logits}, {"loss": criterion(logits, batch["y"]), "accuracy": accuracy}

    @staticmethod
    def get_criterion():
        return nn.CrossEntropyLoss()

    def get_data_loader(self, config, *, is_eval, samples=None, verbose=False):
        images, labels = samples
        size = config.eval_batch_size if is_eval else config.batch_size
        return DataLoader(TensorDataset(images, labels), batch_size=size, shuffle=not is_eval, num_workers=0)

    def on_train_step_end(self, trainer):
        self.updates += 1
        if self.updates == trainer.config.fail_at_step:
            raise RuntimeError("the model fails on purpose")

    def on_epoch_end(self, trainer):
        print(f"epoch end: {self.updates} steps of the model, rate {trainer.optimizer[0].param_groups[0]['lr']:.6f}")


def load_samples():
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def main():
    torch.manual_seed(0)
    train_samples, eval_samples = load_samples()
    args = TrainerArgs()
    config = ClassifierConfig()
    model = Classifier(config)
    trainer = Trainer(
        args,
        config,
        model=model,
        train_samples=train_samples,
        eval_samples=eval_samples,
        parse_command_line_args=True,
        callbacks={"on_init_end": lambda trainer: print("callback: the trainer is built")},
    )
    trainer.fit()


if __name__ == "__main__":
    main()

"""A GAN that optimizes by itself, in the form of the README of Coqui's Trainer; it draws points around (2, -1).

python gan.py --coqpit.epochs 4 --grad_accum_steps 2
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel


@dataclass
class GanConfig(TrainerConfig):
    run_name: str = "gan"
    epochs: int = 4
    batch_size: int = 32
    eval_batch_size: int = 128
    print_step: int = 20
    plot_step: int = 20
    lr_gen: float = 0.01
    lr_disc: float = 0.003


class Gan(TrainerModel):
    def __init__(self, config: GanConfig):
        super().__init__()
        self.config = config
        self.generator = nn.Linear(8, 2)
        self.discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, x):
        return self.generator(x)

    def optimize(self, batch, trainer):
        points, _ = batch

        # the discriminator
        z = torch.randn(points.shape[0], 8).type_as(points)
        drawn = self.generator(z)
        fake = torch.zeros(points.size(0), 1).type_as(points)
        loss_fake = trainer.criterion(self.discriminator(drawn.detach()), fake)
        valid = torch.ones(points.size(0), 1).type_as(points)
        loss_real = trainer.criterion(self.discriminator(points), valid)
        loss_disc = (loss_real + loss_fake) / 2
        self.scaled_backward(loss_disc, None, trainer)
        if trainer.total_steps_done % trainer.grad_accum_steps == 0:
            trainer.optimizer[0].step()
            trainer.optimizer[0].zero_grad()

        # the generator
        logits = self.discriminator(self.generator(z))
        loss_gen = trainer.criterion(logits, valid)
        self.scaled_backward(loss_gen, None, trainer)
        if trainer.total_steps_done % trainer.grad_accum_steps == 0:
            trainer.optimizer[1].step()
            trainer.optimizer[1].zero_grad()
        return {"model_outputs": logits}, {"loss_gen": loss_gen, "loss_disc": loss_disc}

    @torch.no_grad()
    def eval_step(self, batch, criterion):
        points, _ = batch
        drawn = self.generator(torch.randn(512, 8).type_as(points))
        valid = torch.ones(drawn.size(0), 1).type_as(points)
        distance = (drawn.mean(0) - points.mean(0)).norm()
        return {"points": drawn}, {"loss_gen": criterion(self.discriminator(drawn), valid), "distance": distance}

    def get_optimizer(self):
        discriminator = torch.optim.Adam(self.discriminator.parameters(), lr=self.config.lr_disc, betas=(0.5, 0.999))
        generator = torch.optim.Adam(self.generator.parameters(), lr=self.config.lr_gen, betas=(0.5, 0.999))
        return [discriminator, generator]

    def get_criterion(self):
        return nn.BCEWithLogitsLoss()

    def get_data_loader(self, config, *, is_eval, samples=None, verbose=False):
        size = config.eval_batch_size if is_eval else config.batch_size
        return DataLoader(TensorDataset(*samples), batch_size=size, shuffle=not is_eval)


def make_samples(n):
    return torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(n, 2), torch.zeros(n)


def main():
    torch.manual_seed(0)
    config = GanConfig()
    config.grad_clip = None
    trainer = Trainer(
        TrainerArgs(),
        config,
        model=Gan(config),
        train_samples=make_samples(1024),
        eval_samples=make_samples(128),
        gpu=0 if torch.cuda.is_available() else None,
    )
    trainer.fit()


if __name__ == "__main__":
    main()

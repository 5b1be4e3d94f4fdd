"""Train models/digits.py on scikit-learn's handwritten digits (1,797 images, part of the package).

python recipes/digits/train_digits.py
python recipes/digits/train_digits.py --coqpit.epochs=5 --coqpit.lr=1e-3
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # models/ is not installed: it is yours to change

import torch  # noqa: E402

from models.digits import Digits, DigitsConfig  # noqa: E402
from trainer import Trainer, parse_command_line, seed_everything  # noqa: E402


def load_samples(seed: int) -> tuple[list, list]:
    """All digits as (image, label), four fifths to train on and one to evaluate."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed)).tolist()
    samples = [(data.images[i], data.target[i]) for i in order]
    cut = len(samples) * 4 // 5
    return samples[:cut], samples[cut:]


def main() -> None:
    config = DigitsConfig(output_path=str(ROOT / "output"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args, _ = parse_command_line(config, parser)
    seed_everything(config.training_seed)
    train_samples, eval_samples = load_samples(config.training_seed)
    trainer = Trainer(
        args,
        config,
        model=Digits(config),
        train_samples=train_samples,
        eval_samples=eval_samples,
        parse_command_line_args=False,
    )
    trainer.fit()


if __name__ == "__main__":
    main()

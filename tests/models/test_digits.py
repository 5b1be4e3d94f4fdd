"""models/digits.py: its layers, its values against plain torch, and learning through the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from models import digits
from models.digits import Digits, DigitsConfig
from trainer.testing import Case, overfit_with_trainer

LAYERS = {
    "ConvBlock": Case(
        build=lambda: digits.ConvBlock(3, 5),
        inputs=lambda B, T: (torch.randn(B, 3, 4, T),),
        shapes=lambda B, T: (B, 5, 2, T // 2),
        sizes=((1, 2), (3, 2), (1, 9), (2, 12)),
        no_padding="images are never padded",
    ),
    "Digits": Case(
        build=lambda: Digits(DigitsConfig(channels=4)),
        inputs=lambda B, T: (torch.rand(B, 1, 8, 8),),
        shapes=lambda B, T: (B, 10),
        no_padding="images are never padded",
    ),
}


@pytest.fixture(scope="module")
def samples() -> list:
    """The first 64 of scikit-learn's digits."""
    data = load_digits()
    return list(zip(data.images[:64], data.target[:64]))


def test_conv_block_against_plain_torch():
    block = digits.ConvBlock(2, 3)
    x = torch.randn(2, 2, 6, 8)
    convolved = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    # one group: mean and variance over all channels and positions of a sample
    mean = convolved.mean((1, 2, 3), keepdim=True)
    variance = convolved.var((1, 2, 3), unbiased=False, keepdim=True)
    normed = (convolved - mean) / torch.sqrt(variance + 1e-5)
    expected = normed.clamp_min(0).unflatten(2, (3, 2)).unflatten(4, (4, 2)).amax((3, 5))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_losses_accuracy_and_inference(samples):
    model = Digits(DigitsConfig()).eval()
    batch = digits.collate(samples[:5])
    outputs, losses = model.eval_step(batch, model.get_criterion())
    log_p = outputs["logits"] - outputs["logits"].logsumexp(1, keepdim=True)
    assert losses["loss"].item() == pytest.approx(-log_p[range(5), batch["label"]].mean().item(), rel=1e-5)
    said = model.inference(batch["image"])
    assert said["label"].tolist() == outputs["logits"].argmax(1).tolist()
    torch.testing.assert_close(said["probabilities"].sum(1), torch.ones(5))
    right = sum(a == b for a, b in zip(said["label"].tolist(), batch["label"].tolist()))
    assert losses["accuracy"].item() == pytest.approx(right / 5)


def test_collate_scales_to_one(samples):
    batch = digits.collate(samples)
    assert batch["image"].shape == (64, 1, 8, 8)
    assert (batch["image"].min(), batch["image"].max()) == (0.0, 1.0)
    assert batch["label"].tolist() == [label for _, label in samples]


def test_overfits_one_real_batch_through_the_trainer(samples, tmp_path):
    torch.manual_seed(0)
    config = DigitsConfig(epochs=200, run_eval_epochs=200, device="cpu", dashboard_logger="none")
    means = overfit_with_trainer(Digits(config), config, tmp_path, below=0.01, train_samples=samples)
    assert means["accuracy"] == 1.0

"""Golden losses: every loss of the first 50 updates of digits and of small VITS, committed beside this file.

python -m tests.golden.record digits
python -m tests.golden.record vits

write tests/golden/<name>.json anew, on one thread of the CPU. That is right after a change that is meant to change what
is computed, and after an update of torch; the commit says which. tests/test_golden.py compares with the files.

What such a training needs has to be the same on every machine. The digits are a part of scikit-learn; the clips for
VITS are computed here in whole numbers. Nothing is dropped out: on some processors torch draws dropout's masks with
MKL's generator, and on others with its own.
"""

import argparse
import json
import sys
import tempfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.digits import Digits, DigitsConfig
from models.vits import SMALL, Vits, VitsConfig
from recipes.digits.train_digits import load_samples
from trainer import Trainer, TrainerArgs, TrainerConfig, seed_everything
from trainer.data.speech import SpeechSample
from trainer.seeding import arithmetic

FOLDER = Path(__file__).parent
UPDATES = 50
QUIET = {
    "device": "cpu",
    "dashboard_logger": "none",
    "run_eval": False,
    "save_checkpoints": False,
    "max_steps": UPDATES,
}
DIGITS = {**QUIET, "dropout": 0.0}
# The recipe's small model. With its learning rate, 1e-3, the KL losses of two processors soon differ by a factor of 3.
VITS = {
    **SMALL,
    **QUIET,
    "phonemes": False,
    "p_dropout": 0.0,
    "dp_dropout": 0.0,
    "batch_size": 2,
    "lr": 2e-4,
    "epochs": 1000,
}

# How far a loss may be from the committed one where rounding differs, as a share of it, in the updates up to a number.
# With the kernels of older processors (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS) digits is up
# to 3e-7 away, and VITS 2e-4, 2e-3 and 0.09, since every update amplifies what the last one differed by. The bounds
# are three to thirty times as wide.
TOLERANCES = {"digits": [[UPDATES, 1e-5]], "vits": [[10, 1e-3], [20, 1e-2], [UPDATES, 0.3]]}


def make_clips(folder: Path, count: int = 8) -> list[SpeechSample]:
    """Clips of 0.7 to 1.4 s at 22,050 Hz: five harmonics (triangle waves) with a rising pitch, and a little noise."""
    words = ["low", "notes", "glide", "up", "and", "then", "down", "again", "slowly", "here"]
    samples = []
    for i in range(count):
        k = np.arange(256 * (64 + 8 * i), dtype=np.int64)
        phase = k * (1300 + 137 * i) + (k * k * (3 + i) >> 12)  # a period is 65,536
        harmonics = [(np.abs((phase * h & 0xFFFF) - 0x8000) - 0x4000) // (2 * h) for h in range(1, 6)]
        noise = (k * 1103515245 + 12345 * (i + 1) >> 7 & 0x3FF) - 512
        path = folder / f"clip-{i}.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 22050, len(k), "NONE", ""))
            file.writeframes((sum(harmonics) // 4 + noise).astype("<i2").tobytes())
        samples.append(SpeechSample(path.stem, str(path), " ".join(words[: 2 + i]) + "."))
    return samples


def losses_of(name: str) -> dict[str, list[str]]:
    """Train, and return every loss of every update, as exact hexadecimal numbers."""
    losses: dict[str, list[str]] = {}

    def note(trainer: Trainer) -> None:
        trainer.keep_avg_train.read()
        for key, value in trainer.keep_avg_train.last.items():
            if not key.startswith("grad_norm"):
                losses.setdefault(key, []).append(float(value).hex())

    with tempfile.TemporaryDirectory() as folder:
        config, samples = _setting(name, Path(folder))
        seed_everything(config.training_seed)
        model = Digits(config) if name == "digits" else Vits(config)
        data = {"train_samples": samples, "eval_samples": samples[:2], "parse_command_line_args": False}
        Trainer(TrainerArgs(), config, folder, model=model, callbacks={"on_train_step_end": note}, **data).fit()
    return losses


def _setting(name: str, folder: Path) -> tuple[TrainerConfig, list]:
    if name == "digits":
        config = DigitsConfig(**DIGITS)
        return config, load_samples(config.training_seed)[0]
    return VitsConfig(**VITS, cache_dir=str(folder / "cache")), make_clips(folder)


def record(name: str) -> dict[str, Any]:
    """What a golden file holds: losses, what they were computed with, and the tolerances elsewhere."""
    torch.set_num_threads(1)
    losses = losses_of(name)
    return {"arithmetic": arithmetic(torch.device("cpu")), "tolerances": TOLERANCES[name], "losses": losses}


def is_exact(golden: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether two records have to be equal bit for bit: the same torch, threads, instructions and processor."""
    return golden["arithmetic"] == found["arithmetic"]


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where a record is not as the golden one, to the last bit or within the tolerances."""
    if list(golden["losses"]) != list(found["losses"]):
        return [f"losses are {', '.join(found['losses'])}, not {', '.join(golden['losses'])}"]
    problems = []
    for name, expected in golden["losses"].items():
        values = found["losses"][name]
        if len(values) != len(expected):
            problems.append(f"{name}: {len(values)} updates, not {len(expected)}")
        for step, (a, b) in enumerate(zip(map(float.fromhex, expected), map(float.fromhex, values)), start=1):
            share = 0.0 if is_exact(golden, found) else next(t for last, t in golden["tolerances"] if step <= last)
            if not abs(a - b) <= share * abs(a):  # NaN is a difference
                problems.append(f"{name}, update {step}: {b!r}, not {a!r} (within {share:g} of it)")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(TOLERANCES))
    parser.add_argument("--output", type=Path, help="another file to write")
    options = parser.parse_args()
    path = options.output or FOLDER / f"{options.name}.json"
    path.write_text(json.dumps(record(options.name), indent=1) + "\n", encoding="utf8")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())

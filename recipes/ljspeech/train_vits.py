"""Train VITS (models/vits.py) on LJSpeech, or on any folder in its layout (metadata.csv and wavs/).

python recipes/ljspeech/train_vits.py                                    data/LJSpeech-1.1, else the demo set
python recipes/ljspeech/train_vits.py --download                         fetch LJSpeech-1.1 (2.7 GB) first
python recipes/ljspeech/train_vits.py --coqpit.dataset_path=DIR --small  a model that trains in minutes on a CPU
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # models/ is not installed: it is yours to change

import torch  # noqa: E402

from models.vits import Vits, VitsConfig, small_config  # noqa: E402
from trainer import Trainer, parse_command_line, seed_everything  # noqa: E402
from trainer.data.demo import make_demo_set  # noqa: E402
from trainer.data.ljspeech import download_ljspeech, locate_ljspeech, read_ljspeech, split_ljspeech  # noqa: E402

LJSPEECH = ROOT / "data" / "LJSpeech-1.1"
DEMO_NOTICE = f"""
  *** No dataset: training on the DEMO SET, sentences spoken by the espeak-ng synthesizer. ***
  *** It shows that everything runs; for a voice, train on LJSpeech: add --download, or   ***
  *** unpack it as {LJSPEECH}, or give --coqpit.dataset_path=DIR.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model; the default on the demo set without a GPU")
    parser.add_argument("--download", action="store_true", help=f"download LJSpeech-1.1 to {LJSPEECH}")
    config = VitsConfig(output_path=str(ROOT / "output"))
    args, flags = parse_command_line(config, parser)

    folder = download_ljspeech(LJSPEECH) if flags.download else locate_ljspeech(config.dataset_path, LJSPEECH)
    if folder is None:
        print(DEMO_NOTICE)
        folder = make_demo_set()
    if not args.continue_path and (flags.small or ("demo" in folder.name and not torch.cuda.is_available())):
        print("Training the small model (--small).")
        config = small_config(output_path=str(ROOT / "output"))
        parse_command_line(config, parser)

    seed_everything(config.training_seed)
    train_samples, eval_samples, _ = split_ljspeech(read_ljspeech(folder), seed=config.training_seed)
    trainer = Trainer(
        args,
        config,
        model=Vits(config),
        train_samples=train_samples,
        eval_samples=eval_samples,
        parse_command_line_args=False,
    )
    trainer.fit()
    checkpoint = trainer.output_path / "best_model.pth"
    print(f'speak:       python recipes/ljspeech/speak_vits.py {checkpoint} "What shall I say?" speech.wav')


if __name__ == "__main__":
    main()

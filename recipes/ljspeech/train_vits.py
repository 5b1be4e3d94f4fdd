"""Train VITS (models/vits.py) on LJSpeech, or on any folder in its layout (metadata.csv and wavs/).

python recipes/ljspeech/train_vits.py                                    data/LJSpeech-1.1, else the demo set
python recipes/ljspeech/train_vits.py --download                         fetch LJSpeech-1.1 (2.7 GB) first
python recipes/ljspeech/train_vits.py --coqpit.dataset_path=DIR --small  a model that trains in minutes on a CPU
"""

import argparse
import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # models/ is not installed: it is yours to change

from models.vits import SMALL, Vits, VitsConfig  # noqa: E402
from trainer import Trainer, parse_command_line, seed_everything  # noqa: E402
from trainer.data.ljspeech import DataError, find_ljspeech, read_ljspeech, split_ljspeech  # noqa: E402
from trainer.device import pick_device  # noqa: E402
from trainer.distributed import Ranks  # noqa: E402
from trainer.provenance import as_a_shell_calls  # noqa: E402

LJSPEECH = ROOT / "data" / "LJSpeech-1.1"
PLACE = {"output_path": str(ROOT / "output"), "run_name": "vits_ljspeech"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model; the default on the demo set without a GPU")
    parser.add_argument("--download", action="store_true", help=f"download LJSpeech-1.1 to {LJSPEECH}")
    config = VitsConfig(**PLACE)
    args, flags = parse_command_line(config, parser)
    # of several ranks, the first one says what is trained on
    with contextlib.redirect_stdout(sys.stdout if Ranks.from_environment(config, args).is_main else None):
        folder, is_demo = find_ljspeech(config.dataset_path, LJSPEECH, flags.download)
        if not args.continue_path and (flags.small or (is_demo and pick_device(config.device).type == "cpu")):
            print("Training the small model (--small).")
            config = VitsConfig(**SMALL, **PLACE)
            parse_command_line(config, parser)

    seed_everything(config.training_seed)
    train, evaluation, _ = split_ljspeech(read_ljspeech(folder), seed=config.training_seed)
    trainer = Trainer(
        args, config, model=Vits(config), train_samples=train, eval_samples=evaluation, parse_command_line_args=False
    )
    trainer.fit()
    speak = ROOT / "recipes" / "ljspeech" / "speak_vits.py"
    if trainer.ranks.is_main:
        best, python = trainer.output_path / "best_model.pth", as_a_shell_calls("python")
        print(f'let it speak: {python} {speak} {best} "What shall I say?" speech.wav')


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")

"""Speak a text with a VITS that recipes/ljspeech/train_vits.py trained.

python recipes/ljspeech/speak_vits.py output/vits_ljspeech-.../best_model.pth "What shall I say?" speech.wav
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from models.vits import Vits, VitsConfig
from trainer import seed_everything
from trainer.checkpoint import load_checkpoint
from trainer.data.audio import write_audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best_model.pth or checkpoint_STEP.pth of a run")
    parser.add_argument("text", help="what to say")
    parser.add_argument("output", type=Path, help="wav file to write")
    parser.add_argument("--length_scale", type=float, default=1.0, help="duration: 2 is half as fast (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another rendering (default: 0)")
    options = parser.parse_args()
    if not options.checkpoint.is_file():
        parser.error(f"{options.checkpoint}: no such file; give best_model.pth of a run's folder")
    state = load_checkpoint(options.checkpoint)
    model = Vits(VitsConfig.new_from_dict(state["config"])).eval()
    model.load_state_dict(state["model"])
    seed_everything(options.seed)
    tokens = model.tokenizer.encode(options.text)
    if not model.tokenizer.decode(tokens).strip():
        parser.error(f"text={options.text!r}: holds nothing to say")
    speech = model.inference(torch.tensor([tokens]), length_scale=options.length_scale)
    waveform = speech["waveform"][0, : int(speech["lengths"][0])]
    write_audio(options.output, waveform.numpy(), model.config.sample_rate)
    print(f"{options.output}: {len(waveform) / model.config.sample_rate:.2f} s")


if __name__ == "__main__":
    main()

"""The README's picture: what a run of VITS wrote to TensorBoard, on one sheet.

python docs/plot_run.py output/vits_ljspeech-... docs/images/training.png
"""

import argparse
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    events = EventAccumulator(str(options.run), size_guidance={"images": 0, "scalars": 0})
    events.Reload()

    sheet = Figure(figsize=(12, 7), layout="constrained")
    (curve, alignment), (recorded, spoken) = sheet.subplots(2, 2)
    for tag, label in (("TrainIterStats/loss_mel", "training"), ("EvalStats/loss_mel", "evaluation")):
        scalars = events.Scalars(tag)
        curve.plot([s.step for s in scalars], [s.value for s in scalars], marker=".", label=label)
    curve.set(title="mel loss", xlabel="update")
    curve.legend()
    for axes, tag in ((alignment, "alignment"), (recorded, "recorded"), (spoken, "spoken")):
        image = events.Images(f"EvalFigures/{tag}")[-1]
        axes.imshow(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))))
        axes.set_title(f"{tag}, update {image.step}")
        axes.axis("off")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()

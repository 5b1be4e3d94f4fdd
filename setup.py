"""Metadata of onefile-trainer. Exact versions are in constraints.txt; the tools' settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "trainer/__init__.py").read_text(encoding="utf8"))[1]

SPEECH = ["soxr>=0.5", "inflect>=7.0", "anyascii>=0.3"]
S3 = ["s3fs>=2024.5"]
EXTRAS = {
    # resampling, and reading numbers and abbreviations aloud
    "speech": SPEECH,
    # phonemes, and the demo set's voice: espeak-ng, under the GPL-3, used in a process of its own
    "phonemes": [*SPEECH, "espeakng-loader>=0.2.4", "phonemizer>=3.3"],
    # the data of recipes/digits
    "recipes": ["scikit-learn>=1.4"],
    # checkpoints and data on S3, or any store that speaks its protocol
    "s3": S3,
    "dev": [
        *S3,
        "hypothesis>=6.100",
        "librosa>=0.10",
        # a store that speaks S3, on loopback; moto[server] would bring all of Amazon's other services
        "flask>=3.0",
        "flask-cors>=4.0",
        "moto[s3]>=5.0",
        "monotonic-alignment-search>=0.2",
        "pytest>=8.0",
        "pytest-cov>=5.0",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "safetensors>=0.4",
        "transformers>=4.40",
    ],
}

setup(
    name="onefile-trainer",
    version=VERSION,
    description="A lightweight PyTorch trainer: every model in one file, every run repeatable",
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["trainer", "trainer.*"]),
    # an editable install then puts this folder on the path: models/ can be imported from anywhere, a notebook say
    package_dir={"": "."},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "coqpit-config>=0.2.0",
        "fsspec>=2024.2",
        "matplotlib>=3.8",
        "rich>=13.0",
        "soundfile>=0.12",
        "tensorboard>=2.16",
        "universal-pathlib>=0.3.10",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

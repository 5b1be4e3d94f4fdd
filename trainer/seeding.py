"""What a training has to fix to be repeated bit for bit: seeds, random states, deterministic algorithms, rounding."""

import contextlib
import functools
import os
import platform
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config import TrainerConfig

_is_seeded = False  # whether the program has called seed_everything
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats itself; torch takes no others
# variables by which the libraries under torch are made to take other kernels than the processor would get
_KERNEL_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators (all devices). Call it before the model is built."""
    global _is_seeded
    _is_seeded = True
    seed_generators(seed)


def seed_unless_done(seed: int) -> None:
    """Seed all generators, unless the program has called seed_everything.

    Scripts for Coqui's Trainer leave it to the Trainer, which comes after the model's weights have been drawn.
    """
    if not _is_seeded:
        seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Seed python's, numpy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def is_deterministic(config: TrainerConfig, device: torch.device) -> bool:
    """Whether a training on this device uses deterministic algorithms only; on the CPU they cost nothing."""
    return device.type == "cpu" if config.deterministic is None else config.deterministic


def set_backend_flags(config: TrainerConfig, device: torch.device) -> None:
    """Set torch's, cuDNN's and TF32's switches to what the config says, whatever they were before.

    Raises:
        ValueError: the training is to be deterministic, and the environment has cuBLAS work otherwise.
    """
    deterministic = is_deterministic(config, device)
    if deterministic and device.type == "cuda":
        _fix_workspace()
    if torch.get_deterministic_debug_mode() != (2 if deterministic else 0):
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.enabled = config.cudnn_enable
    torch.backends.cudnn.deterministic = config.cudnn_deterministic or deterministic
    torch.backends.cudnn.benchmark = config.cudnn_benchmark and not deterministic
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32


def _fix_workspace() -> None:
    """Give cuBLAS a workspace with which it repeats itself. Torch looks at the variable when it first uses cuBLAS."""
    value = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if value not in _WORKSPACES:
        raise ValueError(
            f"{_WORKSPACE}={value!r} in the environment: cuBLAS does not repeat itself then; set it to "
            f"{' or '.join(_WORKSPACES)}, leave it out, or set deterministic=false"
        )


@contextlib.contextmanager
def naming_indeterminate() -> Iterator[None]:
    """Say what to do about an operation without a deterministic form; torch speaks of a call that no user has made.

    Raises:
        RuntimeError: there was one inside the block.
    """
    try:
        yield
    except RuntimeError as error:
        # in front of what a loader's worker raised stands the name of its error
        found = re.search(r"(?:RuntimeError: )?(.+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise RuntimeError(
            f"deterministic=true: {found[1]} has no deterministic form; use another operation, or set "
            "deterministic=false, with which the same training may end in other bits"
        ) from error


def arithmetic(device: torch.device) -> dict[str, str | int]:
    """What the last bits of a training's results depend on, besides its code, config and data.

    Sums are cut up among the threads. Kernels, and the blocks that they add up, are chosen by version, instruction set,
    maker and caches of the processor. Where all of this is equal, results are taken to be equal bit for bit.
    """
    settings = [f"{name}={os.environ[name]}" for name in _KERNEL_SETTINGS if name in os.environ]
    facts = {
        "torch": str(torch.__version__),  # of a class of its own, which weights_only refuses
        "threads": torch.get_num_threads(),
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *settings]),
        "processor": _processor(),
    }
    if device.type == "cuda":
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}"
    return facts


@functools.cache
def _processor() -> str:
    """Maker, family, model, sizes of the caches, vector instructions; the architecture where Linux does not tell."""
    cpuinfo, caches = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
    text = cpuinfo.read_text(encoding="utf8").split("\n\n")[0] if cpuinfo.is_file() else ""
    facts = dict(re.findall(r"^(\w[^\t:]*?)\s*: (.*)$", text, flags=re.MULTILINE))
    if "vendor_id" not in facts:
        return platform.machine()
    sizes = [size.read_text(encoding="utf8").strip() for size in sorted(caches.glob("index*/size"))]
    vectors = sorted(flag for flag in facts["flags"].split() if re.match("sse4|avx|fma|amx", flag))
    return " ".join([facts["vendor_id"], facts["cpu family"], facts["model"], *sizes, *vectors])


def arithmetic_changes(before: Mapping[str, Any], device: torch.device) -> list[str]:
    """Where ``arithmetic`` is not what it was: ``threads: 2, before 1`` and the like."""
    now = arithmetic(device)
    return [
        f"{name}: {now.get(name, 'none')}, before {before.get(name, 'none')}"
        for name in dict.fromkeys([*now, *before])
        if now.get(name) != before.get(name)
    ]


def capture_rng_state() -> dict[str, Any]:
    """The state of all generators, as types that ``torch.load(weights_only=True)`` reads."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        # weights_only refuses numpy arrays
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put back what capture_rng_state returned; states of devices that are not here are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, index)
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Run a block with freshly seeded generators and put the old states back afterwards.

    Evaluations draw the same random numbers every time, and training draws the same whether it is evaluated or not.
    """
    before = capture_rng_state()
    seed_generators(seed)
    try:
        yield
    finally:
        restore_rng_state(before)

"""Several ranks: the process group, sums over ranks, and what every rank has to know of the others.

Each rank is a process with its own device and its share of every batch. What the host knows (sample counts, signals,
which parameters have gradients) travels over gloo, so that nothing of it waits for the device; gradients, parameters
and buffers travel over the device's own backend. With one rank nothing is opened, and every method returns at once.
"""

import atexit
import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trainer.config import TrainerArgs, TrainerConfig
from trainer.roll_call import RollCall
from trainer.seeding import seed_generators
from trainer.sharded import is_sharded
from trainer.slurm import ranks_of_step

_RANK = 2  # keeps the random streams of ranks apart from those of orders and samples (trainer/data/samplers.py)
_BUCKET_BYTES = 2**26  # what is copied together for one collective: it bounds the memory that communication takes
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LAUNCHER = "python -m trainer.distribute --gpus 0,1 --script SCRIPT"


def rank_seed(seed: int, rank: int) -> int:
    """A seed of this rank's own, below 2^32; of rank 0 it is ``seed`` itself."""
    if rank == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(_RANK, rank)).generate_state(1)[0])


class Agreement:
    """What an update is to all ranks; the first look at it waits for the others.

    Args:
        world_size: number of ranks.
        samples: of this rank.
        signal: that this rank received.
        save: whether this rank finds that a checkpoint is due.
        group: of processes on the hosts.
    """

    def __init__(self, world_size: int, samples: float, signal: int | None, save: bool, group: Any) -> None:
        self._mine = torch.tensor([samples, signal or 0, save], dtype=torch.float64) if world_size > 1 else None
        self._samples, self._signal, self._save, self._work = samples, signal, save, None
        if self._mine is not None:
            self._all = [torch.empty_like(self._mine) for _ in range(world_size)]
            self._work = dist.all_gather(self._all, self._mine, group=group, async_op=True)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            samples, signals, saves = zip(*(numbers.tolist() for numbers in self._all))
            self._samples, self._signal, self._save = sum(samples), int(max(signals)) or None, any(saves)
            self._work = None

    @property
    def samples(self) -> float:
        """On all ranks together."""
        self._wait()
        return self._samples

    @property
    def signal(self) -> int | None:
        """The highest number of the signals; None when no rank received one."""
        self._wait()
        return self._signal

    @property
    def save(self) -> bool:
        """Whether any rank finds that a checkpoint is due."""
        self._wait()
        return self._save


class Ranks:
    """This process among the ranks of a training.

    Every method but the constructors is a collective: all ranks must call it, in the same order.

    Attributes:
        rank: index of this process, from 0.
        world_size: number of ranks.
        local_rank: index among the ranks of this machine, which is the index of its GPU.
        group_id: name of this group of ranks, from the launcher; empty without one.
        is_main: whether this is rank 0, which alone writes files.
    """

    _store: dist.Store | None = None  # of the process's group, if a Trainer has opened it
    _has_a_launcher = False  # and is told what ends this process

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        group_id: str = "",
        backend: str = "auto",
        url: str = "env://",
        timeout: float = 1800,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK={rank} with WORLD_SIZE={world_size}: ranks count from 0 to WORLD_SIZE - 1")
        self.rank, self.world_size, self.local_rank, self.group_id = rank, world_size, local_rank, group_id
        self.is_main = rank == 0
        self._backend, self._url, self._timeout = backend, url, timeout
        self.roll_call = RollCall(rank, world_size, timeout)
        self._is_open = self._owns_group = False
        self._host_group: Any = None  # a group for CPU tensors; None where the default group takes them

    @classmethod
    def from_environment(cls, config: TrainerConfig, args: TrainerArgs) -> "Ranks":
        """What the launcher (trainer.distribute, torchrun, srun) has put into the environment; one rank without one.

        A process group that the script has opened by itself counts as well. Fills in args.use_ddp, args.rank and
        args.group_id.

        Raises:
            ValueError: use_ddp without a launcher, or a part of its variables is missing.
        """
        opened = dist.is_available() and dist.is_initialized()
        if not opened:
            os.environ.update(ranks_of_step(os.environ))  # where env:// looks
        found = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())} if opened else {}
        found.update({name: os.environ[name] for name in _VARIABLES if name in os.environ})
        if args.use_ddp and "RANK" not in found:
            raise ValueError(f"use_ddp={args.use_ddp}: no launcher has started this process; use {_LAUNCHER}")
        if ("RANK" in found) != ("WORLD_SIZE" in found):
            raise ValueError(f"of RANK and WORLD_SIZE only one is set ({found}): set both, or start with {_LAUNCHER}")
        values = {name: _whole_number(name, text) for name, text in found.items()}
        rank, group_id = values.get("RANK", 0), os.environ.get("TORCHELASTIC_RUN_ID", args.group_id)
        ranks = cls(
            rank,
            values.get("WORLD_SIZE", 1),
            values.get("LOCAL_RANK", rank),
            group_id,
            config.distributed_backend,
            config.distributed_url,
            config.distributed_timeout,
        )
        args.use_ddp, args.rank, args.group_id = ranks.world_size > 1, ranks.rank, ranks.group_id
        return ranks

    def open(self, device: torch.device) -> None:
        """Join the process group, once; one that the script has opened is used and left alone.

        The group is destroyed when the process ends (see close).

        Args:
            device: where this rank trains: ``cuda:local_rank``, or the CPU.
        """
        if self.world_size == 1 or self._is_open:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            # the launcher's free port comes before a fixed one, which two runs on one machine would share
            url = "env://" if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ else self._url
            backend, timeout = self._pick_backend(device), datetime.timedelta(seconds=self._timeout)
            store, _, _ = next(dist.rendezvous(url, self.rank, self.world_size))
            Ranks._store = dist.PrefixStore("trainer", store)
            options = {"rank": self.rank, "world_size": self.world_size, "timeout": timeout}
            dist.init_process_group(backend, store=dist.PrefixStore("group", store), **options)
            atexit.register(self.close)
        elif (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            raise ValueError(
                f"the script's process group says rank {dist.get_rank()} of {dist.get_world_size()}, the environment "
                f"RANK={self.rank} and WORLD_SIZE={self.world_size}: leave opening the group to the Trainer"
            )
        self.roll_call.store = Ranks._store
        if dist.get_backend() != "gloo":
            self._host_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self._timeout))
        if not Ranks._has_a_launcher:
            Ranks._has_a_launcher = True
            _record_what_ends_the_process()
            _end_with_the_launcher()
        self._is_open = True

    def close(self) -> None:
        """Destroy the process group, if ``open`` made it. Called when the process ends; it cannot be opened again."""
        # after an error the others may be gone, and NCCL would wait for them
        failed = getattr(sys, "last_value", None) is not None
        if self._owns_group and not failed and dist.is_initialized():
            self.roll_call.leave()
            dist.destroy_process_group()
            # gloo's threads let go of the last tensors, for which they need Python: not while it shuts down
            time.sleep(0.1)
        self._is_open = self._owns_group = False

    # ---- every update ----

    def agree(self, samples: float, signal: int | None = None, save: bool = False) -> "Agreement":
        """Begin to tell each other what an update needs: its samples on all ranks, a signal that any received, a save.

        One collective of three numbers between the hosts; it goes on during the forward pass, until somebody looks. A
        micro-batch of n samples is weighted by n / agreement.samples.
        """
        if self.world_size > 1:
            self.roll_call.here()
        return Agreement(self.world_size, samples, signal, save, self._host_group)

    def highest(self, numbers: list[int]) -> list[int]:
        """The highest number over the ranks at each position, by one collective between the hosts."""
        if self.world_size == 1:
            return [int(number) for number in numbers]
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._host_group)
        return tensor.tolist()

    def sum_gradients(
        self, parameters: Iterable[nn.Parameter], extra: torch.Tensor | None = None, used: bool = True
    ) -> bool:
        """Sum gradients over the ranks; afterwards they are bitwise the same on all of them.

        Call it once for each optimizer and update, after the last backward of the window and before unscaling, on a
        rank without gradients (or without a loss) too. A gradient that is missing on this rank counts as zeros; one
        that is missing on all ranks stays None.

        Args:
            parameters: of one optimizer, in the same order on all ranks.
            extra: a tensor on the device that is summed in place along with them, such as a count of bad losses.
            used: whether this rank has a loss for this optimizer.

        Returns:
            Whether any rank has a loss for this optimizer. If none has, nothing was summed.
        """
        if self.world_size == 1:
            return used
        parameters = list(parameters)  # frozen ones too: which are may differ between ranks
        present = torch.tensor([used, *(p.grad is not None for p in parameters)], dtype=torch.uint8)
        dist.all_reduce(present, dist.ReduceOp.MAX, group=self._host_group)
        used, *present = present.tolist()
        if not used:
            return False
        tensors = [] if extra is None else [extra]
        for parameter, is_present in zip(parameters, present):
            if not is_present:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            tensors.append(parameter.grad)
        with torch.no_grad():
            for bucket in _buckets(tensors):
                with _flattened(bucket) as flat:
                    dist.all_reduce(flat, group=self._group_of(flat))
        return True

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Rank 0's persistent buffers (BatchNorm's statistics) to all ranks, after every update.

        What a state dict leaves out is a cache, such as positions up to the longest batch that a rank has seen.
        """
        if self.world_size > 1:
            self._broadcast(_persistent_buffers(model))

    # ---- now and then ----

    def broadcast_model(self, model: nn.Module) -> None:
        """Rank 0's parameters and buffers to all ranks; at the start, and after a checkpoint was loaded."""
        if self.world_size > 1:
            whole = [parameter for parameter in model.parameters() if not is_sharded(parameter)]
            self._broadcast([*whole, *model.buffers()])

    def _broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        with torch.no_grad():
            for bucket in _buckets(tensors):
                with _flattened(bucket) as flat:
                    # as bytes: gloo does not know every type
                    dist.broadcast(flat.view(torch.uint8), src=0, group=self._group_of(flat))

    def _group_of(self, tensor: torch.Tensor) -> Any:
        return self._host_group if tensor.device.type == "cpu" else None

    def _pick_backend(self, device: torch.device) -> str:
        if self._backend == "nccl" and device.type != "cuda":
            raise ValueError(f"distributed_backend='nccl' on {device.type}: NCCL needs GPUs; set it to auto or gloo")
        if self._backend == "auto":
            return "nccl" if device.type == "cuda" else "gloo"
        return self._backend

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of each rank, in the order of the ranks, on all ranks (random states, lengths)."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on all ranks (the run's folder, the checkpoint to continue from)."""
        if self.world_size == 1:
            return value
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.world_size == 1 else any(self.gather(flag))

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self._host_group)

    def seed(self, seed: int) -> None:
        """Give this rank a random stream of its own. Rank 0 goes on with its own, which is that of a single process."""
        if self.rank > 0:
            seed_generators(rank_seed(seed, self.rank))


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: must be a whole number")
    return int(text)


def _persistent_buffers(model: nn.Module) -> list[torch.Tensor]:
    found = {
        id(buffer): buffer  # a shared one comes once
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return list(found.values())


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in lists of one type and device, of at most _BUCKET_BYTES or of one tensor."""
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        bucket, size = [], 0
        for tensor in same:
            if bucket and size + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


@contextlib.contextmanager
def _flattened(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """One flat copy of the tensors, which get its values when the block is left."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    yield flat
    sizes = [tensor.numel() for tensor in tensors]
    torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors)])


def _end_with_the_launcher() -> None:
    """Save and exit, as after SIGTERM, when the launcher is killed: nobody else would stop this rank, or hear it."""
    parent = os.getppid()

    def watch() -> None:
        # Linux's PR_SET_PDEATHSIG comes once for each thread of the launcher: the second would not let this rank save
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if "TRAINER_LAUNCHER" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def _record_what_ends_the_process() -> None:
    """Leave the traceback of an exception that ends this rank where the elastic launcher looks for it."""
    path, before = os.environ.get("TORCHELASTIC_ERROR_FILE"), sys.excepthook

    def record(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        details = {"py_callstack": lines, "timestamp": str(int(time.time()))}
        with open(path, "w", encoding="utf8") as file:
            json.dump({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": details}}, file)
        before(kind, error, trace)

    if path:
        sys.excepthook = record

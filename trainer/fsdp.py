"""Fully sharded training (``strategy: fsdp``): each rank keeps a part of every parameter, gradient and optimizer state.

torch's ``fully_shard`` does the sharding: parameters are DTensors of which a rank holds some rows, and are gathered for
the length of a forward or backward pass, block after block. Here is what goes around it: where a model is entered,
what all ranks have to agree on, and states that are whole in a checkpoint, so that a run may go on with any strategy
and any number of ranks.

All ranks must run the same blocks in the same order; where they do not, it is an error, or the collectives of one rank
wait for those of another until the process group's timeout.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from trainer.model import TrainerModel, overrides
from trainer.optimizers import parameters_of
from trainer.sharded import is_sharded, shard_as, sum_over_ranks

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainer.config import TrainerConfig
    from trainer.distributed import Ranks

MIN_BLOCK = 2**20  # values: gathering smaller blocks by themselves costs more time than it saves memory
_ENTRIES = ("train_step", "eval_step", "inference", "forward")
_UNSUPPORTED = ("Adafactor", "Rprop", "SparseAdam", "LBFGS")  # torch cannot compute them on DTensors
_REMEDY = "set strategy='ddp'"


# ---- what is sharded by itself ----


def blocks_of(model: TrainerModel) -> list[nn.Module]:
    """The modules that are gathered one at a time, inner ones first; all that is left is gathered with the model.

    These are the model's ``fsdp_modules()``, or else the entries of its ModuleLists, ModuleDicts and Sequentials that
    have at least MIN_BLOCK values. A module whose parameters are also used outside of it is none of them.
    """
    if overrides(model, "fsdp_modules"):
        chosen = {id(module) for module in model.fsdp_modules()}
        return [module for module in reversed(list(model.modules())) if id(module) in chosen]
    names = dict(model.named_modules())
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    blocks, taken = [], set()
    for name, module in reversed(names.items()):
        parent = names.get(name.rpartition(".")[0])
        is_entry = isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        if not is_entry or isinstance(module, ParametrizationList):
            continue
        own = [p for p in module.parameters() if p not in taken]
        inside = all(place.startswith(f"{name}.") for p in own for place in places[p])
        if inside and sum(p.numel() for p in own) >= MIN_BLOCK:
            blocks.append(module)
            taken.update(own)
    return blocks


# ---- the model ----


def shard(model: TrainerModel, config: "TrainerConfig", ranks: "Ranks", device: torch.device) -> "Shards | None":
    """Shard the model, if the config asks for it and there are several ranks; these are opened.

    It has to be done before anything knows of the model's parameters. The weights are those of rank 0. They go to the
    device part by part, since all of them may not fit there.
    """
    if config.strategy != "fsdp" or ranks.world_size == 1:
        return None
    ranks.open(device)
    ranks.broadcast_model(model)
    return Shards(model, ranks, device)


class Shards:
    """A model's parameters, sharded over the ranks.

    The model is changed in place. It, ``train_step``, ``eval_step`` and ``inference`` can be called as before, by all
    ranks together; outside of these calls the parameters are DTensors.

    Args:
        model: equal on all ranks; it may be on the CPU still.
        ranks: opened.
        device: where this rank trains.

    Raises:
        ValueError: a model or a device that cannot be trained in this way.
    """

    def __init__(self, model: TrainerModel, ranks: "Ranks", device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        _check(model, device, FSDPModule)
        self._model, self._ranks = model, ranks
        self._depth = 0  # of calls of entries from inside entries
        self._is_gathered = False
        self._order: list[int] = []  # blocks that a training step has run
        self._used: set[int] = set()  # ids of the parameters with a gradient in this update
        self._optimizers: list[Optimizer] = []
        mesh = init_device_mesh(device.type, (ranks.world_size,))
        self._blocks = blocks_of(model)
        for block in self._blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # the rest of the model stays gathered until the backward pass, which begins with it
        name = type(model).__name__
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        type(model).__name__ = name  # torch has given the model a class of its own; messages go on naming the model's
        self._blocks.append(model)
        model._run_gathered = lambda call: call()
        register_fsdp_forward_method(model, "_run_gathered")
        for name in _ENTRIES:
            setattr(model, name, self._entry(name))
        model._run_gathered(lambda: None)  # the model itself has to be the first that torch sees running
        model.reshard()
        for index, block in enumerate(self._blocks):
            self._prepare(index, block)
        for module in model.modules():
            module.register_load_state_dict_pre_hook(_shard_what_is_loaded)

    def _prepare(self, index: int, block: Any) -> None:
        """Sum its gradients, and note when it is run and which of its parameters are used."""
        block.set_gradient_divide_factor(1.0)  # a sum: the losses are weighted by their share already
        block.set_force_sum_reduction_for_comms(True)
        # ranks that use different parameters of a block still send the same
        block.set_reduce_scatter_unused_params(True, recurse=False)
        block.register_forward_pre_hook(lambda *_: self._ran(index))
        sharded = dict(block.named_parameters())
        block.unshard()
        for name, parameter in block.named_parameters():
            if not is_sharded(parameter) and (parameter.is_floating_point() or parameter.is_complex()):
                needed = parameter.requires_grad
                parameter.requires_grad_(True)  # a frozen one, which takes no hooks, may be trained later
                key = id(sharded[name])
                parameter.register_post_accumulate_grad_hook(lambda _, key=key: self._used.add(key))
                parameter.requires_grad_(needed)
        block.reshard()

    def _ran(self, index: int) -> None:
        if torch.is_grad_enabled():
            self._order.append(index)

    def _entry(self, name: str) -> Callable:
        """A method of the model that gathers what is not in a block, and is to be called by all ranks."""
        method = getattr(self._model, name)

        @functools.wraps(method)
        def entry(*args: Any, **options: Any) -> Any:
            if self._depth or self._is_gathered:
                return method(*args, **options)
            found = []

            def call() -> Any:
                found.append(method(*args, **options))
                # the backward pass begins at the loss, which torch therefore has to see
                return _loss_of(found[0]) if name == "train_step" else found[0]

            self._depth += 1
            try:
                self._model._run_gathered(call)
            finally:
                self._depth -= 1
            has_loss = name == "train_step" and _loss_of(found[0]) is not None
            if name == "train_step" and torch.is_grad_enabled():
                self._agree_on_step(has_loss)
            if not (has_loss and torch.is_grad_enabled()):
                self._model.reset_iter_state()  # as a backward pass would
            return found[0]

        return entry

    def _agree_on_step(self, has_loss: bool) -> None:
        """Raise an error on all ranks unless all have done the same: their backward passes would not meet."""
        order = zlib.crc32(repr(self._order).encode())
        self._order.clear()
        most, fewest, high, low = self._ranks.highest([has_loss, -int(has_loss), order, -order])
        name = f"{type(self._model).__name__}.train_step"
        if most != -fewest:
            raise ValueError(
                f"{name} skipped a batch on some ranks only, rank {self._ranks.rank} "
                f"{'did not' if has_loss else 'did'}: strategy='fsdp' needs all ranks to do the same: {_REMEDY}"
            )
        if high != -low:
            raise ValueError(
                f"{name} ran other blocks on some ranks, or in another order: strategy='fsdp' needs all ranks to do "
                f"the same: {_REMEDY}"
            )

    # ---- every update: what Reducers do for whole models ----

    def begin(self) -> None:
        """As Reducers.begin; there is nothing to forget."""

    def enter(self, idx: int, step: Callable[[], Any], is_last: bool) -> Any:
        """Run an optimizer's step for one batch of the window; every backward pass sums its gradients.

        Accumulating them on each rank, to be summed once, would take the memory of whole gradients.
        """
        return step()

    @property
    def scale(self) -> int:
        """What losses are multiplied with: gradients are summed, not averaged."""
        return 1

    def inputs(self, idx: int, parameters: list[nn.Parameter] | None) -> None:
        """None: a backward pass goes through gathered parameters, not these, and reaches all of them."""
        return None

    def summed(self, idx: int, losses: torch.Tensor, has_loss: bool) -> tuple[torch.Tensor, bool]:
        """After the window's last backward pass: the sum of losses, and whether any rank had one, on all ranks.

        Gradients of parameters that no rank has used become None, and so do those of other optimizers' parameters,
        which the loss has reached as well.

        Args:
            idx: the optimizer's.
            losses: this rank's sum.
            has_loss: whether this rank had one.
        """
        parameters = [p for p in parameters_of(self._optimizers[idx]) if p.requires_grad]
        present = [id(parameter) in self._used for parameter in parameters]
        self._used.clear()
        has_loss, *present = map(bool, self._ranks.highest([has_loss, *present]))
        if not has_loss:
            return losses, False
        kept = {id(p) for p, is_present in zip(parameters, present) if is_present}
        for parameter in self._model.parameters():
            if id(parameter) not in kept:
                parameter.grad = None
        return sum_over_ranks(losses, next(self._model.parameters())), True

    # ---- now and then ----

    def attach(self, optimizers: list["Optimizer"]) -> "Shards":
        """Take the optimizers, built over the sharded parameters, and let them load whole states; returns itself.

        Raises:
            ValueError: an optimizer that torch cannot compute on sharded parameters.
        """
        for optimizer in optimizers:
            name = type(optimizer).__name__
            is_torchs = isinstance(optimizer, torch.optim.Optimizer)
            fused = is_torchs and any(group.get("fused") for group in optimizer.param_groups)
            if not is_torchs or name in _UNSUPPORTED or (fused and name not in ("Adam", "AdamW")):
                raise ValueError(
                    f"strategy='fsdp' with {name}{', fused' * fused}: torch has it for whole parameters only; take "
                    f"AdamW, SGD or another that goes element by element, or {_REMEDY}"
                )
            optimizer.register_load_state_dict_pre_hook(_shard_optimizer_state)
        self._optimizers = optimizers
        return self

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside the block rank 0 has the whole model, and may run it alone, without gradients.

        All ranks must enter. It takes as much memory on rank 0 as the model has parameters.
        """
        with torch.no_grad():
            for block in self._blocks:
                block.unshard()
                if self._ranks.is_main:
                    block.set_reshard_after_forward(False, recurse=False)
                else:
                    block.reshard()
        self._is_gathered = True
        try:
            yield
        finally:
            self._is_gathered = False
            for block in self._blocks:
                block.set_reshard_after_forward(block is not self._model, recurse=False)
            # shard all of it, and forget what rank 0 has run: torch would prefetch by it
            self._model.reset_iter_state()


def _check(model: TrainerModel, device: torch.device, fsdp_module: type) -> None:
    name = type(model).__name__
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"strategy='fsdp' on {device.type}: sharding needs GPUs of NVIDIA or AMD, or CPUs: {_REMEDY}")
    if not hasattr(fsdp_module, "set_reduce_scatter_unused_params"):
        raise ValueError(f"strategy='fsdp' with torch {torch.__version__}: needs torch 2.13; upgrade it, or {_REMEDY}")
    if overrides(model, "optimize"):
        raise ValueError(
            f"strategy='fsdp' with {name}.optimize: it uses weights outside of train_step, where they are sharded; "
            f"give the losses in train_step, or {_REMEDY}"
        )
    if any(getattr(module, "sparse", False) for module in model.modules()):
        raise ValueError(f"strategy='fsdp' with sparse=True: such gradients cannot be sharded; leave it, or {_REMEDY}")


def _loss_of(result: Any) -> torch.Tensor | None:
    """The loss of what train_step returned; call_step says what is wrong with anything else."""
    losses = result[1] if isinstance(result, tuple | list) and len(result) == 2 else None
    return losses.get("loss") if isinstance(losses, dict) else None


def _shard_what_is_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: a module's own parameters in whole, sharded as the module's are."""
    for name, parameter in module._parameters.items():
        found = state.get(prefix + name)
        if parameter is not None and isinstance(found, torch.Tensor) and found.shape == parameter.shape:
            state[prefix + name] = shard_as(found, parameter)


def _shard_optimizer_state(optimizer: "Optimizer", state: dict[str, Any]) -> dict[str, Any]:
    """Before ``load_state_dict``: what has a parameter's shape is sharded as the parameter is."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    parameters = dict(zip(keys, own))

    def sharded(value: Any, key: int) -> Any:
        has_its_shape = isinstance(value, torch.Tensor) and value.shape == parameters[key].shape
        return shard_as(value, parameters[key]) if has_its_shape else value

    entries = {key: {k: sharded(v, key) for k, v in values.items()} for key, values in state["state"].items()}
    return {**state, "state": entries}

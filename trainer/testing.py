"""What the tests of a model file use: shapes, gradients, padding and learning of a layer, each checked in one call.

How a model file is tested. ``tests/models/test_<file>.py`` holds a dict ``LAYERS`` with a Case for every nn.Module
class that ``models/<file>.py`` defines, the model itself included:

    LAYERS = {
        "LayerNorm": Case(
            build=lambda: LayerNorm(8),
            inputs=lambda B, T: (torch.randn(B, 8, T),),
            shapes=lambda B, T: (B, 8, T),
            no_padding="works on each position alone",
        ),
        "FFN": Case(
            build=lambda: FFN(8, 16, 3),
            inputs=lambda B, T: (torch.randn(B, 8, T), mask(B, T)),
            shapes=lambda B, T: (B, 8, T),
            mask=1,
        ),
    }

``tests/models/test_every_layer.py`` finds the classes and runs the three checks of this module on every Case:
``check_case_shapes``, ``check_case_padding``, ``check_case_learns``. It fails for a class without a Case and for a Case
without a class. What a layer computes is tested beside ``LAYERS``, against a formula, a plain loop or another library.

All checks seed their random numbers and leave the caller's generator as it was.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trainer.config import TrainerArgs, TrainerConfig
from trainer.model import TrainerModel
from trainer.trainer import Trainer

GARBAGE = 1e3  # what padding is filled with: so large that the smallest leak shows
NO_GRADIENT = 1e-6  # a gradient that is smaller than this share of the layer's largest is rounding


def layers_of(module: ModuleType) -> dict[str, type[nn.Module]]:
    """The nn.Module classes that a module's file defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    }


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor of nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


def _shapes_in(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return [value]
    return [shape for item in value for shape in _shapes_in(item)]


def check_layer(
    layer: nn.Module,
    *inputs: Any,
    shapes: Any,
    no_grad_for: Mapping[str, str] | None = None,
    gradients: bool = True,
    call: Callable[..., Any] | None = None,
) -> Any:
    """Run a layer and check what comes out and what gradients come back.

    Args:
        layer: run as it is, in train or eval mode.
        inputs: its positional inputs.
        shapes: a tuple of sizes for one output; a list, nested as the outputs, for several.
        no_grad_for: parameters that rightly get no gradient, each with the reason.
        gradients: False checks the outputs alone.
        call: runs the layer, ``call(layer, *inputs)``; by default its forward.

    Returns:
        the outputs.

    Raises:
        AssertionError: an output has another shape or a value that is not finite; a parameter gets no gradient (or
            one that is not finite), or one of no_grad_for gets one.
    """
    name = type(layer).__name__
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = call(layer, *inputs) if call else layer(*inputs)
        found, expected = tensors_in(outputs), _shapes_in(shapes)
        if [tuple(tensor.shape) for tensor in found] != expected:
            raise AssertionError(f"{name}: outputs have shapes {[tuple(t.shape) for t in found]}, expected {expected}")
        for i, tensor in enumerate(found):
            if not torch.isfinite(tensor).all():
                count = int((~torch.isfinite(tensor)).sum())
                raise AssertionError(f"{name}: {count} of {tensor.numel()} values of output {i} are not finite")
        if gradients:
            # random weights: a plain sum would hide gradients that cancel, behind a normalisation for example
            objective = sum((t * torch.randn_like(t)).sum() for t in found if t.requires_grad)
            _check_gradients(layer, objective, no_grad_for or {})
    return outputs


def _check_gradients(layer: nn.Module, objective: Any, no_grad_for: Mapping[str, str]) -> None:
    name, parameters = type(layer).__name__, dict(layer.named_parameters())
    if unknown := no_grad_for.keys() - parameters.keys():
        raise AssertionError(f"{name}: no_grad_for names {sorted(unknown)}, which are no parameters")
    if not parameters:
        return
    if not isinstance(objective, torch.Tensor):
        raise AssertionError(f"{name}: no output depends on its parameters")
    gradients = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
    sizes = {key: 0.0 if g is None else float(g.abs().max()) for key, g in zip(parameters, gradients)}
    for key, size in sizes.items():
        if not size < float("inf"):  # NaN too
            raise AssertionError(f"{name}: the gradient of {key} is not finite")
        reached = size > NO_GRADIENT * max(sizes.values())
        if not reached and key not in no_grad_for:
            raise AssertionError(f"{name}: no gradient reaches {key} (largest {size:.2g}); is it used?")
        if reached and key in no_grad_for:
            raise AssertionError(f"{name}: {key} gets a gradient ({size:.2g}), not as said: {no_grad_for[key]}")


def check_padding(
    layer: nn.Module,
    *inputs: Any,
    mask: int,
    padded: Sequence[int] = (0,),
    more: int = 5,
    atol: float = 1e-5,
    call: Callable[..., Any] | None = None,
) -> None:
    """Check that padding changes nothing: neither its content nor how much there is of it.

    The layer sees the inputs as they are, then with garbage where the mask is 0 and with ``more`` masked positions of
    garbage behind. Both must agree where the mask is 1, and in outputs without positions.

    Args:
        layer: run in eval mode.
        inputs: its positional inputs; the positions are the last dimension.
        mask: which of the inputs is the mask, [B, 1, T].
        padded: which other inputs have the mask's positions.
        more: positions added.
        atol: largest difference, absolute: sums over a longer sequence may round differently.
        call: runs the layer, ``call(layer, *inputs)``; by default its forward.

    Raises:
        AssertionError: an output differs; names the layer, the output and the difference.
    """
    name, was_training = type(layer).__name__, layer.training
    layer.eval()
    valid = inputs[mask].bool()
    longer = list(inputs)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        longer[mask] = nn.functional.pad(inputs[mask], (0, more))
        for i in padded:
            longer[i] = _with_garbage(inputs[i], valid, more)
        run = call or (lambda layer, *values: layer(*values))
        for i, (a, b) in enumerate(zip(tensors_in(run(layer, *inputs)), tensors_in(run(layer, *longer)))):
            b = b[tuple(slice(size) for size in a.shape)]
            if a.dim() and a.size(-1) == valid.size(-1):
                a, b = a * valid.reshape(_as_dims(valid, a)), torch.where(valid.reshape(_as_dims(valid, a)), b, 0)
            difference = float((a - b).abs().max())
            if not difference <= atol:
                raise AssertionError(f"{name}: padding changes output {i} by {difference:.3g}, allowed is {atol:g}")
    layer.train(was_training)


def _as_dims(valid: torch.Tensor, like: torch.Tensor) -> tuple[int, ...]:
    return (valid.size(0), *[1] * (like.dim() - 2), valid.size(-1))


def _with_garbage(x: torch.Tensor, valid: torch.Tensor, more: int) -> torch.Tensor:
    """x with ``more`` positions behind, and other values than before wherever it is not valid."""
    x = nn.functional.pad(x, (0, more))
    valid = nn.functional.pad(valid, (0, more)).reshape(_as_dims(nn.functional.pad(valid, (0, more)), x))
    if x.is_floating_point():
        return torch.where(valid, x, GARBAGE * torch.randn_like(x))
    return torch.where(valid, x, x.amax() - x)  # other whole numbers in the same range: ids must stay ids


def overfit_one_batch(
    loss_fn: Callable[[], torch.Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    below: float,
    steps: int = 200,
    lr: float = 1e-2,
) -> list[float]:
    """Train with Adam on one batch until its loss is below a bound.

    Args:
        loss_fn: computes the loss of the one batch.
        parameters: what is trained.
        below: the bound.
        steps: updates that may be needed at most.
        lr: learning rate.

    Returns:
        the losses, one for each step done.

    Raises:
        AssertionError: the bound is not reached, or a loss is not finite.
    """
    parameters = list(parameters)
    optimizer, losses = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(steps):
        loss = loss_fn()
        losses.append(float(loss.detach()))
        if losses[-1] < below:
            return losses
        if not losses[-1] < float("inf"):
            raise AssertionError(f"the loss is {losses[-1]} in step {len(losses)}")
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
    best = min(losses)
    raise AssertionError(f"the loss went from {losses[0]:.4g} to {best:.4g} in {steps} steps, not below {below:g}")


# ---- one case for each layer ----


@dataclass(frozen=True)
class Case:
    """How one layer is built, called and checked; see the top of this file.

    Attributes:
        build: makes the layer.
        inputs: its positional inputs for a batch of B sequences of T positions.
        shapes: the shapes of its outputs, as for check_layer.
        sizes: pairs (B, T) to try; gradients and learning are checked with the last.
        mask: which input is the mask; then check_padding is run.
        padded: which other inputs have the mask's positions.
        no_padding: why there is nothing to check, for a layer without mask.
        call: runs the layer, where forward does not say what is to be checked (random outputs, for example).
        no_grad_for: parameters that rightly get no gradient, each with the reason.
        no_learning: why learning is not checked here: no parameters, or a test of its own.
        below: part of the first loss that must be left after learning.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple]
    shapes: Callable[[int, int], Any]
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (3, 1), (1, 9), (2, 12))
    mask: int | None = None
    padded: tuple[int, ...] = (0,)
    no_padding: str = ""
    call: Callable[..., Any] | None = None
    no_grad_for: Mapping[str, str] = field(default_factory=dict)
    no_learning: str = ""
    below: float = 0.1

    def make(self, B: int, T: int) -> tuple[nn.Module, tuple]:
        """A layer whose parameters are moved away from zeros and ones, which would hide gradients, and its inputs."""
        torch.manual_seed(0)
        return moved(self.build(), seed=1), self.inputs(B, T)


def moved(layer: nn.Module, seed: int, by: float = 0.1) -> nn.Module:
    """The layer with normal noise added to each parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return layer


def check_case_shapes(case: Case) -> None:
    """Output shapes and finite values at all sizes; at the last one a gradient for every parameter."""
    for size in case.sizes:
        with torch.random.fork_rng():
            layer, inputs = case.make(*size)
        is_last = size == case.sizes[-1]
        check_layer(
            layer,
            *inputs,
            shapes=case.shapes(*size),
            no_grad_for=case.no_grad_for,
            gradients=is_last,
            call=case.call,
        )


def check_case_padding(case: Case) -> None:
    """Padding changes nothing; a Case without mask says why there is nothing to check."""
    if case.mask is None:
        if not case.no_padding:
            raise AssertionError("the case has neither mask nor no_padding: name the mask, or say why there is none")
        return
    with torch.random.fork_rng():
        layer, inputs = case.make(*case.sizes[-1])
    check_padding(layer, *inputs, mask=case.mask, padded=case.padded, call=case.call)


def check_case_learns(case: Case, steps: int = 200) -> None:
    """The layer learns, on one batch, what a copy with other parameters gives: its gradients lead somewhere."""
    if case.no_learning:
        return
    with torch.random.fork_rng():
        layer, inputs = case.make(*case.sizes[-1])
        layer.eval()
        run = case.call or (lambda layer, *values: layer(*values))
        with torch.no_grad():
            goals = tensors_in(run(moved(copy.deepcopy(layer), seed=2), *inputs))

        def loss() -> torch.Tensor:
            return sum((a - b).square().mean() for a, b in zip(tensors_in(run(layer, *inputs)), goals))

        overfit_one_batch(loss, layer.parameters(), below=case.below * float(loss().detach()), steps=steps)


# ---- a whole model ----


def overfit_with_trainer(
    model: TrainerModel, config: TrainerConfig, folder: Path, *, below: float, loss: str = "loss", **data: Any
) -> dict[str, float]:
    """Train a model on one batch through the Trainer, as ``--overfit_batch`` does, and check that it learns it.

    Args:
        model: the model.
        config: decides how long it is trained.
        folder: where the run's folder is made.
        below: part of the loss that may be left.
        loss: name of the evaluation loss that is watched.
        data: samples or loaders for the Trainer.

    Returns:
        the evaluation's means after the training.

    Raises:
        AssertionError: the loss did not fall that far.
    """
    args = TrainerArgs(overfit_batch=True)
    trainer = Trainer(args, config, folder, model=model, parse_command_line_args=False, **data)
    before = trainer.evaluate()[loss]
    trainer.fit()
    after = trainer.keep_avg_eval.means
    if not after[loss] < below * before:
        steps = trainer.total_steps_done
        raise AssertionError(f"{loss} went from {before:.4g} to {after[loss]:.4g} in {steps} steps, not by {below:g}")
    return after

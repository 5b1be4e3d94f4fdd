"""BatchNorm over the batches of all ranks, where plain BatchNorm knows its own rank's batch alone.

torch.nn.SyncBatchNorm refuses the CPU, and knows of no rank whose batch counts for nothing (data.loader.Repeated). The
layers of a model are changed in place: parameters, buffers, hooks and state dicts stay what they are.

Shapes: N samples, C channels, R ranks; ... any number of dimensions, none too.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin


class BatchNormSync:
    """Changes a model's BatchNorm layers, so that they can look at the batches of all ranks (see over_ranks).

    Args:
        model: with nn.BatchNorm1d, 2d or 3d; subclasses with a forward of their own have to call ``super().forward``.

    Attributes:
        layers: the BatchNorm layers; each one's class is a subclass of what it was.

    Raises:
        ValueError: the model has no BatchNorm, or one that cannot be changed.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        if not found:
            raise ValueError(f"sync_batchnorm=True: {type(model).__name__} has no BatchNorm layer; set it to False")
        for name, layer in found.items():
            if isinstance(layer, LazyModuleMixin) or not _ends_in_batch_norm(type(layer)):
                raise ValueError(
                    f"sync_batchnorm=True: {name} is a {type(layer).__name__}, whose statistics cannot be those of all "
                    "ranks: build it from nn.BatchNorm1d, 2d or 3d, or set sync_batchnorm to False"
                )
        self.layers: list[_SyncBatchNorm] = list(found.values())  # type: ignore[arg-type]
        for layer in self.layers:
            layer.__class__ = _synchronized(type(layer))
        self._group: Any = None

    @contextlib.contextmanager
    def over_ranks(self, is_counted: bool) -> Iterator[None]:
        """Inside the block, layers in training mode compute their statistics over all ranks; all ranks must enter it.

        Elsewhere they are plain: what one rank does alone (train_log, say) would wait for the others. The block has to
        contain the backward pass too, in which activation checkpointing computes layers again.

        Args:
            is_counted: whether this rank's batch is part of the statistics. One that is not is normalized by them.
        """
        if self._group is None:
            # not the gradients' group, whose buckets become ready in another order where ranks use other parameters
            self._group = dist.new_group()
        for layer in self.layers:
            layer.sync = self._group, is_counted
        try:
            yield
        finally:
            for layer in self.layers:
                layer.sync = None


def _ends_in_batch_norm(kind: type[_BatchNorm]) -> bool:
    """Whether the class's forward is _BatchNorm's, or asks for it by super()."""
    is_own = kind.forward is not _BatchNorm.forward
    return not is_own or {"super", "forward"} <= set(kind.forward.__code__.co_names)


@functools.cache
def _synchronized(kind: type[_BatchNorm]) -> type:
    """The class, with _SyncBatchNorm in place of its base class _BatchNorm."""
    return type(f"Sync{kind.__name__}", (kind, _SyncBatchNorm), {})


class _SyncBatchNorm(_BatchNorm):
    """What a BatchNorm layer becomes."""

    sync: tuple[Any, bool] | None = None  # the process group, and whether this rank's batch is counted

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize ``input [N, C, ...]``."""
        if not self.training or self.sync is None:
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(f"BatchNorm of {self.num_features} channels got {input.shape[1]}: {list(input.shape)}")
        group, is_counted = self.sync
        with torch.no_grad():
            mean, variance, count = _joint_statistics(input, is_counted, group)
            if self.track_running_stats:
                self._follow(mean, variance * (count / (count - 1)))
        return _Normalize.apply(input, self.weight, self.bias, mean, variance, count, self.eps, is_counted, group)

    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            # momentum=None: the mean over all batches
            share = 1 / self.num_batches_tracked.to(running.dtype) if self.momentum is None else self.momentum
            running.lerp_(new.to(running.dtype), share)


def _joint_statistics(x: torch.Tensor, is_counted: bool, group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [C], biased variance [C] and number of values [] of each channel over the ranks, at least in fp32.

    All ranks get bitwise the same. Each rank's mean and sum of squared deviations are merged (Chan et al. 1979): sums
    of squares of values far from zero would cancel.

    Raises:
        ValueError: no channel has two values.
    """
    channels, values = x.shape[1], x.numel() // x.shape[1]
    mine = x.new_zeros(2 * channels + 1, dtype=_wide(x))
    if is_counted and values:
        variance, mean = torch.var_mean(x.to(mine.dtype), _all_but_channels(x), correction=0)
        mine = torch.cat([mean, variance * values, mine.new_full((1,), values)])
    everyones = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(everyones.unbind()), mine, group=group)
    means_RC, squares_RC, counts_R1 = everyones.split([channels, channels, 1], dim=1)
    count = counts_R1.sum()
    mean = (counts_R1 * means_RC).sum(0) / count
    squares = (squares_RC + counts_R1 * (means_RC - mean) ** 2).sum(0)
    # a rank that has two values knows the answer; the others have to wait for the device
    if (values < 2 or not is_counted) and count < 2:
        raise ValueError(f"one value for each channel on all ranks, input {list(x.shape)}: take more samples")
    return mean, squares / count, count


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, where mean and variance are functions of all ranks' x.

    Gradients of weight and bias are this rank's part, as of any other parameter: someone sums them over the ranks. With
    inverse_std = 1 / sqrt(variance + eps), xhat = (x - mean) * inverse_std, and n values of a channel on all ranks, x's
    gradient is ``weight * inverse_std * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)``, with the sums over all ranks:
    the second and third term come through mean and variance, and so are missing for values that do not enter these.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count, eps, is_counted, group):
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.is_counted, ctx.group = is_counted, group
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        return nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        xhat = (x - _along(mean, x)).mul_(_along(inverse_std, x))
        dy, dims = dy.to(xhat.dtype), _all_but_channels(x)
        sums_2C = torch.stack([dy.sum(dims), (dy * xhat).sum(dims)])
        d_bias, d_weight = sums_2C.clone()
        d_x = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums_2C, group=ctx.group)
            scale = inverse_std if weight is None else inverse_std * weight
            d_x = dy * _along(scale, x)
            if ctx.is_counted:
                through_mean, through_std = scale * sums_2C / count
                d_x.sub_(_along(through_mean, x)).addcmul_(xhat, _along(through_std, x), value=-1)
            d_x = d_x.to(x.dtype)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return d_x, d_weight if needs_weight else None, d_bias if needs_bias else None, *[None] * 6


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_but_channels(x: torch.Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _along(values_C: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values of each channel, in a shape that goes with x."""
    return values_C.view(1, -1, *[1] * (x.dim() - 2))

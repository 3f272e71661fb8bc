"""The rows of a batch that is split among processes: BatchNorm over all of them, and all of them in every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def of_all(own: Tensor) -> Tensor:
    """The rows of every process, in each of them. Where one has fewer than another, its last row comes twice."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return own
    most = torch.tensor(len(own))
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    rows = torch.cat([own, own[-1:].expand(int(most) - len(own), *own.shape[1:])]).contiguous()
    every = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, rows)
    return torch.cat(every)


class _Gathered(torch.autograd.Function):
    """Every process's ``(n,)``, as ``(processes, n)``; gradients go back to the process that each row is from."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        rows = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(rows, own)
        return torch.stack(rows)

    @staticmethod
    @once_differentiable  # a second derivative would miss what the others' statistics owe to this process
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous().clone()
        distributed.all_reduce(whole)
        return whole[distributed.get_rank()]


def _normalized(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What the layer gives; in train mode by the mean and variance over all processes, found from those of each in one exchange.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", The American
    Statistician, 1983.
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    channels, wide = x.shape[1], x.float()
    dims = [0, *range(2, x.dim())]
    own = torch.full((1,), x.numel() / channels, device=x.device)
    counts, means, variances = _Gathered.apply(torch.cat([own, wide.mean(dims), wide.var(dims, correction=0)])).split(
        (1, channels, channels), 1
    )
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    if norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean, weight)
            norm.running_var.lerp_(variance * count / (count - 1), weight)
    shape = (1, channels, *[1] * len(dims[1:]))
    scale = (variance + norm.eps).rsqrt()
    y = (wide - mean.view(shape)) * (scale if norm.weight is None else scale * norm.weight).view(shape)
    return (y if norm.bias is None else y + norm.bias.view(shape)).to(x.dtype)


@contextmanager
def synchronized(net: nn.Module) -> Iterator[None]:
    """Within the block, the network's BatchNorm layers that are in train mode see the rows of all processes.

    The modules stay as they are: whoever holds one of them, or its parameters, holds the right one.
    """
    layers = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.forward = partial(_normalized, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward

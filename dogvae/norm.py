"""Batch normalisation over the batches of all ranks, on any device: torch's own refuses CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; so is its gradient, for every rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that trains on the statistics of the global batch, of which a rank's slice may be empty.

    With `groups` = k, each k-th of the batch, in order, is normalised by its own statistics, as in k calls.
    """

    groups = 1

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Normalised over ranks, batch and pixels; the same shape and type."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if not self.training or (world_size == 1 and self.groups == 1):
            return super().forward(x_bchw)
        x = x_bchw.float().unflatten(0, (self.groups, -1 if len(x_bchw) else 0))
        n = x[0, :, 0].numel()
        total = x.sum(dim=(1, 3, 4))
        mean = total / max(n, 1)
        spread = (x - mean[:, None, :, None, None]).square().sum(dim=(1, 3, 4))
        # In double, so that recovering the variance from sums of squares loses nothing.
        squares = spread.double() + n * mean.double().square()
        count = torch.full_like(squares, n)
        sums = torch.stack([total.double(), squares, count])
        if world_size > 1:
            sums = _AllReduce.apply(sums)
        every = sums[2].detach()
        mean_all = sums[0] / every
        var = sums[1] / every - mean_all.square()
        self._track(mean_all.detach().float(), (var.detach() * every / (every - 1)).float())
        scale = (self.weight * (var + self.eps).rsqrt()).float()
        shift = self.bias - mean_all.float() * scale
        out = x * scale[:, None, :, None, None] + shift[:, None, :, None, None]
        return out.flatten(0, 1).to(x_bchw.dtype)

    def _track(self, means_gc: Tensor, variances_gc: Tensor) -> None:
        """Move the running statistics, group by group."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        for mean, variance in zip(means_gc, variances_gc, strict=True):
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)

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
    """`nn.BatchNorm2d` that trains on the statistics of the global batch, of which a rank's slice may be empty."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Normalised over ranks, batch and pixels; the same shape and type."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x_bchw)
        x = x_bchw.float()
        n = x.numel() // x.shape[1]
        total = x.sum(dim=(0, 2, 3))
        mean = total / max(n, 1)
        spread = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        # In double, so that recovering the variance from sums of squares loses nothing.
        squares = spread.double() + n * mean.double().square()
        count = torch.full((1,), n, dtype=torch.float64, device=x.device)
        sums = _AllReduce.apply(torch.cat([total.double(), squares, count]))
        channels = x.shape[1]
        every = sums[-1].detach()
        mean_all = sums[:channels] / every
        var = sums[channels:-1] / every - mean_all.square()
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_all.detach().float(), self.momentum)
            self.running_var.lerp_((var.detach() * every / (every - 1)).float(), self.momentum)
        scale = (self.weight * (var + self.eps).rsqrt()).float()
        shift = self.bias - mean_all.float() * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x_bchw.dtype)

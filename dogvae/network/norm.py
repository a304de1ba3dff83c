"""Batch normalisation over the batches of all ranks, on any device: torch's own refuses CPU tensors.

The passes over the images are torch's own kernels of batch norm, which are fused; what is between them, a few numbers
a channel, is summed up over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Normalize(torch.autograd.Function):
    """Training-mode batch norm of the global batch, in groups; also gives each group's mean and unbiased variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
        parts = _split(x, groups)
        sums = torch.stack([_sums(part, weight) for part in parts])
        dist.all_reduce(sums)
        count, total, squares = sums.unbind(1)
        mean = total / count
        var = squares / count - mean.square()
        ctx.save_for_backward(x, weight, count, mean, var)
        ctx.groups, ctx.eps = groups, eps
        stats = zip(parts, mean.to(weight.dtype), var.to(weight.dtype), strict=True)
        y = _join([F.batch_norm(part, m, v, weight, bias, eps=eps) for part, m, v in stats])
        unbiased = var * count / (count - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dx = weight / std * (dy - mean(dy) - x_hat * mean(dy * x_hat)), with means over all ranks."""
        x, weight, count, mean, var = ctx.saved_tensors
        xs, dys = _split(x, ctx.groups), _split(gradients[0], ctx.groups)
        std = (var + ctx.eps).sqrt()
        stats = [(m.to(weight.dtype), v.to(weight.dtype)) for m, v in zip(mean, var, strict=True)]
        sums = torch.zeros((ctx.groups, 2, len(weight)), dtype=torch.float64, device=x.device)  # of dy * x_hat, and dy
        for total, part, dy, (m, v) in zip(sums, xs, dys, stats, strict=True):
            if len(part):
                # CUDA's kernel takes the inverse standard deviation wherever it is given; the CPU's computes its own.
                invstd = (v + ctx.eps).rsqrt()
                _, *mine = torch.ops.aten.native_batch_norm_backward(
                    dy, part, weight, m, v, m, invstd, False, ctx.eps, [False, True, True]
                )
                total.copy_(torch.stack(mine))
        own = sums.sum(dim=0).to(weight.dtype)
        dist.all_reduce(sums)
        # As a function of dy and x, for each channel: dx = slope * dy + lean * x + shift.
        slope = weight / std
        lean = -slope / std * sums[:, 0] / count
        shift = -slope * sums[:, 1] / count - lean * mean
        nothing, unit = torch.zeros_like(weight), torch.ones_like(weight)
        leaning = [
            F.batch_norm(part, nothing, unit, a.to(weight.dtype), b.to(weight.dtype), eps=0.0)
            for part, a, b in zip(xs, lean, shift, strict=True)
        ]
        slopes = slope.to(weight.dtype)[:, :, None, None]
        dx = _join([part.addcmul_(dy, a) for part, dy, a in zip(leaning, dys, slopes, strict=True)])
        return dx, own[0], own[1], None, None


class SyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that trains on the statistics of the global batch, of which a rank's slice may be empty.

    With `groups` = k, each k-th of the batch, in order, is normalised by its own statistics, as in k calls.
    """

    groups = 1

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Normalised over ranks, batch and pixels; the same shape and type."""
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self.training or (alone and self.groups == 1):
            return super().forward(x_bchw)
        if alone:
            return _join([super(SyncBatchNorm, self).forward(part) for part in _split(x_bchw, self.groups)])
        y, means, variances = _Normalize.apply(x_bchw, self.weight, self.bias, self.groups, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        for mean, variance in zip(means.float(), variances.float(), strict=True):
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return y


def _sums(x_bchw: Tensor, weight: Tensor) -> Tensor:
    """Count, sum and sum of squares of each channel, (3, c) float64."""
    n = x_bchw[:, 0].numel()
    if n == 0:
        return torch.zeros((3, len(weight)), dtype=torch.float64, device=x_bchw.device)
    # Running statistics are given only so that those of this batch come in their type, not in bfloat16.
    mean, var = torch.ops.aten.batch_norm_update_stats(x_bchw, torch.zeros_like(weight), torch.ones_like(weight), 0.0)
    mean, var = mean.double(), var.double()
    # In double, recovering the variance from sums of squares loses nothing.
    return n * torch.stack([torch.ones_like(mean), mean, var + mean.square()])


def _split(x_bchw: Tensor, groups: int) -> tuple[Tensor, ...]:
    return x_bchw.unflatten(0, (groups, -1 if len(x_bchw) else 0)).unbind()


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]

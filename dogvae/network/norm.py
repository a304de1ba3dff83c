"""Batch normalisation over the global batch of all ranks, on any device: torch's SyncBatchNorm refuses CPU tensors.

torch's fused batch norm kernels process the images; a few sums per channel are added up over ranks between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _Normalize(torch.autograd.Function):
    """Training-mode batch norm of the global batch, whose samples form `groups` that are normalised separately.

    x is (b, c, h, w); returns y of the same shape, and each group's mean and unbiased variance, (groups, c) float64.
    """

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
        """dx = weight / std * (dy - mean(dy) - x_hat * mean(dy * x_hat)), where the means are over all ranks."""
        x, weight, count, mean, var = ctx.saved_tensors
        xs, dys = _split(x, ctx.groups), _split(gradients[0], ctx.groups)
        std = (var + ctx.eps).sqrt()
        stats = [(m.to(weight.dtype), v.to(weight.dtype)) for m, v in zip(mean, var, strict=True)]
        sums = torch.zeros((ctx.groups, 2, len(weight)), dtype=torch.float64, device=x.device)  # of dy * x_hat, and dy
        for total, part, dy, (m, v) in zip(sums, xs, dys, stats, strict=True):
            if len(part):
                # CUDA's kernel uses the inverse standard deviation that it is given; the CPU's computes it itself.
                invstd = (v + ctx.eps).rsqrt()
                _, *sums_here = torch.ops.aten.native_batch_norm_backward(
                    dy, part, weight, m, v, m, invstd, False, ctx.eps, [False, True, True]
                )
                total.copy_(torch.stack(sums_here))
        weight_grad, bias_grad = sums.sum(dim=0).to(weight.dtype)
        dist.all_reduce(sums)
        # For each channel: dx = dy_factor * dy + x_factor * x + shift.
        dy_factor = weight / std
        x_factor = -dy_factor / std * sums[:, 0] / count
        shift = -dy_factor * sums[:, 1] / count - x_factor * mean
        zero, one = torch.zeros_like(weight), torch.ones_like(weight)
        terms_of_x = [  # batch norm with mean 0 and variance 1: a fused x_factor * x + shift
            F.batch_norm(part, zero, one, a.to(weight.dtype), b.to(weight.dtype), eps=0.0)
            for part, a, b in zip(xs, x_factor, shift, strict=True)
        ]
        dy_factors = dy_factor.to(weight.dtype)[:, :, None, None]
        dx = _join([part.addcmul_(dy, a) for part, dy, a in zip(terms_of_x, dys, dy_factors, strict=True)])
        return dx, weight_grad, bias_grad, None, None


class SyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that trains on the statistics of the global batch; a rank's slice may be empty.

    With `groups` = k the batch is cut into k equal parts, each normalised by its own statistics, as in k calls.
    """

    groups = 1

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Normalise (b, c, h, w) over ranks, batch and pixels; shape and dtype stay."""
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
    """Count, sum and sum of squares of each channel: (3, c) float64."""
    n = x_bchw[:, 0].numel()
    if n == 0:
        return torch.zeros((3, len(weight)), dtype=torch.float64, device=x_bchw.device)
    # The running statistics passed here only make the kernel return float32, not the bfloat16 of the batch.
    mean, var = torch.ops.aten.batch_norm_update_stats(x_bchw, torch.zeros_like(weight), torch.ones_like(weight), 0.0)
    mean, var = mean.double(), var.double()
    # In float64 the variance can be recovered from the sum of squares without loss.
    return n * torch.stack([torch.ones_like(mean), mean, var + mean.square()])


def _split(x_bchw: Tensor, groups: int) -> tuple[Tensor, ...]:
    return x_bchw.unflatten(0, (groups, -1 if len(x_bchw) else 0)).unbind()


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]

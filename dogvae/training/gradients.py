"""The gradients of a step, added up over all ranks while the backward pass runs.

Not by DistributedDataParallel: it arranges its buckets anew after the first step. The gradients of three and more ranks
would then be added up in another order in a process that has just started than in one that has not. Here the order is
the same in every step, and one tensor leaves at a time, in float32, whatever the precision of the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

GROUP_BYTES = 8 << 20  # of float32 gradients that leave together; the default network has 14 MB of them


class Gradients:
    """Collects the gradients of parameters as backward computes them; on all ranks the same parameters in one order.

    Backward comes to the last parameters first. So they form the first group. A group leaves when all of its gradients
    are there and the groups before it have left.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world_size: int) -> None:
        self._parameters = list(parameters)
        self.world_size = world_size
        """Set to 1, gradients stay on this rank: to measure what their exchange takes."""
        self._groups: list[list[nn.Parameter]] = []
        most = GROUP_BYTES if world_size > 1 else math.inf
        size = most
        for p in reversed(self._parameters):
            if size >= most:
                self._groups.append([])
                size = 0
            self._groups[-1].append(p)
            size += 4 * p.numel()
        self._group_of = {p: number for number, group in enumerate(self._groups) for p in group}
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self._arrived)
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(group) for group in self._groups]
        self._left: list[tuple[Tensor, dist.Work | None]] = []

    def _arrived(self, p: Tensor) -> None:
        self._missing[self._group_of[p]] -= 1  # type: ignore[index]  # a hook gets the parameter itself
        while len(self._left) < len(self._groups) and not self._missing[len(self._left)]:
            self._leave()

    def _leave(self) -> None:
        group = self._groups[len(self._left)]
        flat = torch.cat([flatten(torch.zeros_like(p) if p.grad is None else p.grad, p) for p in group]).float()
        self._left.append((flat, dist.all_reduce(flat, async_op=True) if self.world_size > 1 else None))

    def take(self) -> list[Tensor]:
        """The gradients in the order of the parameters, float32, with their strides; zeros for unused parameters.

        A gradient is the sum over all ranks. To be called after each backward pass.
        """
        while len(self._left) < len(self._groups):
            self._leave()
        gradients: dict[nn.Parameter, Tensor] = {}
        for group, (flat, work) in zip(self._groups, self._left, strict=True):
            if work:
                work.wait()  # on a GPU its stream waits, not the host
            gradients |= zip(group, unflatten(flat, group), strict=True)
        for p in self._parameters:
            p.grad = None
        self._begin()
        return [gradients[p] for p in self._parameters]


def flatten(t: Tensor, like: Tensor) -> Tensor:
    """The elements of a tensor (n,) in the order in which `like`, of the same shape, has them in memory.

    A view if `t` has the strides of `like`.
    """
    return (t.permute(0, 2, 3, 1) if _innermost(like) else t).reshape(-1)


def unflatten(flat: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Views of the parts of `flat` with the shapes and strides of `like`: the inverse of `flatten` and `torch.cat`."""
    like = list(like)
    parts = flat.split([t.numel() for t in like])
    return [
        part.view([t.shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2) if _innermost(t) else part.view(t.shape)
        for part, t in zip(parts, like, strict=True)
    ]


def _innermost(t: Tensor) -> bool:
    """Whether the channels of a tensor are innermost in memory."""
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)

"""The exponential moving average of a network's weights; a tensor can call an update off without a word to the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Moves averaged weights towards the weights: average += share * (weight - average).

    With `fused`, by one kernel for all weights. It is that of gradient ascent with weight decay 1, in which the weights
    take the gradients' place: average -= lr * (average - weight).
    """

    def __init__(self, averages: nn.Module, weights: nn.Module, fused: bool) -> None:
        self._pairs = list(zip(averages.parameters(), [p.detach() for p in weights.parameters()], strict=True))
        self._sgd: torch.optim.SGD | None = None
        if fused:
            self._sgd = torch.optim.SGD(averages.parameters(), weight_decay=1.0, maximize=True, fused=True)
            for average, weight in self._pairs:
                average.grad = weight

    @torch.no_grad()
    def update(self, share: float, skipped: Tensor) -> None:
        """Move by `share`; where `skipped` () is 1, not at all."""
        if self._sgd:
            (group,) = self._sgd.param_groups
            group["lr"] = share
            self._sgd.found_inf = skipped  # type: ignore[attr-defined]  # as in dogvae/training/optimizer.py
            self._sgd.step()
            return
        left = (1 - skipped) * share
        for average, weight in self._pairs:
            average.lerp_(weight, left)

"""The exponential moving average of a network's weights; a tensor can call an update off without a word to the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd


class Average:
    """Moves averaged weights towards the weights: average += share * (weight - average).

    With `fused`, by one kernel for all weights. It is that of gradient ascent with weight decay 1, in which the weights
    take the gradients' place: average -= lr * (average - weight).
    """

    def __init__(self, averages: nn.Module, weights: nn.Module, fused: bool) -> None:
        self._averages: list[Tensor] = list(averages.parameters())
        self._weights = [p.detach() for p in weights.parameters()]
        self._fused = fused

    @torch.no_grad()
    def update(self, share: float, skipped: Tensor) -> None:
        """Move by `share`; where `skipped` () is 1, not at all."""
        if self._fused:
            sgd(
                self._averages,
                self._weights,
                momentum_buffer_list=[None] * len(self._averages),
                fused=True,
                found_inf=skipped,
                weight_decay=1.0,
                momentum=0.0,
                lr=share,
                dampening=0.0,
                nesterov=False,
                maximize=True,
            )
            return
        left = (1 - skipped) * share
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.lerp_(weight, left)

"""Adam on named weights, whose step a tensor can call off without a word to the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """Adam (Kingma & Ba 2015) by torch's fused kernel, with the state by names that are the same on every rank.

    By torch's function, not its class `torch.optim.Adam`: that imports torch's compiler, which takes a second.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._moments = {
            moment: {name: torch.zeros_like(p) for name, p in self._parameters.items()} for moment in MOMENTS
        }
        self._updates = [torch.zeros((), device=p.device) for p in self._parameters.values()]

    @torch.no_grad()
    def step(self, lr: float, skipped: Tensor) -> None:
        """Update the weights by their gradients; where `skipped` () is 1, weights and state stay as they are."""
        weights = list(self._parameters.values())
        adam(
            weights,
            [p.grad for p in weights if p.grad is not None],
            exp_avgs=list(self._moments["exp_avg"].values()),
            exp_avg_sqs=list(self._moments["exp_avg_sq"].values()),
            max_exp_avg_sqs=[],
            state_steps=self._updates,
            fused=True,
            found_inf=skipped,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """The moments of each weight as `exp_avg/NAME` and `exp_avg_sq/NAME`, and `updates` (), how many were made."""
        moments = {f"{moment}/{name}": t for moment, tensors in self._moments.items() for name, t in tensors.items()}
        return {**moments, "updates": self._updates[0]}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for moment, tensors in self._moments.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{moment}/{name}"])
        for updates in self._updates:
            updates.copy_(state["updates"])

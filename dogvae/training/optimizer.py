"""Adam on named weights, whose step a tensor can call off without a word to the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """Adam (Kingma & Ba 2015) by torch's fused kernel, with the state by names that are the same on every rank."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._torch = torch.optim.Adam(self._parameters.values(), betas=BETAS, eps=EPS, fused=True)
        # torch makes the state at the first step; here it is there from the start, so that `load` can fill it.
        states = [
            {"step": torch.zeros((), device=p.device), **{moment: torch.zeros_like(p) for moment in MOMENTS}}
            for p in self._parameters.values()
        ]
        groups = self._torch.state_dict()["param_groups"]
        self._torch.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})

    def step(self, lr: float, skipped: Tensor) -> None:
        """Update the weights by their gradients; where `skipped` () is 1, weights and state stay as they are."""
        (group,) = self._torch.param_groups
        group["lr"] = lr
        # The name that torch.amp.GradScaler uses to call a step off on the device.
        self._torch.found_inf = skipped  # type: ignore[attr-defined]
        self._torch.step()

    def state(self) -> dict[str, Tensor]:
        """The moments of each weight as `exp_avg/NAME` and `exp_avg_sq/NAME`, and `updates` (), how many were made."""
        of = self._torch.state
        moments = {f"{moment}/{name}": of[p][moment] for moment in MOMENTS for name, p in self._parameters.items()}
        return {**moments, "updates": of[next(iter(self._parameters.values()))]["step"]}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, p in self._parameters.items():
            for moment in MOMENTS:
                self._torch.state[p][moment].copy_(state[f"{moment}/{name}"])
            self._torch.state[p]["step"].copy_(state["updates"])

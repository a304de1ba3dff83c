"""What the steps of an epoch add up to: the numbers behind its training loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

OF_ALL = ("gradient_norm", "skipped_steps")  # the same on every rank; before them come sums over a rank's images


class EpochSums:
    """Sums over the steps of an epoch on one rank, float64, on the device; skipped steps count as such only."""

    def __init__(self, device: torch.device, terms: tuple[str, ...]) -> None:
        self.terms = terms
        self._sums = torch.zeros(1 + len(terms) + len(OF_ALL), dtype=torch.float64, device=device)
        self._skip = torch.tensor([*[0.0] * (len(self._sums) - 1), 1.0], device=device)  # what a skipped step adds
        self._counts: dict[int, Tensor] = {}

    def add(self, images: int, losses: Tensor, gradient_norm: Tensor, skipped: Tensor) -> None:
        """Add a step. `losses` are the sums of its `terms` over this rank's images; `skipped` () is a bool."""
        if images not in self._counts:  # an epoch has two: of full batches, and of the last one
            # Filled on the device: a number from the host would make it wait.
            self._counts[images] = torch.full((1,), images, dtype=torch.float32, device=losses.device)
        taken = torch.cat([self._counts[images], losses, gradient_norm[None], self._skip[:1]])
        self._sums += torch.where(skipped, self._skip, taken)

    def over_ranks(self) -> Tensor:
        """The sums over all ranks, of images, terms and OF_ALL, as a checkpoint keeps them; every rank must call it."""
        sums = self._sums.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            of_a_rank = sums[: -len(OF_ALL)].clone()
            dist.all_reduce(of_a_rank)
            sums[: -len(OF_ALL)] = of_a_rank
        return sums

    def load(self, sums: Tensor, rank: int) -> None:
        """Take over what `over_ranks` gave: rank 0 carries the sums of all ranks."""
        self._sums.copy_(sums)
        if rank > 0:
            self._sums[: -len(OF_ALL)] = 0

    def clear(self) -> None:
        """Begin an epoch."""
        self._sums.zero_()

    def described(self, sums: Tensor, steps: int) -> dict[str, float]:
        """The record of an epoch of `steps` steps from `over_ranks`: means per image, and per step taken."""
        of = dict(zip(("images", *self.terms, *OF_ALL), sums.tolist(), strict=True))
        nan = float("nan")  # of an epoch without a single step that was taken
        means = {f"train_{name}": of[name] / of["images"] if of["images"] else nan for name in self.terms}
        taken = max(1, steps - int(of["skipped_steps"]))
        return {**means, "gradient_norm": of["gradient_norm"] / taken, "skipped_steps": int(of["skipped_steps"])}

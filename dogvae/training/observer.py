"""What the loop tells the outside, and what it asks."""

from __future__ import annotations

from typing import Any


class Observer:
    """What the loop tells the outside, and asks it; the base class is deaf and never stops."""

    wants_saved = False
    """Whether an epoch is to be on the storage before it is told: who hears of it may end the process."""

    def progress(self, epoch: int, step: int, steps: int) -> None:
        """Rank 0, after each step: `step` of `steps` of this epoch are done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Every rank, after each epoch: its record, the same on all ranks."""

    def note(self, line: str) -> None:
        """Any rank: something that went wrong, or well again, without stopping the run."""

    def stopping(self) -> bool:
        """Any rank, before each step: whether to save and stop. Must be cheap."""
        return False

    def preempted(self) -> bool:
        """All ranks together, now and then: whether a node is about to go."""
        return False

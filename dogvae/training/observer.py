"""The connection between the training loop and the outside."""

from __future__ import annotations

from typing import Any


class Observer:
    """Callbacks of the loop. This base class ignores all events and never asks to stop."""

    wants_saved = False
    """Whether to write checkpoint and metrics of an epoch before `epoch` is called, which may end the process."""

    def progress(self, epoch: int, step: int, steps: int) -> None:
        """Called on rank 0 after each step: `step` of `steps` steps of this epoch (from 0) are done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Called on every rank after each epoch, with the same record on all ranks."""

    def note(self, line: str) -> None:
        """Called on any rank with a line for the user: a problem that does not end the run, or its end."""

    def stopping(self) -> bool:
        """Called on every rank between steps; must be cheap. If true on any rank, the loop saves and stops."""
        return False

    def preempted(self) -> bool:
        """Called on all ranks together, about once a second: whether a node is about to leave the cluster."""
        return False

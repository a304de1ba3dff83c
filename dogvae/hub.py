"""What the driver and the workers say to each other while a run goes on.

Of its own, without torch: the actor starts before the workers, and every second of its imports delays them.
"""

from __future__ import annotations

from typing import Any


class Hub:
    """An actor beside the driver: events on their way from the workers to it, and its wish to stop on its way back."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []
        self._stopping = False

    def tell(self, *event: Any) -> None:
        """Add an event."""
        self._events.append(event)

    def take(self) -> list[tuple[Any, ...]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """From now on `stopping` is true."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether the run is to be saved and stopped."""
        return self._stopping

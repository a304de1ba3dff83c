"""What the driver and the workers say to each other while a run goes on.

Of its own, without torch: the actor starts before the workers, and every second of its imports delays them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Hub:
    """An actor beside the driver: events on their way from the workers to it, and its wish to stop on its way back."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []
        self._stopping = False
        self._failure = ""

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

    def fail(self, reason: str) -> None:
        """A worker cannot go on, and no other attempt could: an event of its own, and what `failure` says."""
        self._failure = reason
        self.tell("failed", reason)

    def failure(self) -> str:
        """Why no attempt makes sense; empty while one does."""
        return self._failure

    def stopping(self) -> bool:
        """Whether the run is to be saved and stopped."""
        return self._stopping


def make_hub() -> Any:
    """A hub on this node, which needs no CPU: the handle of its actor."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Hub).options(num_cpus=0, scheduling_strategy=here).remote()


def in_background(action: Callable[[], T]) -> Future[T]:
    """Run what Ray would keep the main thread busy with: that one is to hear signals, and to end without waiting."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  (whoever asks for the result gets it)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

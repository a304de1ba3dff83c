"""What the workers and the command say to each other while a run goes on.

In a file of its own, without torch: the actor starts before the workers, and what it imports delays them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Events:
    """An actor beside the command. Events go from the workers to the command; the wish to stop goes back.

    An event is a tuple of its kind and what belongs to it: `progress` (epoch, step, steps), `epoch` (record),
    `note` (line), `failure` (first line of each lost rank's error, by rank), `failed` (reason).
    """

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
        """Ask the run to save a checkpoint and stop."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether the run is to save a checkpoint and stop."""
        return self._stopping

    def fail(self, reason: str) -> None:
        """No attempt can go on: adds a `failed` event, and `failure` returns the reason from now on."""
        self._failure = reason
        self.tell("failed", reason)

    def failure(self) -> str:
        """Why no further attempt makes sense; empty while one does."""
        return self._failure


def start_events() -> Any:
    """Start the actor on this node, where it takes no CPU; returns its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Events).options(num_cpus=0, scheduling_strategy=here).remote()


def in_background(action: Callable[[], T]) -> Future[T]:
    """Run `action` in a daemon thread, so that the main thread can handle signals and exit at once."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  (whoever asks for the result gets it)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

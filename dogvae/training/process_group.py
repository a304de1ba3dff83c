"""Ray Train's process group of all workers, as this project wants it, and what Ray Train reports of lost workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train import UserCallback
from ray.train.torch import TorchConfig

TIMEOUT_S = 300  # a worker that does not answer for so long is lost; a death is noticed at once


def _prepare() -> None:
    from dogvae.training.worker import prepare

    prepare()


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # the class is known at run time only
    """nccl for GPU workers, else gloo, once each worker has prepared its process."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_prepare)
        super().on_start(worker_group, backend_config)


@dataclass
class ProcessGroup(TorchConfig):
    """torch.distributed over all workers."""

    timeout_s: int = TIMEOUT_S

    @property
    def backend_cls(self) -> type:
        """What sets the group up and dissolves it."""
        return _Backend


class LostWorkers(UserCallback):
    """Tells the events' actor which workers were lost, and why."""

    def __init__(self, events: Any) -> None:
        self._events = events

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._events.tell.remote("failure", {rank: _first_line(e) for rank, e in worker_exceptions.items()})


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1] if 'Traceback' in lines[0] else lines[0]}".strip(": ")

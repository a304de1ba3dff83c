"""The process group of all workers, as Ray Train sets it up, and what Ray Train reports of lost workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.torch import TorchConfig

TIMEOUT_S = 300  # a worker that does not answer for so long is lost; a death is noticed at once


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # the class is known at run time only
    """Prepares each worker's process, then has all of them join a group. One worker alone needs none."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        workers = len(worker_group)
        worker_group.execute(_prepare)
        if workers > 1:
            address = worker_group.execute_single(0, _free_address)
            joining = [worker_group.execute_single_async(i, _join, address, i, workers) for i in range(workers)]
            ray.get(joining)


def _prepare() -> None:
    from dogvae.training.worker import prepare

    prepare()


def _free_address() -> str:
    from dogvae.training.worker import free_address

    return free_address()


def _join(address: str, rank: int, world_size: int) -> None:
    from dogvae.training.worker import join

    join(address, rank, world_size, TIMEOUT_S)


@dataclass
class ProcessGroup(TorchConfig):
    """torch.distributed over all workers."""

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

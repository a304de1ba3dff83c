"""Calls in which all ranks take part: an action on all, the values of all, one value for all."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar, cast

import torch.distributed as dist

from dogvae.errors import RunFailed, UsageError

T = TypeVar("T")
HEARTBEAT_S = 0.5  # between two signs of life of ranks that wait for a slow one
SILENT_S = 5.0  # how long ranks wait before the user is told


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank. A UsageError or RunFailed of one rank is raised on all, so that no rank waits."""
    result, problem = None, None
    try:
        result = action()
    except (UsageError, RunFailed) as error:
        problem = error
    if first := next(filter(None, all_gather(problem)), None):
        raise first
    return cast(T, result)


def on_all_ranks_with_heartbeat(action: Callable[[], T], waiting_for: Callable[[list[str]], None]) -> T:
    """As `on_all_ranks`, but the ranks exchange heartbeats: a slow node does not hit the timeout of collectives.

    After SILENT_S seconds `waiting_for` is called once, on every rank, with the names of the hosts that are not done.
    """
    began, told = time.monotonic(), False
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(action)
        while busy := set(all_gather("" if running.done() else socket.gethostname())) - {""}:
            if not told and time.monotonic() - began > SILENT_S:
                told = True
                waiting_for(sorted(busy))
            wait([running], HEARTBEAT_S)
    return on_all_ranks(running.result)


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]

"""Ranks that act together: a value of each, one value for all, one error for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from dogvae.errors import RunFailed, UsageError

T = TypeVar("T")


def _together(action: Callable[[], T]) -> T:
    """Run an action on every rank; an error for the user on one of them is raised on all, so that none waits."""
    result, problem = None, None
    try:
        result = action()
    except (UsageError, RunFailed) as error:
        problem = error
    if first := next(filter(None, _everyones(problem)), None):
        raise first
    return cast(T, result)


def _everyones(value: T) -> list[T]:
    """The value of each rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _agree(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]

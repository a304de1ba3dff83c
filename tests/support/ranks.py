"""Processes that form a group of ranks over gloo, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def start_ranks(work: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run `work(rank, *args)` in one process per rank and wait for all. Raises the error of a process that failed."""
    # The processes are forked from a clean server, so that torch is imported once, and its compiler, which DDP needs.
    modules = ["pytest", "torch.distributed", "torch._dynamo", "dogvae.training.loop", "tensorboardX"]
    multiprocessing.set_forkserver_preload(modules)
    mp.start_processes(work, args, nprocs=world_size, start_method="forkserver")


def on_ranks(world_size: int, work: Callable[..., None], *args: Any) -> None:
    """As `start_ranks`, within a process group of the ranks, with one thread each."""
    # The server may be older than the keys to an object store.
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, world_size, world_size, f"file://{folder}/init", keys, work, args)


def _rank(rank: int, world_size: int, init: str, env: dict[str, str], work: Callable[..., None], args: Any) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    work(rank, *args)
    dist.destroy_process_group()

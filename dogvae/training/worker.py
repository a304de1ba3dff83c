"""What runs in the processes of Ray Train's workers."""

from __future__ import annotations

import time
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _shutdown_torch

from dogvae.cluster.network import choose_interface
from dogvae.errors import OutOfMemory, RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.loop import loop
from dogvae.training.memory import keep_freed_memory
from dogvae.training.observer import Observer

PROGRESS_INTERVAL_S = 0.3
STOP_INTERVAL_S = 0.5
GROUP_TIMEOUT_S = 300  # a worker that answers no more for so long is lost; a death is noticed at once


class _RayObserver(Observer):
    """Talks to the hub, without ever waiting for it."""

    def __init__(self, hub: Any, rank: int, wants_saved: bool, nodes_may_go: bool) -> None:
        self._hub, self._rank, self.wants_saved, self._nodes_may_go = hub, rank, wants_saved, nodes_may_go
        self._told = self._asked = 0.0
        self._answer: Any = None
        self._stopping = False

    def progress(self, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_INTERVAL_S:
            self._told = now
            self._hub.tell.remote("progress", epoch, step, steps)

    def epoch(self, record: dict[str, Any]) -> None:
        if self._rank == 0:
            self._hub.tell.remote("epoch", record)

    def note(self, line: str) -> None:
        self._hub.tell.remote("note", line)

    def stopping(self) -> bool:
        now = time.monotonic()
        if self._rank == 0 and self._answer is None and now - self._asked >= STOP_INTERVAL_S:
            self._asked, self._answer = now, self._hub.stopping.remote()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stopping, self._answer = ray.get(self._answer), None
        return self._stopping

    def preempted(self) -> bool:
        return self._nodes_may_go and ray.train.get_preemption_info() is not None


def join(network: dict[str, str], gpu: bool, address: str, rank: int, world_size: int) -> None:
    """Before the training thread is started: settings of the process, and the group of all workers."""
    choose_interface(network)
    if not gpu:
        keep_freed_memory()
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(
        backend="nccl" if gpu else "gloo",
        world_rank=rank,
        world_size=world_size,
        init_method=f"tcp://{address}",
        timeout_s=GROUP_TIMEOUT_S,
    )


def leave() -> None:
    """After training."""
    _shutdown_torch(destroy_process_group=dist.is_initialized() and dist.get_world_size() > 1)


def work(settings: dict[str, Any]) -> tuple[str, str]:
    """Train; returns how it ended: an error that is returned, not raised, is not retried."""
    hub = settings["hub"]
    if failure := ray.get(hub.failure.remote()):  # of the attempt before this one
        return "failed", failure
    torch.set_num_threads(settings["threads"])
    rank = ray.train.get_context().get_world_rank()
    observer = _RayObserver(hub, rank, settings["wants_saved"], settings["nodes_may_go"])
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        done = loop(settings["config"], Storage(settings["run"]), device, observer, settings["safety"])
    except OutOfMemory as error:
        ray.get(hub.fail.remote(str(error)))
        raise  # the others wait for this rank: Ray Train ends them, and starts an attempt that returns at once
    except UsageError as error:
        return "mistake", str(error)
    except RunFailed as error:
        return "failed", str(error)
    return ("done" if done else "stopped"), ""

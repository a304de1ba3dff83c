"""What runs in the processes of Ray Train's workers."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from dogvae.cluster.network import choose_interface
from dogvae.errors import OutOfMemory, RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.loop import loop
from dogvae.training.memory import keep_freed_memory
from dogvae.training.observer import Observer

PROGRESS_INTERVAL_S = 0.3
STOP_INTERVAL_S = 0.5


class RayObserver(Observer):
    """Tells the events' actor what happens, without waiting for it.

    Nothing is reported to Ray Train: it keeps no checkpoint of ours, and `ray.train.report` would wait until Ray Train
    asks its workers the next time, so that no epoch could be shorter than the half second between two questions.
    """

    def __init__(self, events: Any, rank: int, wants_saved: bool, nodes_may_go: bool) -> None:
        self._events, self._rank, self.wants_saved, self._nodes_may_go = events, rank, wants_saved, nodes_may_go
        self._told = self._asked = 0.0
        self._answer: Any = None
        self._stopping = False

    def progress(self, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_INTERVAL_S:
            self._told = now
            self._events.tell.remote("progress", epoch, step, steps)

    def epoch(self, record: dict[str, Any]) -> None:
        if self._rank == 0:
            self._events.tell.remote("epoch", record)

    def note(self, line: str) -> None:
        self._events.tell.remote("note", line)

    def stopping(self) -> bool:
        now = time.monotonic()
        if self._rank == 0 and self._answer is None and now - self._asked >= STOP_INTERVAL_S:
            self._asked, self._answer = now, self._events.stopping.remote()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stopping, self._answer = ray.get(self._answer), None
        return self._stopping

    def preempted(self) -> bool:
        return self._nodes_may_go and ray.train.get_preemption_info() is not None


def prepare() -> None:
    """Settings of the process, before its process group is made."""
    choose_interface()
    if ray.train.torch.get_device().type == "cpu":
        keep_freed_memory()  # before threads are started, which would not have it


def free_address() -> str:
    """HOST:PORT of this node, at which rank 0 can listen."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.bind(("", 0))
        return f"[{host}]:{free.getsockname()[1]}" if ":" in host else f"{host}:{free.getsockname()[1]}"


def join(address: str, rank: int, world_size: int, timeout_s: float) -> None:
    """Join the process group of all workers, of which rank 0 listens at `address`.

    GPUs talk by NCCL. What is in host memory goes by gloo, also between GPU workers: no host waits for its GPU then.
    Ray's own call would leave the choice of the GPU to NCCL. From eleven GPUs on it takes another one than Ray.
    """
    device = ray.train.torch.get_device()
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray does: a lost rank ends the others
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=gpu,
    )


def work(settings: dict[str, Any]) -> tuple[str, str]:
    """Train on this worker; returns how it ended (`done`, `stopped`, `mistake`, `failed`) and why.

    Ray Train retries what is raised. What no other attempt could mend is therefore returned.
    """
    events = settings["events"]
    if failure := ray.get(events.failure.remote()):  # of the attempt before this one
        return "failed", failure
    context = ray.train.get_context()
    rank = context.get_world_rank()
    observer = RayObserver(events, rank, settings["wants_saved"], settings["nodes_may_go"])
    device = ray.train.torch.get_device()
    threads = settings["threads"]
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A GPU worker reserves one CPU, but the cores of its node have nothing else to do.
        threads = max(threads, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    try:
        config, storage = settings["config"], Storage(settings["run"])
        done = loop(config, storage, device, observer, settings["safety"], settings["tracking"])
    except OutOfMemory as error:
        ray.get(events.fail.remote(str(error)))
        raise  # the others wait for this rank: Ray Train ends them, and starts an attempt that returns at once
    except UsageError as error:
        return "mistake", str(error)
    except RunFailed as error:
        return "failed", str(error)
    return ("done" if done else "stopped"), ""

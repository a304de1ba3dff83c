"""What runs in the processes of Ray Train's workers."""

from __future__ import annotations

import time
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from dogvae.cluster.network import choose_interface
from dogvae.errors import OutOfMemory, RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.loop import loop
from dogvae.training.memory import keep_freed_memory
from dogvae.training.observer import Observer

PROGRESS_INTERVAL_S = 0.3
STOP_INTERVAL_S = 0.5


class RayObserver(Observer):
    """Tells the events' actor and Ray Train what happens, without waiting for either."""

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
        ray.train.report(record)

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


def import_all() -> None:
    """Import what a run needs, before it is known which: torch imports its compiler when an optimiser is made."""
    torch.optim.Adam([torch.zeros(1)])


def prepare() -> None:
    """Settings of the process, before its process group is made."""
    choose_interface()
    if ray.train.torch.get_device().type == "cpu":
        keep_freed_memory()  # before threads are started, which would not have it


def work(settings: dict[str, Any]) -> tuple[str, str]:
    """Train on this worker; returns how it ended (`done`, `stopped`, `mistake`, `failed`) and why.

    Ray Train retries what is raised. What no other attempt could mend is therefore returned.
    """
    events = settings["events"]
    if failure := ray.get(events.failure.remote()):  # of the attempt before this one
        return "failed", failure
    torch.set_num_threads(settings["threads"])
    rank = ray.train.get_context().get_world_rank()
    observer = RayObserver(events, rank, settings["wants_saved"], settings["nodes_may_go"])
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        done = loop(settings["config"], Storage(settings["run"]), device, observer, settings["safety"])
    except OutOfMemory as error:
        ray.get(events.fail.remote(str(error)))
        raise  # the others wait for this rank: Ray Train ends them, and starts an attempt that returns at once
    except UsageError as error:
        return "mistake", str(error)
    except RunFailed as error:
        return "failed", str(error)
    return ("done" if done else "stopped"), ""

"""What `dogvae doctor` runs in a process group of one process on each node: a sum, and the time that gradients take."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from dogvae.cluster.network import choose_interface
from dogvae.config import Config

GROUP_TIMEOUT_S = 30.0  # for all nodes to form a process group
WARM_UP, TIMED = 3, 10  # calls before time is taken, and calls whose median counts


def free_port(number: int) -> int:
    """A port of this node that nobody listens at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _device(backend: str) -> str:
    return "cuda" if backend == "nccl" else "cpu"


@contextmanager
def _group(backend: str, first: str, port: int, world_size: int, rank: int) -> Iterator[None]:
    """A process group whose rank 0 is on the node with the address `first`."""
    import torch.distributed as dist

    choose_interface()
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group(backend, f"tcp://{first}:{port}", timeout=timeout, world_size=world_size, rank=rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def add_ranks(backend: str, first: str, port: int, world_size: int, rank: int) -> int:
    """The sum of all ranks, added up over the network."""
    import torch
    import torch.distributed as dist

    with _group(backend, first, port, world_size, rank):
        number = torch.tensor(rank, device=_device(backend))
        dist.all_reduce(number)
        return int(number)


def time_gradients(
    config: Config, backend: str, first: str, port: int, world_size: int, rank: int
) -> tuple[float, float, int]:
    """Seconds of a training step on one device of this node, seconds that all nodes take to add up its gradients, and
    their bytes.
    """
    import torch
    import torch.distributed as dist

    from dogvae.training.step import Trainer

    device = torch.device(_device(backend))
    size, n = config.model.image_size, config.batch_size
    trainer = Trainer(config, device)  # before there is a group, which it would exchange gradients with
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)
    step_s = _seconds(lambda: trainer.step(images, n, 0, 0, 1), device.type)
    with _group(backend, first, port, world_size, rank):
        gradients = torch.zeros(trainer.nbytes // 4, device=device)
        return step_s, _seconds(lambda: dist.all_reduce(gradients), device.type), trainer.nbytes


def _seconds(work: Callable[[], object], device: str) -> float:
    import torch

    seconds = []
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])

"""Training steps in a process that has a paper GPU: what they launch, and what they leave behind."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from dogvae.config import Config
from dogvae.data.dataset import rank_slice
from dogvae.training.step import Trainer
from tests.paper import device

WARM, TIMED, STEPS = 12, 40, 100  # steps before counting, steps of which the host's time is taken, steps of an epoch


def steps(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of `step` with each of these arguments. This process is rank 0 and stands for all ranks."""
    torch.set_num_threads(1)
    torch.cuda.set_device(0)
    results = []
    for arguments in settings:
        world_size = arguments.pop("world_size")
        if world_size > 1:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world_size)
        results.append(step(world_size, **arguments))
        if world_size > 1:
            dist.destroy_process_group()
    return results


def step(world_size: int, n: int = 64, timed: bool = False, **settings: Any) -> dict[str, Any]:
    """Counts of one step on a global batch of `n` images, after some others; strides that differ; ms on the host."""
    cuda = torch.device("cuda", 0)
    trainer = Trainer(Config.make(**{"batch_size": 64, **settings}), cuda)
    trainer.net.train()
    own = rank_slice(n, 0, world_size)
    images = torch.zeros(own.stop - own.start, 3, 64, 64, dtype=torch.uint8, device=cuda)

    def take(number: int) -> None:
        trainer.step(images, n, 0, number, STEPS)

    for i in range(WARM):
        take(i)
    device.reset()
    take(WARM)
    result: dict[str, Any] = {"counts": device.counts(), "kernels": device.kernels(), "bf16": trainer.bf16}
    moments = trainer.optimizer.state()
    result["strides"] = [
        name
        for name, p in trainer.parameters.items()
        for other in (p.grad, moments[f"exp_avg/{name}"], moments[f"exp_avg_sq/{name}"])
        if other is not None and not _same_order(p, other)
    ]
    if timed:
        began = time.process_time()
        for i in range(TIMED):
            take(WARM + 1 + i)
        result["ms"] = 1e3 * (time.process_time() - began) / TIMED
    return result


def _same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the strides of two tensors are equal, apart from those of dimensions of length 1."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))

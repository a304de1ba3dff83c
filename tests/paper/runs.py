"""Runs of the training loop on paper GPUs, one process for each rank, without Ray."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dogvae.config import Config, Safety
from dogvae.data import dataset
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.loop import POLL_STEPS_CUDA, loop
from tests.paper import device
from tests.support.ranks import start_ranks
from tests.support.runs import StopAt, job, make_dataset

SAFETY = Safety(checkpoint_steps=POLL_STEPS_CUDA, max_skipped=10**12)  # the kernels' results are arbitrary


class _Counting(StopAt):
    """Takes the counts of rank 0 after each step, before it polls."""

    def __init__(self, stop_at: int | None) -> None:
        super().__init__(stop_at)
        self.steps: list[dict[str, int]] = []

    def progress(self, epoch: int, step: int, steps: int) -> None:
        self.steps.append({"step": epoch * steps + step, **device.counts()})  # the poll comes after it


def train(
    where: str, world_size: int, streamed: bool = False, stop_at: tuple[int | None, ...] = (None,), **settings: Any
) -> list[dict[str, Any]]:
    """Train a run in the folder `where`, and go on with it once for each further entry of `stop_at`.

    `stop_at` are the polls at which the run is stopped. Returns, for each part, the last step of each epoch so far, and
    rank 0's notes and counts.
    """
    folder = Path(where)
    make_dataset(folder / "dataset")
    config = job(folder / "dataset", **settings)
    results = []
    for part, stop in enumerate(stop_at):
        args = world_size, where, config, streamed, stop, part
        if world_size == 1:
            _rank(0, *args)
        else:
            start_ranks(_rank, world_size, *args)
        results.append(json.loads((folder / "result.json").read_text()))
    return results


def _rank(
    rank: int, world_size: int, where: str, config: Config, streamed: bool, stop_at: int | None, part: int
) -> None:
    torch.set_num_threads(1)
    gpu = torch.device("cuda", rank)
    torch.cuda.set_device(gpu)
    if streamed:
        dataset.RESIDENT_SHARE = 0.0
    if world_size > 1:
        init = f"file://{where}/init-{part}"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=init, rank=rank, world_size=world_size, device_id=gpu,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
    observer = _Counting(stop_at)
    run = Storage(where) / "run"
    done = loop(config, run, gpu, observer, SAFETY)
    if rank == 0:
        ends = [record["step"] for record in metrics.read(run)]
        result = {"done": done, "epochs": ends, "notes": observer.notes, "steps": observer.steps}
        (Path(where) / "result.json").write_text(json.dumps(result))
    if world_size > 1:
        dist.destroy_process_group()

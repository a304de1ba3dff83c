"""What all ranks check together before the first step: the dataset, the storage and the checkpoint to resume from."""

from __future__ import annotations

import math
import shutil
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dogvae import rng
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training.checkpoint import KEEP_LATEST
from dogvae.training.ranks import (
    all_gather,
    broadcast,
    on_all_ranks,
    on_all_ranks_with_heartbeat,
    rank_and_world_size,
)


def open_dataset(config: Config, note: Callable[[str], None]) -> Dataset:
    """The run's dataset, fetched once to each node. Ranks that share a copy divide the check of its checksums."""
    rank, _ = rank_and_world_size()

    def opened() -> Dataset:
        return Dataset(config.data, config.fingerprint)

    def waiting_for(hosts: list[str]) -> None:
        if rank == 0:
            note(f"waiting for the dataset on {', '.join(hosts)}")

    dataset = on_all_ranks_with_heartbeat(opened, waiting_for)
    copies = all_gather(dataset.copy_key)
    sharing = [other for other, copy in enumerate(copies) if copy == copies[rank]]
    for path in on_all_ranks_with_heartbeat(lambda: dataset.verify(sharing.index(rank), len(sharing)), waiting_for):
        note(f"{path} on {socket.gethostname()} was damaged: it has been fetched again")
    return on_all_ranks(opened)  # opened again, as another rank may have replaced a damaged file


def most_bytes(weights_bytes: int) -> int:
    """What the checkpoints of a run take at most on its storage, from the bytes of its weights."""
    # A checkpoint has weights, their average and Adam's two moments. Besides the latest: the best, one being written.
    return 4 * weights_bytes * (KEEP_LATEST + 2)


def check_storage(storage: Storage, weights_bytes: int) -> None:
    """UsageError on all ranks if a rank cannot write to the storage, or cannot read what another rank wrote there.

    Or if a local disk has too little free space for the checkpoints of a model with so many bytes of weights.
    """
    rank, world_size = rank_and_world_size()
    token = broadcast(uuid.uuid4().hex if rank == 0 else None)
    host = socket.gethostname()
    need = most_bytes(weights_bytes)

    def write() -> None:
        try:
            storage.write(f".probe-{token}-{rank}", host.encode())
            free = shutil.disk_usage(storage.local).free if storage.local else math.inf
        except OSError as error:
            raise UsageError(f"--runs: {storage.uri} cannot be written to from {host}: {error}") from error
        if free < need:
            raise UsageError(
                f"--runs: {storage.uri} has {free / 2**20:.0f} MB free, the checkpoints need {need / 2**20:.0f} MB"
            )

    def read() -> None:
        try:
            for other in range(world_size):
                storage.read(f".probe-{token}-{other}")
        except OSError as error:
            raise UsageError(
                f"--runs: {host} does not see in {storage.uri} what another worker wrote there: it must be storage "
                "that all nodes share"
            ) from error

    try:
        on_all_ranks(write)
        on_all_ranks(read)
    finally:
        with suppress(OSError):  # the error of the check says more than an error of the clean-up
            storage.delete(f".probe-{token}-{rank}")


def check_same_run(meta: dict[str, Any], config: Config) -> None:
    """UsageError if the checkpoint with this `meta` belongs to other settings, other data or other random streams.

    Only the number of epochs and the paths of the dataset and of a prior's VAE may differ.
    """
    if meta.get("streams", 1) != rng.VERSION:
        raise UsageError(
            "--resume: this checkpoint was written by a dogvae that drew other random numbers, so this version cannot "
            "continue it bit for bit; use that version, or start a new run"
        )
    before = Config.make_nested(meta["config"])
    flows = [flow and replace(flow, vae="") for flow in (before.flow, config.flow)]
    saved, wanted = ({**c.flat(), "flow": flow} for c, flow in zip((before, config), flows, strict=True))
    names = [name for name in wanted if name not in ("epochs", "data") and saved[name] != wanted[name]]
    if names:
        differing = "; ".join(f"{name} {saved[name]}, not {wanted[name]}" for name in names)
        raise UsageError(f"--resume: the checkpoint belongs to another run: it has {differing}")

"""Whether the disk has room for the checkpoints of all trials of a search."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from functools import cache

from dogvae.config import ModelConfig
from dogvae.errors import UsageError
from dogvae.inference.load import Uninitialised
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.preflight import most_bytes
from tune.search_folder import SearchPlan

LOOKED_AT = 200  # trials whose networks are measured; the others count as the average of these


def check_disk(storage: Storage, plan: SearchPlan, known: Collection[int]) -> None:
    """Raise UsageError if the trials that are not among the `known` numbers may take more than the disk has free."""
    coming = [n for n in range(plan.trials) if n not in known]
    if storage.local is None or not coming:
        return
    looked_at = coming[:LOOKED_AT]
    models = [plan.config.replace(**plan.space.setting(plan.seed, n)).model for n in looked_at]
    need = sum(most_bytes(_weights_bytes(model)) for model in models) * len(coming) / len(looked_at)
    disk = next(path for path in (storage.local, *storage.local.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < need:
        raise UsageError(
            f"--runs: {storage.uri} has {free / 2**20:,.0f} MB free, and the checkpoints of {len(coming)} trials may "
            f"take {need / 2**20:,.0f} MB: free some space, or lower --trials"
        )


@cache
def _weights_bytes(model: ModelConfig) -> int:
    with Uninitialised():
        return sum(tensor.nbytes for tensor in VAE(model).state_dict().values())

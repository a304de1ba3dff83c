"""A trained model on a paper GPU."""

from __future__ import annotations

import numpy as np

import dogvae
from dogvae.data.dataset import Dataset


def shapes(export: str, dataset: str) -> dict[str, list[int] | str]:
    """The device of an exported model, and the shapes of what its methods return."""
    model = dogvae.load(export)
    photos = Dataset(dataset).val.gather(np.arange(3)).permute(0, 2, 3, 1).numpy()
    indices, distances, _ = model.neighbours(photos, dataset, k=2)
    arrays = {
        "sample": model.sample(70),
        "reconstruct": model.reconstruct(photos),
        "walk": model.walk(list(photos), steps=4),
        "neighbours": indices,
        "distances": distances,
    }
    return {"device": model.device.type, **{name: list(array.shape) for name, array in arrays.items()}}

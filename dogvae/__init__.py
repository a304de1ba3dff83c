"""DogVAE: variational autoencoders of dog photos, trained on Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dogvae.commands.python import fit_prior, prepare, search, train
    from dogvae.commands.run_objects import Run, Search, open_run, open_search
    from dogvae.data.dataset import Dataset
    from dogvae.inference.load import load
    from dogvae.inference.model import DogVAE

__version__ = "0.2.0"
__all__ = [
    "Dataset", "DogVAE", "Run", "Search", "__version__", "fit_prior", "load", "open_run", "open_search", "prepare",
    "search", "train",
]  # fmt: skip


# Importing torch takes seconds, so these names are imported when they are first used.
_MODULES = {
    "Dataset": "dogvae.data.dataset",
    "DogVAE": "dogvae.inference.model",
    "Run": "dogvae.commands.run_objects",
    "Search": "dogvae.commands.run_objects",
    "fit_prior": "dogvae.commands.python",
    "load": "dogvae.inference.load",
    "open_run": "dogvae.commands.run_objects",
    "open_search": "dogvae.commands.run_objects",
    "prepare": "dogvae.commands.python",
    "search": "dogvae.commands.python",
    "train": "dogvae.commands.python",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'dogvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

"""DogVAE: variational autoencoders of dog photos, trained on Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dogvae.inference.load import load
    from dogvae.inference.model import DogVAE

__version__ = "0.2.0"
__all__ = ["DogVAE", "__version__", "load"]


# Importing torch takes seconds, so these names are imported when they are first used.
_MODULES = {"DogVAE": "dogvae.inference.model", "load": "dogvae.inference.load"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'dogvae' has no attribute {name!r}")

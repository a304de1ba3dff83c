"""DogVAE: variational autoencoders of dog photos, trained on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dogvae.inference.model import DogVAE, load

__version__ = "0.1.0"
__all__ = ["DogVAE", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only those who load a model pay for it.
    if name in ("DogVAE", "load"):
        from dogvae.inference import model

        return getattr(model, name)
    raise AttributeError(f"module 'dogvae' has no attribute {name!r}")

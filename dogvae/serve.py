"""The documented name of `dogvae.inference.serve`: `serve run dogvae.serve:app export=runs/dogs/export`."""

from dogvae.inference.serve import app

__all__ = ["app"]

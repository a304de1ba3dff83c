"""The documented import path of the Ray Serve app: `serve run dogvae.serve:app export=runs/dogs/export`."""

from dogvae.inference.serve import app

__all__ = ["app"]

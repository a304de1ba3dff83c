"""The playground as a Ray Serve application, for many users at once.

    serve run dogvae.inference.serve:app export=runs/dogs/export

Arguments: `export`, a folder that every node can read; `replicas`, a number (default 1) or "auto"; `gpus` of each
replica (default 0, may be a fraction). Needs `pip install 'dogvae[serve]'`.
"""

# No `from __future__ import annotations`: Serve needs the class in the annotation of `args`, not its name as a string.
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from dogvae.inference.load import load
from dogvae.inference.model import INFERENCE_BATCH
from dogvae.inference.playground import in_thread, make_app, model_name

ONGOING = 2 * INFERENCE_BATCH["cuda"]  # requests of a replica: one batch can wait while another is decoded


class Arguments(BaseModel):
    """The arguments of `serve run`."""

    export: str
    replicas: int | str = 1
    gpus: float = 0.0


@serve.ingress()
class Playground:
    """One replica: a model with its page."""

    def __init__(self, export: str) -> None:
        self.model = load(export)
        self.name = model_name(export)
        self.decode_together.set_max_batch_size(INFERENCE_BATCH[self.model.device.type])  # type: ignore[attr-defined]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.model, self.name, self.decode)

    async def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (n, h, h, 3) uint8 of latents (n, d, 4, 4)."""
        return await self.decode_together(latents)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.002)
    async def decode_together(self, requests: list[np.ndarray]) -> list[np.ndarray]:
        """Decode the latents of several requests in one batch. Returns the pictures of each request."""
        pictures = await in_thread(lambda: self.model.decode(np.concatenate(requests)))
        return np.split(pictures, np.cumsum([len(r) for r in requests])[:-1])


def app(args: Arguments) -> serve.Application:
    """The application that `serve run` starts."""
    deploy = serve.deployment(
        num_replicas=args.replicas, ray_actor_options={"num_gpus": args.gpus}, max_ongoing_requests=ONGOING
    )
    return deploy(Playground).bind(args.export)

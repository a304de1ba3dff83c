"""The playground as a Ray Serve application, for many people at once.

    serve run dogvae.inference.serve:app export=runs/dogs/export

Arguments: `export`, a folder that every node sees; `replicas` (default 1), or "auto"; `gpus` of each replica (default
0, may be a fraction). Needs `pip install 'dogvae[serve]'`.
"""

# No `from __future__ import annotations`: Serve looks at the annotation of `args` and takes a string for no class.
import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from dogvae.inference.model import CHUNK, load
from dogvae.inference.playground import _name, _thread, make_app

AT_ONCE = 2 * CHUNK["cuda"]  # requests of a replica: enough for one batch to wait while another is decoded


class Arguments(BaseModel):
    """What `serve run` may be given."""

    export: str
    replicas: int | str = 1
    gpus: float = 0.0


@serve.ingress()
class Playground:
    """One replica: a model, and the page on it."""

    def __init__(self, export: str) -> None:
        self.model = load(export)
        self.name = _name(export)
        self.decode_together.set_max_batch_size(CHUNK[self.model.device.type])  # type: ignore[attr-defined]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.model, self.name, self.decode)

    async def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (n, h, w, 3) of latents (n, d, 4, 4)."""
        return await self.decode_together(latents)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.002)
    async def decode_together(self, requests: list[np.ndarray]) -> list[np.ndarray]:
        """The pictures of several requests in one go, as many as the network takes at once."""
        pictures = await _thread(lambda: self.model.decode(np.concatenate(requests)))
        return np.split(pictures, np.cumsum([len(r) for r in requests])[:-1])


def app(args: Arguments) -> serve.Application:
    """What `serve run` starts."""
    deploy = serve.deployment(
        num_replicas=args.replicas, ray_actor_options={"num_gpus": args.gpus}, max_ongoing_requests=AT_ONCE
    )
    return deploy(Playground).bind(args.export)

"""The playground: a web page for trying out an exported model, and the API that the page calls. Does not import Ray.

The API keeps no state. A dog is its latent, which the page receives, keeps and sends back, so that any number of
replicas can share the requests (`dogvae.inference.serve`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dogvae.errors import UsageError
from dogvae.inference.litter import children
from dogvae.inference.model import METHODS, SPAN, DogVAE
from dogvae.inference.user_images import photo
from dogvae.network.flow import GUIDANCE
from dogvae.pictures import animation, png

PAGE = Path(__file__).with_name("playground.html")
SLIDERS = 12  # principal directions that the page offers
MOST_BYTES = 20 << 20  # of a request's body
MOST_SAMPLES, MOST_STOPS, MOST_STEPS = 64, 8, 64
POLICY = (  # the page loads nothing from other hosts, and no other page may frame it
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

# Latents (n, d, 4, 4) to pictures (n, h, h, 3): in a thread of this server, or on a cluster batched over requests.
Decode = Callable[[np.ndarray], Awaitable[np.ndarray]]
Latent = Annotated[str, Field(max_length=1 << 18)]  # little-endian float32 numbers in base64


class Sample(BaseModel):
    """A request for `n` new dogs."""

    n: int = Field(12, ge=1, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, lt=2**53)
    temperature: float = Field(1.0, ge=0, le=3)
    prior: str | None = Field(None, max_length=32)  # default: the model's first
    guidance: float | None = Field(None, ge=0, le=2)  # of a flow only


class Move(BaseModel):
    """A request to move a dog by `shifts` along the first principal directions, in standard deviations."""

    latent: Latent
    shifts: list[Annotated[float, Field(ge=-SPAN, le=SPAN)]] = Field([], max_length=SLIDERS)


class Ends(Move):
    """A request for the pictures of a moved dog with the slider of one direction at either end."""

    direction: int = Field(ge=0, lt=SLIDERS)


class Walk(BaseModel):
    """A request for a walk through several dogs, with `steps` from each to the next."""

    latents: list[Latent] = Field(min_length=2, max_length=MOST_STOPS)
    steps: int = Field(33, ge=2, le=MOST_STEPS)
    method: str = Field(METHODS[0], max_length=32)


class Litter(BaseModel):
    """A request for `n` children of two dogs."""

    latents: list[Latent] = Field(min_length=2, max_length=2)
    n: int = Field(12, ge=1, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, lt=2**53)
    temperature: float = Field(0.7, ge=0, le=3)


class _SameOrigin:
    """Refuses a POST that the browser sends for a page of another site."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        origin = headers.get("origin")
        if scope.get("method") == "POST" and origin and urlsplit(origin).netloc != headers.get("host"):
            refusal = JSONResponse({"error": f"a page of {origin} may not use this playground"}, 403)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _BodyLimit:
    """Refuses a body of more than MOST_BYTES while it is received, so that it never fills the memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(413, f"a photo may have {MOST_BYTES >> 20} MB at most")
            return message

        await self._app(scope, limited, send)


def make_app(model: DogVAE, name: str, decode: Decode) -> FastAPI:
    """The page of one model, and the API that the page calls. Faulty requests get 4xx and an error of one line."""
    app = FastAPI(title="DogVAE playground", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_BodyLimit)
    app.add_middleware(_SameOrigin)
    reading_photo = anyio.Lock()
    about_model: dict[str, Any] = {}  # filled by the first request
    moves = model.moves[:SLIDERS]

    async def dogs_of(latents: np.ndarray) -> list[dict[str, str]]:
        return [
            {"latent": _pack(latent), "picture": _url(picture)}
            for latent, picture in zip(latents, await decode(latents), strict=True)
        ]

    def unpack(latent: str) -> np.ndarray:
        try:
            numbers = np.frombuffer(base64.b64decode(latent, validate=True), "<f4")
            numbers = numbers.reshape(model.latent_shape).astype(np.float32)
        except ValueError as error:
            raise UsageError("this is not a latent of this model") from error
        if not np.isfinite(numbers).all():  # `decode` would fail, on a cluster also for the requests in the same batch
            raise UsageError("this latent contains numbers that are not finite")
        return numbers

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        if about_model:
            return about_model
        (mean,) = await dogs_of(model.mean[None])
        about_model.update(
            name=name,
            size=model.size,
            latents=model.mean.size,
            priors=model.priors,
            guidance=GUIDANCE,
            directions=len(moves),
            directions_id=hashlib.sha256(moves.tobytes()).hexdigest()[:16],  # the page keeps names of directions for it
            mean=mean,
            parents=await dogs_of(model.parents),
        )
        return about_model

    @app.post("/api/sample")
    async def sample(request: Sample) -> dict[str, Any]:
        asked = (request.n, request.seed, request.temperature, request.prior, request.guidance)
        latents = await anyio.to_thread.run_sync(model.sample_latents, *asked)  # a flow takes a moment
        return {"dogs": await dogs_of(latents)}

    def moved(latent: str, shifts: list[float]) -> np.ndarray:
        n = len(shifts)
        scaled = np.array(shifts, np.float32) * model.scales[:n]
        return unpack(latent) + np.tensordot(scaled, model.directions[:n], axes=1)

    @app.post("/api/move")
    async def move(request: Move) -> dict[str, str]:
        (dog,) = await dogs_of(moved(request.latent, request.shifts)[None])
        return dog

    @app.post("/api/ends")
    async def ends(request: Ends) -> dict[str, str]:
        i = request.direction
        if i >= len(moves):
            raise UsageError(f"direction: {i} is too large, this model has {len(moves)} directions")
        shifts = [*request.shifts, *[0.0] * len(moves)][: len(moves)]
        both = [moved(request.latent, [*shifts[:i], end, *shifts[i + 1 :]]) for end in (-SPAN, SPAN)]
        low, high = await decode(np.stack(both))
        return {"low": _url(low), "high": _url(high)}

    @app.post("/api/photo")
    async def upload(request: Request) -> dict[str, str]:
        data = await request.body()
        if not data:
            raise UsageError("the photo is empty")
        # One photo at a time: it may have 90 million pixels, and Pillow's warnings are set for the whole process.
        async with reading_photo:
            pixels = await in_thread(lambda: photo(data, "this photo", model.size).transpose(1, 2, 0))
        (dog,) = await dogs_of(await in_thread(lambda: model.encode(pixels)))
        return {**dog, "photo": _url(pixels)}

    def path(request: Walk) -> np.ndarray:
        return model.path(np.stack([unpack(latent) for latent in request.latents]), request.steps, request.method)

    @app.post("/api/walk")
    async def walk(request: Walk) -> dict[str, Any]:
        return {"dogs": await dogs_of(path(request))}

    @app.post("/api/walk.gif")
    async def gif(request: Walk) -> Response:
        pictures = await decode(path(request))
        content = await in_thread(lambda: animation(pictures, ".gif"))
        headers = {"Content-Disposition": "attachment; filename=walk.gif"}
        return Response(content, media_type="image/gif", headers=headers)

    @app.post("/api/litter")
    async def litter(request: Litter) -> dict[str, Any]:
        parents = np.stack([unpack(latent) for latent in request.latents])
        # The page sends no posterior, and a dog without a photo has none: the deviations are those of the pictures.
        pictures = await decode(parents)
        _, deviations = await in_thread(lambda: model.posterior(pictures))
        return {"dogs": await dogs_of(children(parents, deviations, request.n, request.seed, request.temperature))}

    @app.exception_handler(UsageError)
    async def usage_error(request: Request, error: UsageError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the client is gone and does not read it

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": f"{where or 'request'}: {first['msg']}"}, 422)

    return app


def model_name(export: str) -> str:
    """The name of the run: `runs/dogs/export` -> `dogs`."""
    folder = Path(export).absolute()
    return folder.parent.name if folder.name == "export" else folder.name


async def in_thread(work: Callable[[], Any]) -> Any:
    """The result of `work`, run in a thread so that the event loop goes on."""
    return await anyio.to_thread.run_sync(work)


def _pack(latent: np.ndarray) -> str:
    return base64.b64encode(latent.astype("<f4").tobytes()).decode()


def _url(picture_hw3: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture_hw3)).decode()

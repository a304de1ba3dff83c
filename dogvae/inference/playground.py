"""The playground: a page on which an exported model is played with, and the little server behind it. Imports no Ray.

The server keeps nothing: a dog is its latent, which the page gets, keeps and sends back. So it can have any number of
replicas (`dogvae.inference.serve`).
"""

from __future__ import annotations

import base64
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dogvae.console import say, stop_signals
from dogvae.errors import UsageError
from dogvae.inference.model import METHODS, PRIORS, SPAN, DogVAE, load
from dogvae.inference.user_images import photo
from dogvae.pictures import animation, png

PAGE = Path(__file__).with_name("playground.html")
SLIDERS = 12  # principal directions on the page
MOST_BYTES = 20 << 20  # of an upload
PIECE = 4  # pictures that are decoded before others have their turn
MOST_SAMPLES, MOST_STOPS, MOST_STEPS = 64, 8, 64
EVERYWHERE = ("0.0.0.0", "::")  # to listen at, but no browser can go there
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (  # the page needs nothing from elsewhere, and no other page may frame it
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

# Latents (n, d, 4, 4) to pictures (n, h, w, 3): on one machine a thread, on a cluster a batch of several requests.
Decode = Callable[[np.ndarray], Awaitable[np.ndarray]]
Latent = Annotated[str, Field(max_length=1 << 18)]  # float32 numbers, little-endian, in base64


class Sample(BaseModel):
    """A new litter."""

    n: int = Field(12, ge=1, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, lt=2**53)
    temperature: float = Field(1.0, ge=0, le=3)
    prior: str = Field(PRIORS[0], max_length=32)


class Move(BaseModel):
    """A dog, and how far to move it along each principal direction, in standard deviations."""

    latent: Latent
    shifts: list[Annotated[float, Field(ge=-SPAN, le=SPAN)]] = Field([], max_length=SLIDERS)


class Walk(BaseModel):
    """A walk through dogs; `steps` from one to the next."""

    latents: list[Latent] = Field(min_length=2, max_length=MOST_STOPS)
    steps: int = Field(33, ge=2, le=MOST_STEPS)
    method: str = Field(METHODS[0], max_length=32)


class _Limit:
    """Refuses a request whose body is larger than may be, while it comes: nothing of that size is ever in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came = 0

        async def limited() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > MOST_BYTES:
                raise HTTPException(413, f"a photo may have {MOST_BYTES >> 20} MB at most")
            return message

        await self._app(scope, limited, send)


def make_app(model: DogVAE, name: str, decode: Decode) -> FastAPI:
    """The page and what it calls, for one model. Whatever is wrong with a request is answered with 4xx and a line."""
    app = FastAPI(title="DogVAE playground", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Limit)
    reading = anyio.Lock()
    known: dict[str, Any] = {}

    async def dogs(latents: np.ndarray) -> list[dict[str, str]]:
        return [
            {"latent": _pack(latent), "picture": _url(picture)}
            for latent, picture in zip(latents, await decode(latents), strict=True)
        ]

    def unpack(latent: str) -> np.ndarray:
        try:
            numbers = np.frombuffer(base64.b64decode(latent, validate=True), "<f4")
            numbers = numbers.reshape(model.latent_shape).astype(np.float32)
        except ValueError as error:
            raise UsageError("this is no latent of this model") from error
        if not np.isfinite(numbers).all():  # on a cluster it would spoil the requests that it is decoded with
            raise UsageError("this latent has numbers that are not finite")
        return numbers

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        if known:
            return known
        moves = model.moves[:SLIDERS]
        ends = [_url(p) for p in await decode(np.concatenate([model.mean - SPAN * moves, model.mean + SPAN * moves]))]
        (mean,) = await dogs(model.mean[None])
        known.update(
            name=name,
            size=model.size,
            latents=model.mean.size,
            priors=PRIORS,
            directions=[{"low": a, "high": b} for a, b in zip(ends[: len(moves)], ends[len(moves) :], strict=True)],
            mean=mean,
        )
        return known

    @app.post("/api/sample")
    async def sample(wish: Sample) -> dict[str, Any]:
        return {"dogs": await dogs(model.sample_latents(wish.n, wish.seed, wish.temperature, wish.prior))}

    @app.post("/api/move")
    async def move(wish: Move) -> dict[str, str]:
        n = len(wish.shifts)
        shifts = np.array(wish.shifts, np.float32) * model.scales[:n]
        moved = unpack(wish.latent) + np.tensordot(shifts, model.directions[:n], axes=1)
        (dog,) = await dogs(moved[None])
        return dog

    @app.post("/api/photo")
    async def upload(request: Request) -> dict[str, str]:
        data = await request.body()
        if not data:
            raise UsageError("the photo is empty")
        # One after another: a photo may be 90 million pixels, and what Pillow warns of is a setting of the process.
        async with reading:
            pixels = await _thread(lambda: photo(data, "this photo", model.size).transpose(1, 2, 0))
        (dog,) = await dogs(await _thread(lambda: model.encode(pixels)))
        return {**dog, "photo": _url(pixels)}

    def path(wish: Walk) -> np.ndarray:
        return model.path(np.stack([unpack(latent) for latent in wish.latents]), wish.steps, wish.method)

    @app.post("/api/walk")
    async def walk(wish: Walk) -> dict[str, Any]:
        return {"dogs": await dogs(path(wish))}

    @app.post("/api/walk.gif")
    async def gif(wish: Walk) -> Response:
        pictures = await decode(path(wish))
        content = await _thread(lambda: animation(pictures, ".gif"))
        headers = {"Content-Disposition": "attachment; filename=walk.gif"}
        return Response(content, media_type="image/gif", headers=headers)

    @app.exception_handler(UsageError)
    async def mistaken(request: Request, error: UsageError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # that nobody reads

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"error": f"{where or 'request'}: {first['msg']}"}, 422)

    return app


def serve(export: str, device: str | None, host: str, port: int) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 128 + the signal.

    On `port`, or a free one if it is 0. Raises UsageError if `export` is no export or the place cannot be listened on.
    """
    import uvicorn

    listener = _listen(host, port)
    with listener, stop_signals() as stopped:
        model = load(export, device)
        one = anyio.Lock()  # the network uses all cores for one call: two at a time are not sooner ready

        async def decode(latents: np.ndarray) -> np.ndarray:
            pictures = []
            for start in range(0, len(latents), PIECE):
                async with one:  # whoever waits longest is next: a slider does not wait for all of a long walk
                    pictures.append(await _thread(partial(model.decode, latents[start : start + PIECE])))
            return np.concatenate(pictures)

        app = make_app(model, _name(export), decode)
        if host in LOOPBACK:
            # Otherwise a page from elsewhere could reach this server by a name of its own that means 127.0.0.1.
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        name = socket.gethostname() if host in EVERYWHERE else host
        address = f"[{name}]" if ":" in name else name
        say(f"playground  http://{address}:{listener.getsockname()[1]}")
        if host not in LOOPBACK:
            say(f"listening on {host}: whoever can reach this machine can use the page, and upload photos to it")
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while thread.is_alive() and not stopped:
            thread.join(0.2)
        server.should_exit = True
        thread.join(5)
        if thread.is_alive():  # in a long request, and torch aborts when Python ends under it
            sys.stdout.flush()
            os._exit(128 + stopped[0])
        return 128 + stopped[0] if stopped else 1


def _name(export: str) -> str:
    """`runs/dogs/export` -> `dogs`."""
    folder = Path(export).absolute()
    return folder.parent.name if folder.name == "export" else folder.name


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: must be from 0 to 65535; leave it out for a free one")
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # from now on nobody else gets the port, and whoever comes early waits
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return listener


async def _thread(work: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(work)


def _pack(latent: np.ndarray) -> str:
    return base64.b64encode(latent.astype("<f4").tobytes()).decode()


def _url(picture_hw3: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture_hw3)).decode()

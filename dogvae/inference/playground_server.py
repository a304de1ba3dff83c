"""`dogvae playground`: the server of the page on one machine. `dogvae.inference.serve` has the one for many users."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
import zlib
from functools import partial

import anyio
import numpy as np
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dogvae.console import say
from dogvae.errors import UsageError
from dogvae.inference.load import load
from dogvae.inference.playground import in_thread, make_app, model_name
from dogvae.signals import stop_signals

PIECE = 4  # pictures of a request that are decoded before other requests get their turn
EVERYWHERE = ("0.0.0.0", "::")  # a server can listen on these, but a browser cannot open them
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORTS = range(20_000, 30_000)  # registered for few services, and below the ports that systems hand out


def serve(export: str, device: str | None, host: str, port: int | None, in_browser: bool = False) -> int:
    """Serve the page until Ctrl-C or SIGTERM. Returns 128 + the signal, or 1 if it failed.

    `port` 0 is a free one, None the model's usual one if it is free. `in_browser` opens the page. Raises UsageError if
    `export` is not an export, or if the server cannot listen on `host` and `port`.
    """
    import uvicorn

    listener = usual_listener(host, export) if port is None else _listen(host, port)
    with listener, stop_signals() as stopped:
        model = load(export, device)
        network = anyio.Lock()  # one call of the network uses all cores, so two at a time are no faster

        async def decode(latents: np.ndarray) -> np.ndarray:
            pictures = []
            for start in range(0, len(latents), PIECE):
                async with network:  # first come, first served: a slider does not wait for the whole of a long walk
                    pictures.append(await in_thread(partial(model.decode, latents[start : start + PIECE])))
            return np.concatenate(pictures)

        app = make_app(model, model_name(export), decode)
        if host in LOOPBACK:
            # Against DNS rebinding: another site's page could point its own host name at 127.0.0.1.
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        port = listener.getsockname()[1]
        say(f"playground  {_address(socket.gethostname() if host in EVERYWHERE else host, port)}")
        if host not in LOOPBACK:
            say(f"listening on {host}: anyone who can reach this machine can use the page, and upload photos to it")
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        if in_browser:  # in a thread, because a browser for terminals returns only when it ends
            here = _address("localhost" if host in EVERYWHERE else host, port)
            threading.Thread(target=_open, args=[here], daemon=True).start()
        while thread.is_alive() and not stopped:
            thread.join(0.2)
        server.should_exit = True
        thread.join(5)
        if stopped:
            say("stopped")
        if thread.is_alive():  # in a long request; torch would abort if Python shut down during it
            os._exit(128 + stopped[0])
        return 128 + stopped[0] if stopped else 1


def usual_listener(host: str, export: str) -> socket.socket:
    """A listener on a port that is the same for a model each time, or on a free one if that port is taken.

    A browser keeps the shelf and the names of directions for an address, and the port is a part of it.
    """
    try:
        return _listen(host, PORTS[zlib.crc32(model_name(export).encode()) % len(PORTS)])
    except UsageError:
        return _listen(host, 0)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: must be from 0 to 65535; leave it out, or use 0 for a free one")
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # reserves the port, and lets clients wait until the server has started
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return listener


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _open(address: str) -> None:
    if not webbrowser.open(address):
        say("--open: this machine has no browser that can be opened; open the address above yourself")

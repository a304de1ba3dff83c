"""TensorBoard on all trials of a search, and where Ray's own dashboard is to be found."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from dogvae.console import RunFailed, UsageError, say, stop_signals, warn
from dogvae.storage import Storage
from tune.results import FOLDER, TRIALS, Search

HOST = "127.0.0.1"
RAY = "http://127.0.0.1:8265"  # unless RAY_DASHBOARD_ADDRESS says otherwise, as to Ray itself
REFRESH_S = 10.0  # between two looks at an object store
READ_S = 20.0  # how long TensorBoard may take to read the trials before its links are shown all the same
# All pictures (0 would show none), and every file of a run: it has one of its own for its setting.
FLAGS = ("--samples_per_plugin", "images=1000", "--reload_multifile", "true", "--reload_interval", "5")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this machine


def dashboard(search: Search, port: int) -> int:
    """Serve TensorBoard on the trials until Ctrl-C or SIGTERM; returns 128 + the signal.

    On `port`, or a free one if it is 0. Raises UsageError if it cannot be had, RunFailed if TensorBoard ends by itself.
    """
    port = _bindable(port)
    there, ended = threading.Event(), threading.Event()
    with stop_signals() as stopped, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        copying = threading.Thread(target=_mirror, args=(search.storage, Path(scratch), there, ended), daemon=True)
        if search.storage.local:
            there.set()
        else:
            copying.start()
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", f"{search.storage.local or scratch}/{FOLDER}"]
        say(f"starting TensorBoard on {search.storage.uri}")
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--host", HOST, "--port", str(port), *FLAGS],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

        def wait(ready: Callable[[], bool], limit_s: float = math.inf) -> None:
            end = time.monotonic() + limit_s
            while not stopped and process.poll() is None and not ready() and time.monotonic() < end:
                time.sleep(0.2)

        try:
            wait(lambda: there.is_set() and _runs(port) is not None)
            # A page that is opened too early stays empty.
            wait(lambda: {t.name for t in search.trials if t.records} <= (_runs(port) or set()), READ_S)
            if not stopped and process.poll() is None:
                say(f"{_links(f'http://{HOST}:{port}/')}\n{_ray()}\nCtrl-C ends it")
            wait(lambda: False)
        finally:
            ended.set()
            _end(process)
            if copying.is_alive():
                copying.join(5)
        if stopped:
            return 128 + stopped[0]
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise RunFailed(f"TensorBoard has ended: {said[-1] if said else f'exit status {process.returncode}'}")


def copy_events(storage: Storage, folder: Path, settled: set[str]) -> None:
    """Bring TensorBoard's files of a search up to date in `folder`; `settled` are trials that do not grow any more.

    What is new is appended, for TensorBoard goes on reading where it was.
    """
    states = {entry["name"]: entry["state"] for entry in json.loads(storage.read(TRIALS))}
    for name in ("", *states):
        if name in settled:
            continue
        place, grown = f"{FOLDER}/{name}".rstrip("/"), False
        for file in storage.names(place):
            if file.startswith("events."):
                local = folder / place / file
                local.parent.mkdir(parents=True, exist_ok=True)
                with local.open("ab") as end:
                    new = storage.read(f"{place}/{file}")[end.tell() :]
                    end.write(new)
                grown = grown or bool(new)
        if not grown and states.get(name) in ("done", "stopped"):
            settled.add(name)


def _mirror(storage: Storage, folder: Path, there: threading.Event, ended: threading.Event) -> None:
    settled: set[str] = set()
    while not ended.is_set():
        try:
            copy_events(storage, folder, settled)
        except (OSError, ValueError) as error:
            warn(f"{storage.uri} could not be read, trying again in {REFRESH_S:g} s: {error}")
        there.set()
        ended.wait(REFRESH_S)


def _bindable(port: int) -> int:
    """`port`, or a free one if it is 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TensorBoard: a former one's connections linger
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or "ports are 1 to 65535"
            raise UsageError(f"--port {port}: {why}; give another, or leave it out for a free one") from error
        return probe.getsockname()[1]


def _links(address: str) -> str:
    return (
        f"TensorBoard  {address}\n"
        f"  settings   {address}#hparams\n"
        f"  curves     {address}?smoothing=0&tagFilter=val/#timeseries\n"
        f"  pictures   {address}#images"
    )


def _ray() -> str:
    """Where Ray's dashboard is, or how to come by one."""
    address = os.environ.get("RAY_DASHBOARD_ADDRESS", RAY)
    status, body = _get(f"{address}/api/version")
    if status in (401, 403):
        return f"Ray          {address}  it asks for a token: ray get-auth-token"
    if status == 200 and b"ray_version" in body:
        return f"Ray          {address}"
    return "Ray          no dashboard here; that of a cluster: ray dashboard cluster.yaml"


def _runs(port: int) -> set[str] | None:
    """The runs that TensorBoard has found, None while it does not answer."""
    status, body = _get(f"http://{HOST}:{port}/data/runs")
    return set(json.loads(body)) if status == 200 else None


def _get(url: str) -> tuple[int, bytes]:
    """The status, 0 if nobody answers, and the body."""
    try:
        with DIRECT.open(url, timeout=2) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, ValueError, HTTPException):
        return 0, b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

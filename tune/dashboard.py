"""TensorBoard on all trials of a search, and where Ray's own dashboard is to be found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import HTTPError, ProxyHandler, build_opener

from dogvae.console import say, stop_signals, warn
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from tune.search_folder import FOLDER, TRIALS, Search

RAY = "http://127.0.0.1:8265"  # unless RAY_DASHBOARD_ADDRESS says otherwise, as to Ray itself
REFRESH_S = 10.0  # between two looks at an object store
READ_S = 30.0  # how long TensorBoard may take to read the trials before its links are shown all the same
# All pictures (0 would show none), and every file of a run: it has one of its own for its setting.
FLAGS = ("--samples_per_plugin", "images=1000", "--reload_multifile", "true", "--reload_interval", "5")


def dashboard(search: Search, port: int) -> int:
    """Serve TensorBoard on the trials until Ctrl-C or SIGTERM; returns 128 + the signal.

    On `port`, or a free one if it is 0. Raises UsageError if it cannot be had, RunFailed if TensorBoard ends by itself.
    """
    port = _bindable(port)
    address, wanted = f"http://127.0.0.1:{port}", {trial.name for trial in search.trials if trial.records}
    with stop_signals() as stopped, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        logdir, log, ended = search.storage.local or Path(scratch), Path(scratch) / "log", threading.Event()
        mirror = threading.Thread(target=_mirror, args=(search.storage, logdir, ended), daemon=True)
        if not search.storage.local:
            mirror.start()
        say(f"starting TensorBoard on {search.storage.uri}")
        command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port), *FLAGS]
        command += ["--logdir", str(logdir / FOLDER)]
        started, shown = time.monotonic(), False
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
            try:
                while not stopped and process.poll() is None:
                    if not shown and (runs := _get(f"{address}/data/runs")[1]):
                        # A page that is opened before the trials are read stays empty.
                        shown = wanted <= set(json.loads(runs)) or time.monotonic() > started + READ_S
                        if shown:
                            _show(address)
                    time.sleep(0.2)
            finally:
                ended.set()
                process.terminate()
        if mirror.is_alive():
            mirror.join(5)  # or it would write into a folder that is gone
        if stopped:
            return 128 + stopped[0]
        said = log.read_text(errors="replace").split("\n")
    raise RunFailed(f"TensorBoard has ended: {next(filter(str.strip, reversed(said)), process.returncode)}")


def copy_events(storage: Storage, folder: Path, settled: set[str]) -> None:
    """Append to TensorBoard's files in `folder` what is new in those of the search, but for the trials in `settled`."""
    states = {entry["name"]: entry["state"] for entry in json.loads(storage.read(TRIALS))}
    for name in states.keys() - settled:
        place, grown = f"{FOLDER}/{name}", 0
        (folder / place).mkdir(parents=True, exist_ok=True)
        for file in storage.names(place):
            if file.startswith("events."):
                with (folder / place / file).open("ab") as end:
                    grown += end.write(storage.read(f"{place}/{file}")[end.tell() :])
        if not grown and states[name] in ("done", "stopped"):  # its last epoch may come after its state
            settled.add(name)


def _mirror(storage: Storage, folder: Path, ended: threading.Event) -> None:
    settled: set[str] = set()
    while not ended.is_set():
        try:
            copy_events(storage, folder, settled)
        except (OSError, ValueError) as error:
            warn(f"{storage.uri} could not be read, trying again in {REFRESH_S:g} s: {error}")
        ended.wait(REFRESH_S)


def _bindable(port: int) -> int:
    """`port`, or a free one if it is 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TensorBoard: a former one's connections linger
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", error)
            raise UsageError(f"--port {port}: {why}; give another, or leave it out for a free one") from error
        return probe.getsockname()[1]


def _show(address: str) -> None:
    """Say where everything is, Ray's own dashboard too, or how to come by it."""
    say(f"settings  {address}/#hparams")
    say(f"curves    {address}/?smoothing=0&tagFilter=val/#timeseries")
    say(f"pictures  {address}/#images")
    ray = os.environ.get("RAY_DASHBOARD_ADDRESS", RAY).rstrip("/")
    status, body = _get(f"{ray}/api/version")
    token = " (it asks for a token, which `ray get-auth-token` prints)" if status in (401, 403) else ""
    nowhere = "no dashboard on this machine; for that of a cluster: ray dashboard cluster.yaml"
    say(f"Ray       {ray}{token}" if token or b"ray_version" in body else f"Ray       {nowhere}")


def _get(url: str) -> tuple[int, bytes]:
    """The status, 0 if nobody answers, and the body of what was found."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2) as answer:  # a proxy knows nothing of this machine
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, b""
    except (OSError, ValueError, HTTPException):
        return 0, b""

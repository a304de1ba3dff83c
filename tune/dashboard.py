"""The dashboard of a search: TensorBoard on all trials, and the address of Ray's own dashboard."""

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

from dogvae.console import say, warn
from dogvae.errors import RunFailed, UsageError
from dogvae.signals import stop_signals
from dogvae.storage import Storage
from tune.search_folder import FOLDER, TRIALS, Search

RAY = "http://127.0.0.1:8265"  # Ray's default; RAY_DASHBOARD_ADDRESS overrides it, as for Ray itself
REFRESH_S = 10.0  # how often new events are copied from an object store
READ_S = 30.0  # print the links after this time, even if TensorBoard is still reading the trials
# Show all pictures (0 would show none). Read all event files of a run: its settings are in a separate one.
FLAGS = ("--samples_per_plugin", "images=1000", "--reload_multifile", "true", "--reload_interval", "5")


def dashboard(search: Search, port: int) -> int:
    """Serve TensorBoard on 127.0.0.1 until Ctrl-C or SIGTERM; returns 128 + the signal's number.

    `port` 0 takes a free port. Raises UsageError if the port cannot be used, RunFailed if TensorBoard ends by itself.
    """
    port = _usable(port)
    address, expected = f"http://127.0.0.1:{port}", {trial.name for trial in search.trials if trial.records}
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
                        # A page opened before TensorBoard has read the trials would stay empty.
                        shown = expected <= set(json.loads(runs)) or time.monotonic() > started + READ_S
                        if shown:
                            _print_links(address)
                    time.sleep(0.2)
            finally:
                ended.set()
                process.terminate()
        if mirror.is_alive():
            mirror.join(5)  # it writes into the temporary folder, which is about to go
        if stopped:
            say("stopped")
            return 128 + stopped[0]
        lines = log.read_text(errors="replace").split("\n")
    raise RunFailed(f"TensorBoard has ended: {next(filter(str.strip, reversed(lines)), process.returncode)}")


def copy_events(storage: Storage, folder: Path, settled: set[str]) -> None:
    """Append the new bytes of the search's event files to their copies in `folder`, except for trials in `settled`.

    Adds the trials that have ended, and whose files no longer grow, to `settled`.
    """
    states = {entry["name"]: entry["state"] for entry in json.loads(storage.read(TRIALS))}
    for name in states.keys() - settled:
        trial, new_bytes = f"{FOLDER}/{name}", 0
        (folder / trial).mkdir(parents=True, exist_ok=True)
        for file in storage.names(trial):
            if file.startswith("events."):
                with (folder / trial / file).open("ab") as copy:
                    new_bytes += copy.write(storage.read(f"{trial}/{file}")[copy.tell() :])
        if not new_bytes and states[name] in ("done", "stopped"):  # the last epoch may arrive after the state
            settled.add(name)


def _mirror(storage: Storage, folder: Path, ended: threading.Event) -> None:
    settled: set[str] = set()
    while not ended.is_set():
        try:
            copy_events(storage, folder, settled)
        except (OSError, ValueError) as error:
            warn(f"{storage.uri} could not be read, trying again in {REFRESH_S:g} s: {error}")
        ended.wait(REFRESH_S)


def _usable(port: int) -> int:
    """`port` if it can be bound, a free port for 0; else UsageError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TensorBoard does: old connections may linger
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", error)
            raise UsageError(f"--port {port}: {why}; choose another, or leave --port out to get a free one") from error
        return probe.getsockname()[1]


def _print_links(address: str) -> None:
    """Print the links to TensorBoard's tabs, and to Ray's dashboard if there is one."""
    say(f"settings  {address}/#hparams")
    say(f"curves    {address}/?smoothing=0&tagFilter=val/#timeseries")
    say(f"pictures  {address}/#images")
    ray = os.environ.get("RAY_DASHBOARD_ADDRESS", RAY).rstrip("/")
    status, body = _get(f"{ray}/api/version")
    token = " (it asks for a token, which `ray get-auth-token` prints)" if status in (401, 403) else ""
    if token or b"ray_version" in body:
        say(f"Ray       {ray}{token}")


def _get(url: str) -> tuple[int, bytes]:
    """The HTTP status and the body of a GET; status 0 without an answer, no body unless the status is 200."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2) as answer:  # no proxy: the address is local
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, b""
    except (OSError, ValueError, HTTPException):
        return 0, b""

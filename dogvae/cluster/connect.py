"""Connecting this process to Ray: to a cluster, or to one that starts here."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dogvae.compat import noted_cluster
from dogvae.console import waiting
from dogvae.errors import UsageError

NICENESS = "5"  # of workers; Ray's own 15 lets a busy machine all but stop them (docs/decisions.md)
UNREADABLE = "this user may not execute {}: use a Python that all may read"

start_ray: Callable[..., None] | None = None
"""Starts a Ray of our own, from `verbose` and the options of `ray.init`. Commands put `fast_start.start_ray` here."""


def connect(address: str | None = None, verbose: bool = False) -> str:
    """Connect this process to Ray, once, and return a sentence that says to what.

    `address` is HOST:PORT of a cluster's head, by default `RAY_ADDRESS`, else the cluster that this user has started on
    this machine (`ray start`, `ray up`). Without one, Ray starts here, without a dashboard. A cluster that somebody
    else started is never joined. `verbose` lets Ray's own log through. Raises UsageError if nothing answers.
    """
    with waiting("starting Ray"):
        return _connect(address, verbose)


def _connect(address: str | None, verbose: bool) -> str:
    import ray

    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS") or _started_by_user() or "local"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # patched, a worker's line comes out twice
        os.environ.setdefault("RAY_worker_niceness", NICENESS)
        if address not in ("local", "auto"):
            _check_answers(address)
        if address == "local" and not os.access(sys.executable, os.X_OK):
            raise UsageError(f"Ray cannot start processes: {UNREADABLE.format(sys.executable)}")
        for text in (os.getcwd(), *sys.argv):
            if text.encode(errors="ignore").decode() != text:
                raise UsageError(f"{text!r} is not a name in UTF-8, as Ray needs it: rename it")
        options: dict[str, Any] = {
            "address": address,
            "include_dashboard": False,
            "log_to_driver": verbose,
            "logging_level": logging.INFO if verbose else logging.ERROR,
        }
        try:
            with _same_sigterm_handler():
                if address == "local" and start_ray:
                    start_ray(verbose, **options)
                else:
                    ray.init(**options)
        except (ValueError, RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
            if address == "local":
                raise
            raise UsageError(f"--address: cannot join the cluster at {address}: {_first_sentence(error)}") from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    return (
        f"Ray at {ray.get_runtime_context().gcs_address}: {len(nodes)} node{'s' if len(nodes) != 1 else ''}, "
        f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    )


@contextmanager
def _same_sigterm_handler() -> Iterator[None]:
    """Put the handler of SIGTERM back that `ray.init` replaces, and pass it a SIGTERM that came meanwhile."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    came = False
    try:
        yield
    except SystemExit as error:  # from Ray's handler
        came = error.code == signal.SIGTERM
        if not came:
            raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    if came:
        signal.raise_signal(signal.SIGTERM)


def _started_by_user() -> str | None:
    """The address of the cluster that this user has started on this machine; None if there is none or it has gone."""
    noted = noted_cluster()
    try:
        if noted.stat().st_uid != os.getuid():
            return None
        address = noted.read_text().strip()
        _check_answers(address)
    except (OSError, UsageError):
        return None
    return address


def _check_answers(address: str) -> None:
    """UsageError if nobody listens at HOST:PORT; Ray itself would try for half a minute."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        raise UsageError(
            f"--address: {address!r} is neither HOST:PORT of a cluster's head nor http://HOST:PORT of its dashboard"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UsageError(f"--address: no Ray answers at {address} ({error}); is the cluster up?") from error


def why_no_process_starts() -> str:
    """Why Ray cannot start workers on this machine, on which it only retries for ever; empty if a Python starts."""
    try:
        done = subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{UNREADABLE.format(sys.executable)} ({error.strerror})"
    lines = done.stderr.splitlines() or [""]
    return f"`{sys.executable} -c 'import ray'` fails: {lines[-1]}" if done.returncode else ""


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]

"""Connecting this process to Ray: to a cluster, or to one that starts here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dogvae.errors import UsageError


def connect(address: str | None = None, verbose: bool = False, environments: bool = False) -> str:
    """Connect this process to Ray, once, and return a sentence that says to what.

    `address` is HOST:PORT of a cluster's head, by default `RAY_ADDRESS`, else the cluster that this user has started on
    this machine (`ray start`, `ray up`). Without one, Ray starts here, without a dashboard: what somebody else runs is
    never joined. `verbose` lets Ray's own log through. Only with `environments` can a Ray that starts here give
    processes an environment of their own (`runtime_env`). UsageError if nothing answers.
    """
    import ray

    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS") or _started_by_user() or "local"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # patched, a worker's line comes out twice
        if address not in ("local", "auto"):
            _check_answers(address)
        try:
            with _lean_node(verbose, environments) if address == "local" else nullcontext():
                ray.init(
                    address=address,
                    log_to_driver=verbose,
                    logging_level=logging.INFO if verbose else logging.ERROR,
                    include_dashboard=False,
                    configure_logging=True,
                    # Processes come when there is work for them: this one need not wait for some that are ready.
                    _system_config={"prestart_worker_first_driver": False} if address == "local" else None,
                )
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
def _lean_node(verbose: bool, environments: bool) -> Iterator[None]:
    """A Ray that starts within has no dashboard, no autoscaler, and only if asked for a reader of logs (`verbose`) and
    what gives processes `environments`.

    It would wait for them some seconds, also without a dashboard, and they would hold up each other.
    """
    from ray._private import node, services

    class Node(node.Node):
        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""

        def start_monitor(self) -> None: ...

        def start_log_monitor(self) -> None:
            if verbose:
                super().start_log_monitor()

    def start(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == "raylet":
            command = [*command, *absent]  # of a flag given twice the last counts
        return start_process(command, process_type, *args, **kwargs)

    # A raylet insists on two agents, waits until each has told its ports, and dies if they do. `cat` ends with the
    # raylet, as they do; -1 is what an agent tells that does not serve a port.
    absent = ["--dashboard_agent_command=cat", "--metrics_agent_port=-1", "--metrics_export_port=-1"]
    absent += ["--dashboard_agent_listen_port=-1", "--num_prestart_python_workers=0"]
    if not environments:
        absent += ["--runtime_env_agent_command=cat", "--runtime_env_agent_port=-1"]
    usual, start_process = node.Node, services.start_ray_process
    node.Node, services.start_ray_process = Node, start  # type: ignore[misc]
    try:
        yield
    finally:
        node.Node, services.start_ray_process = usual, start_process  # type: ignore[misc]


def _started_by_user() -> str | None:
    """Where the cluster is that this user has started on this machine, if it is still there."""
    from ray._common.utils import get_ray_address_file

    noted = Path(get_ray_address_file(None))
    try:
        if noted.stat().st_uid != os.getuid():
            return None
        address = noted.read_text().strip()
        _check_answers(address)
    except (OSError, UsageError):  # none, or one that has gone without a word
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


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]

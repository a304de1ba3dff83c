"""Ray on this machine or on the cluster that is already there, and the workers that it can give."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dogvae.console import Progress, RunFailed, UsageError, clock

HEAD = "node:__internal_head__"  # a resource of the head alone
NODES_INTERVAL_S = 2.0  # between two looks at what nodes there are


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


def network_settings() -> dict[str, str]:
    """What this process's environment says about the network between workers, to be told to them."""
    return {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_"))}


def choose_interface(settings: Mapping[str, str]) -> None:
    """Take over `network_settings`; and if they say nothing else, have gloo talk over the network that Ray does.

    It would take the address that the host's own name stands for, which on many is a loopback one: others then knock
    at their own door.
    """
    import psutil
    import ray

    os.environ.update(settings)
    mine = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == mine for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@dataclass(frozen=True)
class Workers:
    """How many ranks there are, each with `cpus` CPUs, and a GPU of its own if `gpu`."""

    count: int | tuple[int, int]
    """A pair is the least and the most: the run takes what there is."""
    gpu: bool
    cpus: int = 1

    @property
    def least(self) -> int:
        """The fewest that train at all."""
        return self.count[0] if isinstance(self.count, tuple) else self.count

    @property
    def most(self) -> int:
        """The most that are ever at work."""
        return self.count[1] if isinstance(self.count, tuple) else self.count

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for each."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})

    def __str__(self) -> str:
        low, high = self.least, self.most
        each = f" of {self.cpus} CPUs" if self.cpus > 1 else ""
        number = f"{low} to {high}" if low < high else str(low)
        return f"{number} {'GPU' if self.gpu else 'CPU'} worker{'s' if high > 1 else ''}{each}"


@cache
def _config() -> dict[str, Any] | None:
    """The file of `ray up` that the cluster's head was started with; None without one."""
    import ray

    address = ray.get_runtime_context().gcs_address
    head = next(node for node in ray.nodes() if HEAD in node["Resources"])
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return _config_here(address)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    ask = ray.remote(num_cpus=0)(_config_here).options(scheduling_strategy=there)
    config: dict[str, Any] | None = ray.get(ask.remote(address))
    return config


def _config_here(address: str) -> dict[str, Any] | None:
    """`_config`, on the head: what its autoscaler reads. Ray has no other way."""
    import psutil
    import yaml

    for process in psutil.process_iter(["cmdline"]):
        typed = dict(arg.split("=", 1) for arg in process.info["cmdline"] or [] if "=" in arg)
        if typed.get("--gcs-address") == address and "--autoscaling-config" in typed:
            config: dict[str, Any] = yaml.safe_load(Path(typed["--autoscaling-config"]).expanduser().read_text())
            return config
    return None


def _autoscaler_limits() -> dict[str, int] | None:
    """The most that an autoscaler may bring the cluster to; None without one."""
    if (config := _config()) is None:
        return None
    limits: dict[str, int] = {}
    for name, kind in config["available_node_types"].items():
        nodes = min(kind.get("max_workers", 0), config["max_workers"]) + (name == config["head_node_type"])
        for resource in ("CPU", "GPU"):
            limits[resource] = limits.get(resource, 0) + nodes * int(kind["resources"].get(resource, 0))
    return limits if any(limits.values()) else None  # machines of one's own: what they have is not known


def least_nodes() -> int:
    """How many nodes the cluster is meant to have at least, its head among them."""
    config = _config() or {"provider": {}, "available_node_types": {}}
    workers = sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values())
    return 1 + max(workers, len(config["provider"].get("worker_ips", ())))


def is_one_machine() -> bool:
    """Whether this is all of the cluster, and will be."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) == 1 and _config() is None


def plan(gpus: int | tuple[int, int] | None, cpus: int | tuple[int, int] | None) -> Workers:
    """The workers asked for, by default all GPUs, else one per node; UsageError if the cluster cannot have them."""
    import ray

    total = {k: int(v) for k, v in ray.cluster_resources().items()}
    limits = _autoscaler_limits() or {}
    have = {k: max(total.get(k, 0), int(limits.get(k, 0))) for k in ("GPU", "CPU")}
    if gpus is None and cpus is None:
        if have["GPU"]:
            return Workers(have["GPU"], True)
        # Threads are faster than as many workers: they need not send each other anything.
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        nodes = [n for n in nodes if n] or [1]
        return Workers(len(nodes), False, cpus=min(nodes))
    kind, count = ("GPU", gpus) if gpus is not None else ("CPU", cpus)
    assert count is not None
    workers = Workers(count, kind == "GPU")
    if workers.least > have[kind]:
        flag = f"--{kind.lower()}s"
        other = f"{flag} {have[kind]}" if have[kind] else f"--cpus {have['CPU']}"
        has = f"has {have['GPU']} GPUs and {have['CPU']} CPUs"
        raise UsageError(f"{flag} {workers.least}: the cluster {has}{' at most' if limits else ''}; try {other}")
    return workers


def missing(workers: Workers) -> str:
    """What the nodes that are there lack for the least number of workers; an empty string if they lack nothing."""
    room = slots(workers.cpus, float(workers.gpu))
    return "" if room >= workers.least else f"there is room for {room} of {workers.least} workers"


def wait_for_nodes(workers: Workers, limit_s: float) -> None:
    """Have the autoscaler bring nodes until the least number of workers fits; RunFailed if they do not in `limit_s`."""
    from ray.autoscaler.sdk import request_resources

    if not (lack := missing(workers)):
        return
    if _autoscaler_limits() is None:
        raise UsageError(f"--gpus, --cpus: {lack}, and no autoscaler that could start more nodes")
    began = time.monotonic()
    request_resources(bundles=[workers.resources] * workers.most)
    try:
        with Progress("waiting for nodes") as line:
            line.note(f"{lack}: waiting at most {clock(limit_s)} for the autoscaler's nodes")
            while lack := missing(workers):
                waited = time.monotonic() - began
                if waited > limit_s:
                    raise RunFailed(
                        f"{lack} after {clock(waited)}: `ray status` says why no nodes come (a quota, no capacity?). "
                        "Ask for fewer --gpus or --cpus, or wait longer by --node-patience"
                    )
                line.update(0, 1, f"{lack}, {clock(waited)}")
                time.sleep(NODES_INTERVAL_S)
    finally:
        request_resources(bundles=[])  # the workers ask for what they need themselves; until then nodes do not leave


def most_slots(cpus: int, gpus: float) -> int:
    """As `slots`, with the nodes that an autoscaler may still bring."""
    return max(slots(cpus, gpus), _room(_autoscaler_limits() or {}, cpus, gpus))


def slots(cpus: int, gpus: float) -> int:
    """How many workers with so much each the nodes have room for, side by side; `gpus` is 0, 1 or a part of one."""
    import ray

    return sum(_room(node["Resources"], cpus, gpus) for node in ray.nodes() if node["Alive"])


def _room(have: Mapping[str, float], cpus: int, gpus: float) -> int:
    by_cpu = int(have.get("CPU", 0) // cpus)
    # A part of a GPU lies on one: two of 0.4 fit on each, whatever is left over.
    return min(by_cpu, int(have.get("GPU", 0)) * int(1 / gpus + 1e-9)) if gpus else by_cpu


def has_gpus() -> bool:
    """Whether the cluster has a GPU, or an autoscaler that may bring one."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0 or (_autoscaler_limits() or {}).get("GPU", 0) > 0

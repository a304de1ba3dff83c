"""The nodes of the Ray cluster: how many workers they have room for, and waiting for nodes of an autoscaler."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dogvae.compat import HEAD_RESOURCE
from dogvae.console import Progress, clock
from dogvae.errors import RunFailed, UsageError

NODES_INTERVAL_S = 2.0  # between two looks at the nodes


@dataclass(frozen=True)
class Workers:
    """How many workers train: processes with `cpus` CPUs each, and with a GPU each if `gpu`."""

    count: int | tuple[int, int]
    """A number, or the least and the most of an elastic run, which takes what the cluster has."""
    gpu: bool
    cpus: int = 1

    @property
    def least(self) -> int:
        """The least number of workers: fewer do not start."""
        return self.count[0] if isinstance(self.count, tuple) else self.count

    @property
    def most(self) -> int:
        """The largest number of workers."""
        return self.count[1] if isinstance(self.count, tuple) else self.count

    @property
    def resources(self) -> dict[str, float]:
        """The resources that Ray reserves for each worker."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})

    def __str__(self) -> str:
        low, high = self.least, self.most
        each = f" of {self.cpus} CPUs" if self.cpus > 1 else ""
        number = f"{low} to {high}" if low < high else str(low)
        return f"{number} {'GPU' if self.gpu else 'CPU'} worker{'s' if high > 1 else ''}{each}"


@cache
def _autoscaler_config() -> dict[str, Any] | None:
    """The cluster's yaml file, which `ray up` gave to the head node; None without one."""
    import ray

    address = ray.get_runtime_context().gcs_address
    head = next(node for node in ray.nodes() if HEAD_RESOURCE in node["Resources"])
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return _read_autoscaler_config(address)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_head = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    task = ray.remote(num_cpus=0)(_read_autoscaler_config).options(scheduling_strategy=on_head)
    config: dict[str, Any] | None = ray.get(task.remote(address))
    return config


def _read_autoscaler_config(address: str) -> dict[str, Any] | None:
    """The config file of the autoscaler on this node, found by its command line: Ray has no API for it."""
    import psutil
    import yaml

    for process in psutil.process_iter(["cmdline"]):
        typed = dict(arg.split("=", 1) for arg in process.info["cmdline"] or [] if "=" in arg)
        if typed.get("--gcs-address") == address and "--autoscaling-config" in typed:
            config: dict[str, Any] = yaml.safe_load(Path(typed["--autoscaling-config"]).expanduser().read_text())
            return config
    return None


def _autoscaler_limits() -> dict[str, int] | None:
    """CPUs and GPUs of the cluster when its autoscaler has started all nodes it may; None if that is unknown."""
    if (config := _autoscaler_config()) is None:
        return None
    limits: dict[str, int] = {}
    for name, kind in config["available_node_types"].items():
        nodes = min(kind.get("max_workers", 0), config["max_workers"]) + (name == config["head_node_type"])
        for resource in ("CPU", "GPU"):
            limits[resource] = limits.get(resource, 0) + nodes * int(kind["resources"].get(resource, 0))
    return limits if any(limits.values()) else None  # a yaml file of local machines does not say what they have


def least_nodes() -> int:
    """The least number of nodes, head included, that the cluster is configured for."""
    config = _autoscaler_config() or {"provider": {}, "available_node_types": {}}
    workers = sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values())
    return 1 + max(workers, len(config["provider"].get("worker_ips", ())))


def is_one_machine() -> bool:
    """Whether the cluster is one machine, and no autoscaler can add others."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) == 1 and _autoscaler_config() is None


def choose_workers(gpus: int | tuple[int, int] | None, cpus: int | tuple[int, int] | None) -> Workers:
    """The workers for `--gpus` or `--cpus`. By default one per GPU; without GPUs, one per node.

    A worker of the default has as many CPUs as the smallest node. Raises UsageError if the cluster cannot have so many.
    """
    import ray

    total = {k: int(v) for k, v in ray.cluster_resources().items()}
    limits = _autoscaler_limits() or {}
    have = {k: max(total.get(k, 0), int(limits.get(k, 0))) for k in ("GPU", "CPU")}
    if gpus is None and cpus is None:
        if have["GPU"]:
            return Workers(have["GPU"], True)
        # One worker with n threads is faster than n workers, which have to exchange gradients.
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
    """A line if the present nodes have no room for the least number of workers; else an empty string."""
    room = slots(workers.cpus, float(workers.gpu))
    return "" if room >= workers.least else f"there is room for {room} of {workers.least} workers"


def wait_for_nodes(workers: Workers, limit_s: float) -> None:
    """Ask the autoscaler for nodes, and wait until the least number of workers fits.

    Raises RunFailed after `limit_s` seconds, and UsageError if the cluster has no autoscaler.
    """
    from ray.autoscaler.sdk import request_resources

    if not (lack := missing(workers)):
        return
    if _autoscaler_limits() is None:
        raise UsageError(f"--gpus, --cpus: {lack}, and no autoscaler to start more nodes")
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
        request_resources(bundles=[])  # now the workers request their own; idle nodes stay long enough


def most_slots(cpus: int, gpus: float) -> int:
    """As `slots`, including nodes that an autoscaler may still start."""
    return max(slots(cpus, gpus), _room(_autoscaler_limits() or {}, cpus, gpus))


def slots(cpus: int, gpus: float) -> int:
    """How many workers with `cpus` CPUs and `gpus` GPUs (0, 1 or a fraction) fit on the nodes at the same time."""
    import ray

    return sum(_room(node["Resources"], cpus, gpus) for node in ray.nodes() if node["Alive"])


def _room(have: Mapping[str, float], cpus: int, gpus: float) -> int:
    by_cpu = int(have.get("CPU", 0) // cpus)
    # Each share lies within one GPU: of shares of 0.4, two fit on each GPU.
    return min(by_cpu, int(have.get("GPU", 0)) * int(1 / gpus + 1e-9)) if gpus else by_cpu


def has_gpus() -> bool:
    """Whether the cluster has a GPU, or an autoscaler that may start a node with one."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0 or (_autoscaler_limits() or {}).get("GPU", 0) > 0

"""Ray on this machine or on the cluster that is already there, and the workers that it can give."""

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

NODES_INTERVAL_S = 2.0  # between two looks at what nodes there are


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
    head = next(node for node in ray.nodes() if HEAD_RESOURCE in node["Resources"])
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

"""Ray on this machine or on the cluster that is already there, and the workers that it can give."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from dogvae.console import UsageError


def connect(verbose: bool = False) -> str:
    """Connect this process to Ray, once, and return a sentence that says to what.

    Attaches to the cluster named by `RAY_ADDRESS`, else to one already running on this machine, else starts Ray here
    (without a dashboard). `verbose` lets Ray's own log through.
    """
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
        ray.init(
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            include_dashboard=False,
            configure_logging=True,
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    return (
        f"Ray at {ray.get_runtime_context().gcs_address}: {len(nodes)} node{'s' if len(nodes) != 1 else ''}, "
        f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    )


def choose_interface() -> None:
    """Have gloo talk over the network that Ray does.

    It would take the address that the host's own name stands for, which on many is a loopback one: others then knock
    at their own door.
    """
    import psutil
    import ray

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

    def __str__(self) -> str:
        low, high = self.count if isinstance(self.count, tuple) else (self.count, self.count)
        each = f" of {self.cpus} CPUs" if self.cpus > 1 else ""
        number = f"{low} to {high}" if low < high else str(low)
        return f"{number} {'GPU' if self.gpu else 'CPU'} worker{'s' if high > 1 else ''}{each}"


def _autoscaler_limits() -> dict[str, int] | None:
    """The most that an autoscaler may bring the cluster to; None without one."""
    import ray

    return ray._private.state.state.get_max_resources_from_cluster_config()


def is_one_machine() -> bool:
    """Whether this is all of the cluster, and will be."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) == 1 and _autoscaler_limits() is None


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
    least = count[0] if isinstance(count, tuple) else count
    if least > have[kind]:
        flag = f"--{kind.lower()}s"
        other = f"{flag} {have[kind]}" if have[kind] else f"--cpus {have['CPU']}"
        raise UsageError(f"{flag} {least}: the cluster has {have['GPU']} GPUs and {have['CPU']} CPUs; try {other}")
    return Workers(count, kind == "GPU")


def slots(cpus: int, gpus: float) -> int:
    """How many workers with so much each the nodes have room for, side by side; `gpus` is 0, 1 or a part of one."""
    import ray

    room = 0
    for node in ray.nodes():
        have = node["Resources"] if node["Alive"] else {}
        by_cpu = int(have.get("CPU", 0) // cpus)
        # A part of a GPU lies on one: two of 0.4 fit on each, whatever is left over.
        room += min(by_cpu, int(have.get("GPU", 0)) * int(1 / gpus + 1e-9)) if gpus else by_cpu
    return room


def has_gpus() -> bool:
    """Whether the cluster has a GPU."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0

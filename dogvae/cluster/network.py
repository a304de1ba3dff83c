"""What workers take over from the command's environment, and the network that they talk over."""

from __future__ import annotations

import os

TO_WORKERS = ("NCCL_", "TORCH_NCCL_", "GLOO_", "RAY_TRAIN_", "DOGVAE_CACHE")


def worker_environment() -> dict[str, str]:
    """The settings of this process's environment that every worker needs, also on nodes that were started before."""
    return {name: value for name, value in os.environ.items() if name.startswith(TO_WORKERS)}


def choose_interface() -> None:
    """Have gloo use the network that Ray uses, unless `GLOO_SOCKET_IFNAME` names one.

    By default gloo binds to what the hostname resolves to. Where that is loopback, peers connect to themselves.
    """
    import psutil
    import ray

    mine = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == mine for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)

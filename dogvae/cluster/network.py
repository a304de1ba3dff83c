"""The network that workers talk over."""

from __future__ import annotations

import os
from collections.abc import Mapping


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

"""What differs between versions of Ray, or is not part of its public names."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

HEAD_RESOURCE = "node:__internal_head__"
"""A resource that the head of a cluster has and no other node. Ray's documentation names it, its API does not."""


def release(package: str) -> str:
    """The installed release of a package, without its patch level: `2.60`."""
    return ".".join(version(package).split(".")[:2])


def noted_cluster() -> Path:
    """The file in which `ray start` on this machine writes the address of the cluster's head."""
    try:
        from ray._common.utils import get_ray_address_file

        return Path(get_ray_address_file(None))
    except (ImportError, TypeError):  # where Ray has written it up to now
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")

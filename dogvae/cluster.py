"""Starting Ray on this machine, or attaching to the cluster that is already there."""

from __future__ import annotations

import logging
import os


def connect(verbose: bool = False) -> str:
    """Connect this process to Ray, once, and return a sentence that says to what.

    Attaches to the cluster named by `RAY_ADDRESS`, else to one already running on this machine, else starts Ray here
    (without a dashboard). `verbose` lets Ray's own log through.
    """
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; unset, it warns
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # patched, a worker's line comes out twice
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

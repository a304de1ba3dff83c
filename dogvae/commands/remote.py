"""Commands that `--address http://HOST:8265` sends to a cluster, to run there as a job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dogvae.cluster.submit import run_job
from dogvae.commands.flags import default_runs
from dogvae.errors import UsageError


def run_there(args: argparse.Namespace, command: Sequence[str], argv: Sequence[str]) -> int | None:
    """Run `dogvae COMMAND ARGV` on a cluster, if `--address` (or `RAY_ADDRESS`) is the URL of its dashboard.

    Returns the job's exit status, or None if the command has to run here. Raises UsageError for a relative path, which
    the cluster cannot see, and as `run_job` does.
    """
    address = args.address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        return None
    runs = getattr(args, "runs", default_runs())
    paths = (("--runs", runs if runs != default_runs() else None), ("--data", getattr(args, "data", None)))
    for flag, path in (*paths, ("RUN", getattr(args, "folder", None))):
        if path and not Path(path).is_absolute() and ":" not in path and (flag == "--runs" or Path(path).exists()):
            raise UsageError(
                f"{flag}: {path} is a path on this machine, which the cluster does not see; give s3://..., "
                "or an absolute path that its nodes have"
            )
    there = list(argv)
    if "--address" in there:
        at = there.index("--address")
        del there[at : at + 2]
    return run_job(address, [*command, *(arg for arg in there if not arg.startswith("--address="))])

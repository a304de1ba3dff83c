"""Running a command on a cluster from a machine that is not part of it, as a job of Ray's dashboard."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dogvae.commands import flags
from dogvae.console import RunFailed, UsageError, say, stop_signals

CODE = ("dogvae", "tune", "train_distributed.py")  # what travels: nothing else of this folder is looked at
POLL_INTERVAL_S = 1.0
STOP_PATIENCE_S = 120  # until a job that was asked to stop is killed; Ray's 3 s are less than a checkpoint takes


def run_there(args: argparse.Namespace, command: Sequence[str], argv: Sequence[str]) -> int | None:
    """If `--address` (or `RAY_ADDRESS`) is http://HOST:PORT of a dashboard, run `python COMMAND ARGV` there.

    Shows what it prints until it ends, and returns its exit status. Ctrl-C and SIGTERM stop it as they would here,
    after a checkpoint; a second one does not wait for that. Returns None if the command is to run here. Raises
    UsageError if the dashboard does not answer, or for a relative path, which means nothing there; RunFailed if it is
    lost.
    """
    address = args.address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        return None
    for flag, path in (("--runs", args.runs if args.runs != flags.default_runs() else None), ("--data", args.data)):
        if path and not Path(path).is_absolute() and ":" not in path and (flag == "--runs" or Path(path).exists()):
            raise UsageError(
                f"{flag}: {path} is a path on this machine, which the cluster does not see; give s3://..., "
                "or an absolute path that its nodes have"
            )
    there = list(argv)
    if "--address" in there:
        at = there.index("--address")
        del there[at : at + 2]
    there = [arg for arg in there if not arg.startswith("--address=")]
    # Without a word about runs, in the home directory: a job's own folder is deleted some day.
    typed = f'DOGVAE_RUNS="${{DOGVAE_RUNS:-$HOME/runs}}" python {shlex.join([*command, *there])}'
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="dogvae-job-") as folder:
        _copy_code(Path(folder))
        job = client.submit_job(
            entrypoint=typed,
            runtime_env={
                "working_dir": folder,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_PATIENCE_S), flags.SENT: address},
            },
        )
        say(f"job {job}: it outlives this terminal; to see it again: {_logs(address, job)}")
        return _follow(client, job, address)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    os.environ.pop("RAY_ADDRESS", None)  # would be preferred to the argument
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"--address: {address} does not let us in ({why}). Is it reachable (`ray dashboard cluster.yaml` makes a "
            "tunnel)? With a token: is RAY_AUTH_MODE=token set here, and is ~/.ray/auth_token that of the cluster?"
        ) from error


def _logs(address: str, job: str) -> str:
    return f"ray job logs --address {address} --follow {job}"


def _copy_code(folder: Path) -> None:
    here = Path(__file__).parents[2]
    for name in CODE:
        if (here / name).is_dir():
            shutil.copytree(here / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here / name, folder)


def _follow(client: Any, job: str, address: str) -> int:
    """Show the job's output as it comes until it has ended; its exit status."""
    shown, stopped = 0, False
    with stop_signals() as received:
        while True:
            try:
                if received and not stopped:
                    stopped = True
                    say("the job stops after a checkpoint; once more does not wait for that")
                    client.stop_job(job)
                details = client.get_job_info(job)
                log = client.get_job_logs(job)
            except (ConnectionError, OSError, RuntimeError) as error:
                raise RunFailed(
                    f"the connection to {address} is lost ({type(error).__name__}); the job goes on: "
                    f"{_logs(address, job)}"
                ) from error
            sys.stdout.write(log[shown:])
            sys.stdout.flush()
            shown = len(log)
            if details.status.is_terminal():
                if received:
                    return 128 + received[0]
                if details.driver_exit_code is None:
                    raise RunFailed(f"the job ended as {details.status}: {details.message}")
                return int(details.driver_exit_code)
            time.sleep(POLL_INTERVAL_S)

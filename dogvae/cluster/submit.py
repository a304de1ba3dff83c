"""Running a command on a cluster from a machine that is not part of it, as a job of Ray's dashboard."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dogvae.console import say, waiting
from dogvae.errors import RunFailed, UsageError
from dogvae.signals import stop_signals

SENT = "DOGVAE_SENT_TO"  # in a job's environment: the dashboard's URL by which it came
POLL_INTERVAL_S = 1.0
STOP_PATIENCE_S = 120  # until a job that was asked to stop is killed; Ray's 3 s are less than a checkpoint takes


def run_job(address: str, command: Sequence[str]) -> int:
    """Run `dogvae COMMAND` as a job of the cluster whose dashboard is at `address`, with the code of this machine.

    Shows what it prints until it ends, and returns its exit status. Ctrl-C and SIGTERM stop it as they would here,
    after a checkpoint; a second one does not wait for that. Raises UsageError if the dashboard does not answer, and
    RunFailed if the connection is lost.
    """
    with waiting(f"sending the command to {address}"):
        client = _client(address)
        job = _submit(client, address, command)
    say(f"job {job}: it outlives this terminal; to see it again: {_logs(address, job)}")
    return _follow(client, job, address)


def _submit(client: Any, address: str, command: Sequence[str]) -> str:
    job: str = client.submit_job(
        # Without a word about runs, in the home directory: a job's own folder is deleted some day.
        entrypoint=f'DOGVAE_RUNS="${{DOGVAE_RUNS:-$HOME/runs}}" python -m dogvae {shlex.join(command)}',
        runtime_env={
            "py_modules": [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tune")],
            "excludes": ["**/__pycache__"],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_PATIENCE_S), SENT: address},
        },
    )
    return job


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


def _follow(client: Any, job: str, address: str) -> int:
    """Show the job's output as it comes until it has ended; its exit status."""
    shown, stopped = 0, False
    with stop_signals() as received:
        while True:
            try:
                if received and not stopped:
                    stopped = True
                    say("the job stops after a checkpoint; Ctrl-C again stops waiting for it")
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

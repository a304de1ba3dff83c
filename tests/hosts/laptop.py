"""The laptop from which a cluster is started: a home directory with a token, and `ray` commands on a yaml file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.hosts.hosts import VENV, Host, Hosts
from tests.support.command import ROOT, Command, wait_until

RAY = str(Path(sys.executable).with_name("ray"))
DASHBOARD = 8265


class Laptop:
    """A user of this machine with a separate home directory and the yaml file of a cluster."""

    def __init__(self, hosts: Hosts, env: Mapping[str, str]) -> None:
        self.home = hosts.base / "laptop"
        self.home.mkdir()
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DOGVAE_", "AWS_"))}
        here = {"HOME": str(self.home), "PATH": f"{VENV}/bin:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
        self.env = {**plain, **here, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), **env}
        self.yaml = self.home / "cluster.yaml"
        self._tunnel: subprocess.Popen[bytes] | None = None

    def write(self, shipped: Path, changes: Mapping[str, str]) -> None:
        """Write the yaml file: the shipped one with `changes`, each of which must match."""
        text = shipped.read_text()
        for old, new in changes.items():
            assert old in text, f"{shipped.name} has no {old}"
            text = text.replace(old, new)
        self.yaml.write_text(text)

    def type(self, *command: str, seconds: float = 300) -> str:
        """The output of a command; AssertionError if the command fails."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-8000:]}"
        return done.stdout

    def ray(self, command: str, *args: str, seconds: float = 300) -> str:
        """The output of `ray COMMAND cluster.yaml ARGS`."""
        asked = ["-y"] if command in ("up", "down") else []
        return self.type(RAY, command, *asked, str(self.yaml), *args, seconds=seconds)

    def open_dashboard(self) -> str:
        """Start `ray dashboard` once; returns the address of the tunnel on this machine."""
        if self._tunnel:
            return f"http://127.0.0.1:{DASHBOARD}"
        log = (self.home / "dashboard.log").open("w")
        typed = [RAY, "dashboard", str(self.yaml), "--port", str(DASHBOARD)]
        self._tunnel = subprocess.Popen(
            typed, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        wait_until(lambda: "HTTP" in self._curl(f"http://127.0.0.1:{DASHBOARD}/api/version"), 60)
        return f"http://127.0.0.1:{DASHBOARD}"

    def _curl(self, url: str) -> str:
        return subprocess.run(["curl", "-si", "-m", "5", url], capture_output=True, text=True).stdout

    def start(self, *args: str) -> Command:
        """Start `python ARGS` on the laptop."""
        return Command(self.home, *args, env=self.env, address="")

    def nodes(self, head: Host) -> dict[str, str]:
        """The ids of the living nodes by address, from the dashboard on the head."""
        ask = f'curl -s -H "Authorization: Bearer $(cat ~/.ray/auth_token)" http://127.0.0.1:{DASHBOARD}'
        told = head.ssh(f"{ask}/nodes?view=summary")
        if not told.startswith("{"):  # the dashboard is not up yet
            return {}
        nodes = [node["raylet"] for node in json.loads(told)["data"]["summary"]]
        return {node["nodeManagerAddress"]: node["nodeId"] for node in nodes if node["state"] == "ALIVE"}

    def close(self) -> None:
        """Close the tunnel."""
        if self._tunnel:
            os.killpg(self._tunnel.pid, signal.SIGKILL)
            self._tunnel.wait()

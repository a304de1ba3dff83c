"""A Ray cluster whose nodes can be cut off: each has a network of its own, on a bridge of this machine.

Needs root and iproute2. Nothing leaves the bridge.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

RAY = Path(sys.executable).with_name("ray")
BRIDGE, SUBNET, PORT = "dogvae-br", "10.78.0", 6399
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
ENV = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
}  # explicit: a token in the home directory would switch it on by halves


def ip(*args: str, check: bool = True) -> str:
    """Run iproute2's command; its output."""
    return subprocess.run(["ip", *args], check=check, capture_output=True, text=True).stdout


def possible() -> bool:
    """Whether this machine lets us make networks."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "link", "add", "dogvae-try", "type", "bridge"], capture_output=True).returncode == 0
    ip("link", "del", "dogvae-try", check=False)
    return made


class Node:
    """A network behind a cable of its own, and the raylet in it."""

    def __init__(self, number: int) -> None:
        self.net, self.cable, self.address = f"dogvae-n{number}", f"dogvae-v{number}", f"{SUBNET}.{10 + number}"
        ip("netns", "add", self.net)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.net)
        ip("link", "set", self.cable, "master", BRIDGE, "up")
        ip("-n", self.net, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", self.net, "link", "set", device, "up")
        ip("-n", self.net, "route", "add", "default", "via", f"{SUBNET}.1")  # else Ray takes 127.0.0.1 for its address

    @property
    def inside(self) -> list[str]:
        """What to put before a command to run it there."""
        return ["ip", "netns", "exec", self.net]

    def ray(self, *args: str) -> None:
        """Run `ray ...` there."""
        done = subprocess.run([*self.inside, RAY, *args], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, done.stdout + done.stderr

    def cut(self) -> None:
        """Pull the cable: silence, and no connection is closed."""
        ip("link", "set", self.cable, "down")

    def kill(self) -> None:
        """SIGKILL to all that runs there."""
        for pid in ip("netns", "pids", self.net, check=False).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        """Kill all, and take the network away."""
        self.kill()
        ip("netns", "del", self.net, check=False)
        ip("link", "del", self.cable, check=False)


class Net:
    """A head without CPUs for workers, so that it is never one of theirs that goes, and nodes of one CPU each."""

    def __init__(self) -> None:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        self._temp = tempfile.mkdtemp(prefix="dogvae-ray-", dir="/tmp")  # short: sockets lie in it
        self.head = Node(0)
        self.nodes = [self.head]
        self.address = f"{self.head.address}:{PORT}"

    def start(self) -> None:
        """Ray on the head."""
        quiet = ["--include-dashboard=false", "--disable-usage-stats", "--temp-dir", self._temp]
        health = f"--system-config={json.dumps(HEALTH)}"
        self._ray_start(self.head, "--head", f"--port={PORT}", "--num-cpus=0", health, *quiet)

    def add(self) -> Node:
        """One more node."""
        self.nodes.append(Node(len(self.nodes)))
        self._ray_start(self.nodes[-1], "--address", self.address, "--num-cpus=1")
        return self.nodes[-1]

    def _ray_start(self, node: Node, *args: str) -> None:
        node.ray("start", "--num-gpus=0", "--node-ip-address", node.address, *args)

    def id_of(self, node: Node) -> str:
        """Ray's name of a node."""
        ask = (
            "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR');"
            "print(*(n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == sys.argv[2]))"
        )
        command = [*self.head.inside, sys.executable, "-c", ask, self.address, node.address]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=ENV).stdout.split()[-1]

    def close(self) -> None:
        """End all of it."""
        for node in reversed(self.nodes):
            node.remove()
        ip("link", "del", BRIDGE)
        shutil.rmtree(self._temp, ignore_errors=True)

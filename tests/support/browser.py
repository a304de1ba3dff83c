"""Chromium's path and flags, and the TCP ports of this machine."""

from __future__ import annotations

import socket

CHROMIUM = "/usr/bin/chromium"
# Without the last four flags Chromium contacts Google's hosts at every start, and waits for them.
FLAGS = "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --no-first-run"


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Starting a server of moto, at a port that it chooses itself: one that was free a moment ago may be taken."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.command import wait_until


def start_moto(*command: Any) -> tuple[subprocess.Popen[bytes], int, Any]:
    """The process of `command -p 0`, its port and its log, a file that is deleted when it is closed."""
    log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
    with open(log.name, "w") as writer:
        process = subprocess.Popen([*command, "-p", "0"], stdout=writer, stderr=writer)

    def ports() -> Sequence[str]:
        text = Path(log.name).read_text()
        assert process.poll() is None, text
        return re.findall(r"Running on http://\S+:(\d+)", text)

    wait_until(ports, 60)
    return process, int(ports()[0]), log

"""A real S3 server on this machine, which can fall silent, and tells what it was asked for."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Server:
    """moto's S3, which keeps its objects in memory."""

    bucket = "dogs"

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        script = Path(sys.executable).with_name("moto_server")
        self._log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        with open(self._log.name, "w") as log:
            self.process = subprocess.Popen([script, "-p", str(self.port)], stdout=log, stderr=log)
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < end
            time.sleep(0.1)

    def asked(self, method: str) -> list[str]:
        """The names, without the bucket's, of what was asked for so far by this method, in order."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", Path(self._log.name).read_text())  # what is not status 200 is coloured
        return [str(name) for name in re.findall(rf'"{method} /{self.bucket}/([^ ?]+)', plain)]

    def stop(self) -> None:
        """From now on it answers nobody, and forgets nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def uri(self, name: str) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        return f"s3://{self.bucket}/{name}?{options}"

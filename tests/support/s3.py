"""A real S3 server on this machine, which can stop answering and lists the requests that it got."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

from tests.support.servers import start_moto


class Server:
    """moto's S3 server, which keeps objects in memory."""

    bucket = "dogs"

    def __init__(self) -> None:
        self.process, self.port, self._log = start_moto(Path(sys.executable).with_name("moto_server"))

    def asked(self, method: str) -> list[str]:
        """The names of the objects that were requested by this HTTP method so far, in order."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", Path(self._log.name).read_text())  # colours
        return [str(name) for name in re.findall(rf'"{method} /{self.bucket}/([^ ?]+)', plain)]

    def stop(self) -> None:
        """Stop answering, without losing objects, until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def uri(self, name: str) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        return f"s3://{self.bucket}/{name}?{options}"

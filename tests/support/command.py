"""A command in a session of its own, as a terminal would start it: its lines as they come, and its processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train_distributed.py")


class Command:
    """`python ...`, never on somebody else's cluster unless `address` says so; `inside` is put before it."""

    def __init__(
        self,
        where: Path,
        *args: str,
        address: str = "local",
        inside: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log = (where / f"log-{time.monotonic_ns()}").open("w+")
        env = os.environ if env is None else env
        path = ":".join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
        ours = {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [*inside, sys.executable, *args], cwd=where, env={**env, **ours},
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def wait_until(self, what: Callable[[], object], seconds: float = 120) -> float:
        """Until `what` is true, while it runs; the seconds it took."""
        began = time.monotonic()
        while not what():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() - began < seconds, self.text()
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Until its output has a line that matches."""
        self.wait_until(lambda: re.search(pattern, self.text()), seconds)

    def wait(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        """The command and all processes that came of it, Ray's among them."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def workers(self, title: str = "RayTrainWorker") -> list[psutil.Process]:
        """Those of them that Ray calls so."""
        return [p for p in self.family() if title in " ".join(_arguments(p))]

    def stop(self) -> None:
        if self.process.poll() is None:
            for p in reversed(self.family()):
                p.kill()
            self.process.wait()


def wait_until(what: Callable[[], object], seconds: float) -> float:
    """Until `what` is true; the seconds it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.2)
    return time.monotonic() - began


def _arguments(process: psutil.Process) -> list[str]:
    """What a process was called with; nothing if it has ended since it was listed."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one too
        return []

"""A command in a session of its own, as a terminal would start it: its output while it runs, and its processes."""

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
    """`INSIDE python ARGS` on the Ray cluster at `address`: by default a new one."""

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
        added = {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [*inside, sys.executable, *args], cwd=where, env={**env, **added},
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def wait_until(self, what: Callable[[], object], seconds: float = 120) -> float:
        """Wait until `what` is true, while the command runs. Returns the seconds that took."""
        began = time.monotonic()
        while not what():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() - began < seconds, self.text()
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Wait until a line of its output matches."""
        self.wait_until(lambda: re.search(pattern, self.text()), seconds)

    def wait(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        """The process of the command and all its descendants, including those of Ray."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def workers(self, title: str = "RayTrainWorker") -> list[psutil.Process]:
        """The descendants with `title` in their command lines; Ray names its processes that way."""
        return [p for p in self.family() if title in " ".join(_arguments(p))]

    def stop(self) -> None:
        if self.process.poll() is None:
            for p in reversed(self.family()):
                p.kill()
            self.process.wait()


def in_new_process(code: str, *args: str) -> list[str]:
    """The words that a Python program prints, which must succeed and print nothing on standard error."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def wait_until(what: Callable[[], object], seconds: float) -> float:
    """Wait until `what` is true. Returns the seconds that took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.2)
    return time.monotonic() - began


def _arguments(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # psutil raises it for zombies, too
        return []

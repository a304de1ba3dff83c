"""What every benchmark shares: the machine and versions, contenders that take turns, medians with their spread, JSON.

A contender is a process with its own threads, imports and memory. All contenders start first, one after another. Then
they take turns, and every second round reverses the order: a machine that slows down slows all of them down. The
contenders that wait read a line from standard input, which costs nothing. A ratio is the median of the rounds' ratios,
given with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = "turn "  # starts each line that answers an order; libraries print other lines
Answer = dict[str, Any]


# --- the machine


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory and system; the GPU if PyTorch is imported and sees one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    found: dict[str, Any] = {"cpu": cpu, "cores": cores(), "system": f"{platform.system()} {platform.machine()}"}
    found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*names: str) -> dict[str, str]:
    """The versions of Python and of those named packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def peak_mb() -> float:
    """The peak memory of this process, in MB of 2^20 bytes.

    Not `ru_maxrss`: for a new process it includes the memory of the process that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


# --- numbers


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, and their number."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The ratio of two contenders' figures, taken round by round: a slow moment of the machine cancels out."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(figure: Mapping[str, float], form: str = ".1f", unit: str = "") -> str:
    """`12.3 (11.9-12.8)`."""
    return f"{figure['median']:{form}}{unit} ({figure['low']:{form}}-{figure['high']:{form}})"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser with --json, whose help is the benchmark's docstring."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return made


def report(figures: dict[str, Any], lines: Sequence[str], args: argparse.Namespace, *packages: str) -> None:
    """Print the machine, the versions and the table; with --json, also write the figures."""
    figures = {"machine": machine(), "versions": versions("torch", "numpy", *packages), **figures}
    about = figures["machine"]
    print(f"{about.get('gpu', about['cpu'])}, {about['cores']} cores, {about['memory_gb']} GB, {about['system']}")
    print(", ".join(f"{name} {number}" for name, number in figures["versions"].items()))
    print("\n".join(lines), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def without_tensorboard() -> None:
    """Have the training loop record no events where tensorboardX is not installed: the loop has no switch for that."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        from unittest.mock import Mock

        from dogvae.training import metrics

        metrics.Recorder = Mock()  # type: ignore[misc]


def epoch_ends(run: Path) -> list[float]:
    """When the training and validation of each epoch ended, in seconds since 1970, by the run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.wall_time for event in EventAccumulator(str(run)).Reload().Scalars("val/loss")]


# --- contenders


def child(script: str, *args: object) -> list[str]:
    """The command that starts a benchmark's own file as a contender."""
    return [sys.executable, str(Path(script).resolve()), *map(str, args)]


def ranks(count: int, command: Sequence[str]) -> list[str]:
    """The command that starts `count` ranks of `command` on this machine with torchrun."""
    here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return [command[0], "-m", "torch.distributed.run", *here, "--nproc-per-node", str(count), *command[1:]]


def environment(threads: int) -> dict[str, str]:
    """The environment of a contender: fixed threads, the loopback interface, the packages of this checkout."""
    fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **fixed, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Contender:
    """A process that reads orders from standard input and answers each; an order and an answer are a line of JSON."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self.answers: list[Answer] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            command, env=environment(threads), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def order(self, **what: Any) -> None:
        """Send an order without waiting for the answer."""
        assert self._process.stdin
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._failed()

    def answer(self) -> Answer:
        """Wait for the answer to an order; exit with the contender's log if the contender has failed."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return self._failed()

    def turn(self, **what: Any) -> Answer:
        """Send an order and wait for the answer."""
        self.order(**what)
        return self.answer()

    def _failed(self) -> Any:
        self._process.wait()
        self._log.seek(0)
        sys.exit(f"{self.name} ended with {self._process.returncode}:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        """Close the contender's standard input; if the process does not end, terminate and then kill it."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # torchrun passes the signal on to its ranks
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.stdout.close()
        self._log.close()

    def figures(self, key: str) -> list[float]:
        """The number `key` of every answer so far."""
        return [float(answer[key]) for answer in self.answers]


@contextmanager
def contenders(commands: Mapping[str, tuple[Sequence[str], int]]) -> Iterator[dict[str, Contender]]:
    """Start contenders from (command, threads) by name; each is ready before the next one starts."""
    with ExitStack() as stack:
        started = {}
        for name, (command, threads) in commands.items():
            started[name] = Contender(name, command, threads)
            stack.callback(started[name].close)
            started[name].answer()
        yield started


def alternate(started: Mapping[str, Contender], rounds: int, **order: Any) -> None:
    """Send the order to each contender in each round; every second round goes in reverse."""
    for number in range(rounds):
        turns = list(started.values())
        for contender in turns if number % 2 == 0 else reversed(turns):
            contender.answers.append(contender.turn(**order))


class Turns:
    """Used inside a contender that trains: it calls `tick` after each step.

    An order is {"lead": m, "steps": n}: m steps are not timed, the n steps after them are. The answer has the seconds
    of the n steps and the peak memory. `settle` waits until the device has finished its work.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None, peak: Callable[[], float] = peak_mb) -> None:
        self._settle, self._peak = settle, peak
        self.over = False
        """True after the last order."""
        say({})
        self._wait()

    def _wait(self) -> None:
        line = sys.stdin.readline()
        self.over = not line
        if not self.over:
            order = json.loads(line)
            self._lead, self._left = order["lead"], order["steps"]
            assert self._lead > 0
            self._seconds = -1.0

    def tick(self) -> bool:
        """Count a step, and wait for the next order if this was the turn's last. Returns whether to go on."""
        if self.over:
            return False
        if self._lead:
            self._lead -= 1
            if not self._lead:
                self._settle()
                self._began = time.perf_counter()
            return True
        self._left -= 1
        if not self._left:
            self._settle()
            say({"seconds": time.perf_counter() - self._began, "peak_mb": self._peak()})
            self._wait()
        return not self.over


def say(answer: Answer) -> None:
    """Used inside a contender: send an answer; an empty answer says that the contender is ready."""
    print(MARK + json.dumps(answer), flush=True)


def orders() -> Iterator[dict[str, Any]]:
    """Used inside a contender that does not train: send that it is ready, then yield the orders."""
    say({})
    for line in sys.stdin:
        yield json.loads(line)

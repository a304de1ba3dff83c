"""What every benchmark shares: the machine and versions, contenders that take turns, medians with their spread, JSON.

A contender is a process of its own, with its own threads, imports and memory. All are started first, one after
another; then they take turns, in an order that is reversed from round to round, so that a machine which slows down
while it runs slows all of them down. While one has its turn the others wait for a line on their standard input and
cost nothing. A ratio is the median of the rounds' ratios, with the least and the largest of them.
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
MARK = "turn "  # begins the lines that are meant for us: libraries print what they like
Answer = dict[str, Any]


# --- the machine


def machine() -> dict[str, Any]:
    """Processor, cores that we may use, memory, system; the GPU if PyTorch is imported and sees one."""
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*names: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def peak_mb() -> float:
    """The most memory that this process has had.

    Not `ru_maxrss`: that of a process which was just started includes the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


# --- numbers


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest, and how many."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of two contenders' figures, round by round: what they share of the machine's moods cancels out."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(figure: Mapping[str, float], form: str = ".1f", unit: str = "") -> str:
    """`12.3 (11.9-12.8)`."""
    return f"{figure['median']:{form}}{unit} ({figure['low']:{form}}-{figure['high']:{form}})"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the usage at the top of the file, and --json."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return made


def report(figures: dict[str, Any], lines: Sequence[str], args: argparse.Namespace, *packages: str) -> None:
    """Print the table below a line on the machine and one on versions; write the figures as JSON if that was asked."""
    figures = {"machine": machine(), "versions": versions("torch", "numpy", *packages), **figures}
    about = figures["machine"]
    print(f"{about.get('gpu', about['cpu'])}, {about['cores']} cores, {about['memory_gb']} GB, {about['system']}")
    print(", ".join(f"{name} {number}" for name, number in figures["versions"].items()))
    print("\n".join(lines), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


# --- contenders


def child(script: str, *args: object) -> list[str]:
    """The command that runs a benchmark's own file as a contender."""
    return [sys.executable, str(Path(script).resolve()), *map(str, args)]


def ranks(count: int, command: Sequence[str]) -> list[str]:
    """The same command on so many ranks of this machine, by torchrun."""
    here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return [command[0], "-m", "torch.distributed.run", *here, "--nproc-per-node", str(count), *command[1:]]


def environment(threads: int) -> dict[str, str]:
    """What a contender is started with: fixed threads, the loopback interface, our checkout's packages."""
    fixed = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **fixed, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Contender:
    """A process that waits for orders on its standard input, a line of JSON each, and answers each with one."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self.answers: list[Answer] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command, env=environment(threads), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def order(self, **what: Any) -> None:
        """Give it a turn, and do not wait for it."""
        assert self._process.stdin
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._failed()

    def answer(self) -> Answer:
        """Wait for its answer."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return self._failed()

    def turn(self, **what: Any) -> Answer:
        """Give it a turn and wait for the answer."""
        self.order(**what)
        return self.answer()

    def _failed(self) -> Any:
        self._process.wait()
        self._log.seek(0)
        sys.exit(f"{self.name} ended with {self._process.returncode}:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        """Let it end; if it does not, end it."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # torchrun passes it on to its ranks
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.stdout.close()
        self._log.close()

    def figures(self, key: str) -> list[float]:
        """One number of all its answers."""
        return [float(answer[key]) for answer in self.answers]


@contextmanager
def contenders(commands: Mapping[str, tuple[Sequence[str], int]]) -> Iterator[dict[str, Contender]]:
    """Contenders by name, from (command, threads); each is ready before the next one starts."""
    with ExitStack() as stack:
        started = {}
        for name, (command, threads) in commands.items():
            started[name] = Contender(name, command, threads)
            stack.callback(started[name].close)
            started[name].answer()
        yield started


def alternate(started: Mapping[str, Contender], rounds: int, **order: Any) -> None:
    """Give each a turn in each round; in every other round in the opposite order."""
    for number in range(rounds):
        turns = list(started.values())
        for contender in turns if number % 2 == 0 else reversed(turns):
            contender.answers.append(contender.turn(**order))


class Turns:
    """A contender's own side, for one that counts steps: it calls `tick` after each of them.

    An order is {"lead": m, "steps": n}: m steps that are not timed, then n that are. Answers have the seconds of
    those, and the peak memory. `settle` waits until a device has done what it was given.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None, peak: Callable[[], float] = peak_mb) -> None:
        self._settle, self._peak = settle, peak
        self.over = False
        """Whether there will be no more orders."""
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
        """A step is done; waits for the next order if the turn is over. Returns whether to go on."""
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
    """A contender's answer to an order; an empty one when it is ready for the first."""
    print(MARK + json.dumps(answer), flush=True)


def orders() -> Iterator[dict[str, Any]]:
    """A contender's own side, for one that does something else than counting steps."""
    say({})
    for line in sys.stdin:
        yield json.loads(line)

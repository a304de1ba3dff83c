"""The command on real Ray, killed and interrupted from outside; its end must be that of a run that nothing befell."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dogvae.config import Config
from tests.faults.bench import EPOCHS, differing, final, job, records

ROOT = Path(__file__).parent.parent.parent


class Command:
    """train_distributed.py in a session of its own, as a terminal would start it; its lines as they come."""

    def __init__(self, where: Path, *args: str, address: str = "local") -> None:
        self.log = (where / f"log-{time.monotonic_ns()}").open("w+")
        env = {**os.environ, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_distributed.py"), *args],
            cwd=where, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def text(self) -> str:
        return Path(self.log.name).read_text()

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        """Until its output has a line that matches."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text()):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def wait(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        """The command and all processes that came of it, Ray's among them."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.family() if "RayTrainWorker" in " ".join(p.cmdline())]

    def stop(self) -> None:
        if self.process.poll() is None:
            for p in reversed(self.family()):
                p.kill()
            self.process.wait()


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path, dataset: Path) -> Iterator[Start]:
    commands: list[Command] = []

    def begin(*args: str) -> Command:
        commands.append(Command(tmp_path, *args))
        return commands[-1]

    yield begin
    for command in commands:
        command.stop()


def flags(config: Config) -> list[str]:
    """What to type for `job`."""
    names = ("width", "latent_dim", "epochs", "samples", "batch_size", "kl_warmup", "ema")
    settings = {name: config.flat()[name] for name in names}
    typed = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--data", config.data, "--name", "run", "--cpus", "2", "--checkpoint-every", "7", *typed]


def unharmed(run: Path, whole: Path) -> None:
    """The run ended as the whole one did: weights, optimiser, average, and a line for every epoch."""
    assert differing(final(run), final(whole)) == []
    assert [r["epoch"] for r in records(run)] == list(range(EPOCHS))
    for ours, theirs in zip(records(run), records(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert not list(run.rglob("*.partial"))


@pytest.mark.slow
def test_worker_killed(start: Start, dataset: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL to one of two workers: training goes on by itself, and the console says so in a line."""
    command = start(*flags(job(dataset, epochs=EPOCHS)))
    command.wait_for(r"epoch 3/")
    command.workers()[-1].kill()
    killed = time.monotonic()
    command.wait_for(r"Going on from the last checkpoint")
    noticed = time.monotonic()
    command.wait_for(rf"epoch {len(records(tmp_path / 'runs/run')) + 1}/")
    ended = time.monotonic()
    print(f"noticed after {noticed - killed:.1f} s, the next epoch had ended after {ended - killed:.1f} s")
    assert ended - killed < 60  # 17 s on an idle machine
    assert command.wait() == 0, command.text()
    unharmed(tmp_path / "runs/run", whole)
    assert (tmp_path / "runs/run/export/config.json").exists()


@pytest.mark.slow
def test_ctrl_c_and_then_the_driver_killed(start: Start, dataset: Path, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C, which a terminal sends to all processes: a checkpoint, the command to go on, and nothing is left behind.

    That command is typed, and its driver gets a SIGKILL. Resumed again, the run ends as if nothing had been.
    """
    command = start(*flags(job(dataset, epochs=EPOCHS)))
    command.wait_for(r"epoch 4/")
    family = command.family()
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait(60) == 130, command.text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert "Traceback" not in command.text()
    stopped = re.search(r"to go on: python (train_distributed\.py .*)", command.text())
    assert stopped, command.text()
    done = len(records(tmp_path / "runs/run"))
    saved = max((tmp_path / "runs/run/checkpoints").iterdir()).name
    assert 13 * done <= int(saved[5:14]) < 13 * EPOCHS

    command = start(*shlex.split(stopped[1])[1:], "--cpus", "2")
    command.wait_for(rf"epoch {done + 5}/")
    workers = command.workers()
    command.process.kill()
    _, alive = psutil.wait_procs(workers, timeout=40)
    assert alive == []

    command = start("--name", "run", "--resume", "--cpus", "2")
    assert command.wait() == 0, command.text()
    unharmed(tmp_path / "runs/run", whole)


@pytest.mark.slow
def test_second_signal_stops_at_once(start: Start, dataset: Path) -> None:
    """While the workers are only starting, and nobody hears of the first one yet."""
    command = start(*flags(job(dataset, epochs=EPOCHS)))
    command.wait_for("2 CPU workers")
    time.sleep(3)
    family = command.family()
    command.process.send_signal(signal.SIGTERM)
    command.wait_for("once more stops at once")
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(30) == 143
    assert time.monotonic() - asked < 15
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []

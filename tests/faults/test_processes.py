"""The command on real Ray, killed and interrupted from outside; its end must be that of a run that nothing befell."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dogvae.config import Config
from dogvae.storage import Storage
from tests.support.command import TRAIN, Command
from tests.support.runs import EPOCHS, differing, final, job, records, train
from tests.support.s3 import Server

Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path, dataset: Path) -> Iterator[Start]:
    commands: list[Command] = []
    strike = {"STRIKE": str(tmp_path / "strike"), "PYTHONPATH": str(Path(__file__).with_name("strike"))}

    def begin(*args: str) -> Command:
        commands.append(Command(tmp_path, TRAIN, *args, env={**os.environ, **strike}))
        return commands[-1]

    yield begin
    for command in commands:
        command.stop()


def flags(config: Config) -> list[str]:
    """What to type for `job`."""
    names = ("width", "latent_dim", "latent_size", "epochs", "samples", "batch_size", "kl_warmup", "ema")
    settings = {name: config.flat()[name] for name in names}
    typed = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--data", config.data, "--name", "run", "--cpus", "2", "--checkpoint-every", "7", *typed]


def last_told(command: Command) -> int:
    """The last epoch that its console speaks of. (The server may give half a file that is just being written.)"""
    return int(re.findall(r"epoch (\d+)/", command.text())[-1])


@pytest.mark.slow
def test_one_run_through_all_that_may_happen(
    start: Start, s3: Server, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    """On S3: SIGKILL to one of two workers, one that raises, SIGKILL to the driver, then Ctrl-C; finished without Ray.

    It ends as the run that nothing befell: weights, optimiser, average, and a line for every epoch.
    """
    config = job(dataset, epochs=EPOCHS)
    runs = s3.uri("runs")
    run = Storage(runs) / "run"
    command = start("--runs", runs, *flags(config))
    command.wait_for(r"epoch 3/")
    assert len(command.workers("EarlyRayTrainWorker")) == 2  # begun before Ray Train was there
    command.workers()[-1].kill()
    killed = time.monotonic()
    command.wait_for(r"worker \d: .*Going on from the last checkpoint")
    noticed = time.monotonic()
    command.wait_for(rf"epoch {last_told(command) + 1}/")
    ended = time.monotonic()
    print(f"noticed after {noticed - killed:.1f} s, the next epoch had ended after {ended - killed:.1f} s")
    assert ended - killed < 60  # 18 s on an idle machine
    (tmp_path / "strike").touch()
    command.wait_for(r"worker \d: MemoryError.*Going on from the last checkpoint")
    command.wait_for(rf"epoch {last_told(command) + 1}/")
    workers = command.workers()
    assert len(workers) == 2
    for spared in (
        "TrainController",
        "PlacementGroupCleaner",
        "dashboard/dashboard.py",
        "monitor.py",
        "DashboardAgent",
    ):
        assert command.workers(spared) == []  # they would cost seconds of every start
    assert "Traceback" not in command.text()
    command.process.kill()
    _, alive = psutil.wait_procs(workers, timeout=40)
    assert alive == []

    done = len(records(run))
    command = start("--runs", runs, "--name", "run", "--resume", "--cpus", "2")
    command.wait_for(rf"epoch {done + 3}/")
    family = command.family()
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal sends it: to all processes
    assert command.wait(60) == 130, command.text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert "Traceback" not in command.text()
    typed = re.search(r"to go on: python (.*)", command.text())
    assert typed, command.text()
    assert shlex.split(typed[1]) == [TRAIN, "--runs", runs, "--name", "run", "--resume"]  # the path as it was typed
    saved = int(run.names("checkpoints")[-1][5:14])
    assert 13 * (done + 3) <= saved < 13 * EPOCHS

    train(config, run, 2)
    assert differing(final(run), final(whole)) == []
    assert [r["epoch"] for r in records(run)] == list(range(EPOCHS))
    for ours, theirs in zip(records(run), records(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.slow
def test_second_signal_stops_at_once(start: Start, dataset: Path) -> None:
    """While the workers are only starting, and nobody hears of the first one yet."""
    command = start(*flags(job(dataset, epochs=EPOCHS)))
    command.wait_for("2 CPU workers")
    time.sleep(3)
    family = command.family()
    command.process.send_signal(signal.SIGTERM)
    command.wait_for("Ctrl-C again stops at once")
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(30) == 143
    assert time.monotonic() - asked < 15
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []

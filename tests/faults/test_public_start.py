"""Training and searching by Ray's public doors alone, as on a release of Ray that is not known yet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dogvae
from tests.faults.test_processes import flags
from tests.support.command import TRAIN, Command
from tests.support.runs import EPOCHS, differing, final, job, records

Start = Callable[..., Command]
PUBLIC = {**os.environ, "DOGVAE_FAST_START": "0"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    commands: list[Command] = []

    def begin(*args: str) -> Command:
        commands.append(Command(tmp_path, *args, env=PUBLIC))
        return commands[-1]

    yield begin
    for command in commands:
        command.stop()


@pytest.mark.slow
def test_run_with_a_killed_worker_ends_as_one_without(start: Start, dataset: Path, whole: Path, tmp_path: Path) -> None:
    command = start(TRAIN, *flags(job(dataset, epochs=EPOCHS)))
    command.wait_for(r"epoch 3/")
    workers = command.workers()
    assert len(workers) == 2
    assert len(command.workers("TrainController")) == 1
    workers[-1].kill()
    assert command.wait(180) == 0, command.text()
    assert "Going on from the last checkpoint" in command.text()
    assert "Traceback" not in command.text()
    run = tmp_path / "runs/run"
    assert differing(final(run), final(whole)) == []
    assert [r["epoch"] for r in records(run)] == list(range(EPOCHS))
    assert dogvae.load(run / "export").sample(2).shape == (2, 32, 32, 3)


@pytest.mark.slow
def test_search_with_two_workers_a_trial(start: Start, dataset: Path, tmp_path: Path) -> None:
    fixed = [text for value in ("width=4", "latent_dim=4", "latent_size=4") for text in ("--set", value)]
    command = start(
        "-m", "tune", "search", "--data", str(dataset), "--name", "s", "--trials", "2", "--workers-per-trial", "2",
        "--epochs", "2", "--scheduler", "none", "--search", "lr=loguniform(0.001,0.01)", *fixed,
    )  # fmt: skip
    assert command.wait(240) == 0, command.text()
    trials = json.loads((tmp_path / "runs/s/trials.json").read_text())
    assert [trial["state"] for trial in trials] == ["done"] * 2
    assert [len(records(tmp_path / "runs/s/trials" / trial["name"])) for trial in trials] == [2, 2]
    assert (tmp_path / "runs/s/export/model.safetensors").exists()

"""The search on real Ray, interrupted and killed: every trial once, the best one exported, and the run that goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import dogvae
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.inference.elbo import evaluate
from dogvae.storage import Storage
from tests.support.command import Command, wait_until
from tests.support.runs import make_dataset, records
from tune.search_folder import open_search
from tune.space import Space

TRIALS, EPOCHS = 6, 8
SPACE = ["latent_dim=choice(4,8)", "lr=loguniform(1e-4,1e-2)", "samples=choice(1,2)", "beta=choice(1,3e38)"]
TRIAL = "ImplicitFunc"  # how Ray calls the processes in which trials train
FIXED = ["preset=small", "width=4", "batch_size=8"]


def states(where: Path) -> dict[int, str]:
    file = where / "runs/s/trials.json"
    return {e["number"]: e["state"] for e in json.loads(file.read_text())} if file.exists() else {}


def epochs_of(where: Path) -> dict[str, int]:
    return {p.parent.name: len(p.read_text().splitlines()) for p in (where / "runs/s/trials").glob("*/metrics.jsonl")}


def names_of(family: list[psutil.Process]) -> list[str]:
    """Of those that are still there."""
    names = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/s: a search that got Ctrl-C in its first trials, then lost a trial's process, then its driver."""
    where = tmp_path_factory.mktemp("search")
    dataset = make_dataset(where / "dataset")
    typed = ["-m", "tune", "search", "--data", str(dataset), "--name", "s", "--trials", str(TRIALS)]
    typed += ["--epochs", str(EPOCHS), *(text for domain in SPACE for text in ("--search", domain))]
    first = Command(where, *typed, *(text for setting in FIXED for text in ("--set", setting)))
    first.wait_until(lambda: sum(epochs_of(where).values()) >= 2)
    family = first.family()
    os.killpg(first.process.pid, signal.SIGINT)  # as a terminal sends it: to all processes
    assert first.process.wait(60) == 130, first.text()
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert "Traceback" not in first.text()
    assert states(where)[0] == "waiting"
    assert set(states(where).values()) <= {"waiting", "failed"}
    stopped = re.search(r"to go on: python (.*)", first.text())
    assert stopped, first.text()

    second = Command(where, *shlex.split(stopped[1]))
    second.wait_until(lambda: second.workers(TRIAL) and states(where)[0] == "running")
    second.workers(TRIAL)[0].kill()
    second.wait_until(lambda: "done" in states(where).values())
    names = [e["name"] for e in json.loads((where / "runs/s/trials.json").read_text()) if e["state"] == "done"]
    assert "trial 0 has lost its process or node: it goes on from its last checkpoint" in second.text()
    assert "Traceback" not in second.text()
    kept = {path: path.read_bytes() for n in names if (path := where / f"runs/s/trials/{n}/metrics.jsonl").exists()}
    family = second.family()
    second.process.kill()
    second.process.wait()
    # No trial trains any more. Ray's agents see after a minute that it has gone, a process that just started in half.
    wait_until(lambda: all("Agent" in name for name in names_of(family)), 60)
    before = states(where)

    third = Command(where, *shlex.split(stopped[1]))
    assert third.process.wait(240) == 0, third.text()
    (where / "last").write_text(third.text())
    assert kept
    assert all(path.read_bytes().startswith(data) for path, data in kept.items())
    assert all(states(where)[n] == "done" for n, state in before.items() if state == "done")
    return where


@pytest.mark.slow
def test_every_trial_is_there_once(searched: Path) -> None:
    """With the setting that the seed says, whatever came between; the first is the nearest to the notebook's."""
    found = open_search(str(searched / "runs"), "s")
    space = Space.parse(SPACE, {})
    assert [t.number for t in found.trials] == list(range(TRIALS))
    assert [t.setting for t in found.trials] == [space.setting(0, n) for n in range(TRIALS)]
    assert found.trials[0].setting == {"latent_dim": 8, "lr": 1e-3, "samples": 2, "beta": 1.0}
    for trial in found.trials:
        assert [r["epoch"] for r in trial.records] == list(range(trial.epoch))
    done = [t for t in found.trials if t.state == "done"]
    assert done
    assert all(t.epoch == EPOCHS for t in done)
    with (searched / "runs/s/report.csv").open() as file:
        assert sorted(int(row["trial"]) for row in csv.DictReader(file)) == list(range(TRIALS))


@pytest.mark.slow
def test_trials_with_bad_numbers_are_marked_and_the_others_go_on(searched: Path) -> None:
    for trial in open_search(str(searched / "runs"), "s").trials:
        if trial.setting["beta"] > 1:
            assert trial.state == "failed"
            assert re.search(r"gradients of 20 steps in a row .* --lr", trial.reason)
        else:
            assert trial.state in ("done", "stopped")
            assert (trial.state == "done") == (trial.epoch == EPOCHS)


@pytest.mark.slow
def test_interrupted_trial_ends_as_one_that_was_not(searched: Path) -> None:
    """Trial 0 was interrupted: the same loop, undisturbed, has the same numbers."""
    from dogvae.training.loop import loop
    from dogvae.training.observer import Observer

    (folder,) = (searched / "runs/s/trials").glob("00-*")
    config = Config.from_json((folder / "config.json").read_text(), "config.json")
    loop(config, Storage(searched / "whole"), torch.device("cpu"), Observer())
    assert records(folder) == records(searched / "whole")


@pytest.mark.slow
def test_export_is_the_best_trial(searched: Path) -> None:
    """Its validation ELBO, evaluated afresh, is the table's."""
    found = open_search(str(searched / "runs"), "s")
    best = min((t.best for t in found.trials if t.best and t.state != "failed"), key=lambda r: r["val_loss"])
    model = dogvae.load(searched / "runs/s/export", "cpu").model
    val = Dataset(found.about["config"]["data"]).val
    assert evaluate(model, val, torch.device("cpu"))["loss"] == pytest.approx(best["val_loss"], rel=1e-3)
    assert f"{best['val_loss']:,.1f} nats" in (searched / "last").read_text()


@pytest.mark.slow
def test_run_that_goes_on_with_the_best(searched: Path) -> None:
    """The command that the search ends with: a run of its own that begins where the trial was."""
    typed = re.search(r"dogvae (train --from-search s) --epochs \d+", (searched / "last").read_text())
    assert typed
    command = Command(searched, "-m", "dogvae", *typed[1].split(), "--epochs", "10", "--cpus", "1",
                      "--name", "longer")  # fmt: skip
    assert command.process.wait(180) == 0, command.text()
    assert [r["epoch"] for r in records(searched / "runs/longer")] == list(range(10))
    best = min(
        (t for t in open_search(str(searched / "runs"), "s").trials if t.best and t.state != "failed"),
        key=lambda t: t.best["val_loss"] if t.best else 0.0,
    )
    theirs = records(searched / f"runs/s/trials/{best.name}")
    assert records(searched / "runs/longer")[: len(theirs)] == theirs


@pytest.mark.slow
def test_search_that_never_fits(tmp_path: Path) -> None:
    command = Command(tmp_path, "-m", "tune", "search", "--data", "drawn:60", "--cpus-per-trial", "4096")
    assert command.process.wait(120) == 2
    assert "--cpus-per-trial" in command.text()
    assert not list(tmp_path.rglob("search.json"))

"""A search on real Ray, interrupted and killed: every trial once, the best one exported, and trained longer."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import dogvae
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.inference.elbo import evaluate
from tests.support.command import Command, wait_until
from tests.support.runs import make_dataset, records, train
from tune.search_folder import Trial, open_search
from tune.space import Space

pytestmark = pytest.mark.slow
TRIALS, EPOCHS = 6, 8
SPACE = ["latent_dim=choice(4,8)", "lr=loguniform(1e-4,1e-2)", "samples=choice(1,2)", "beta=choice(1,3e38)"]
TRIAL = "ImplicitFunc"  # Ray's name for the processes of trials
FIXED = ["preset=small", "width=4", "batch_size=8"]


def entries(where: Path) -> list[dict[str, Any]]:
    """The content of trials.json."""
    file = where / "runs/s/trials.json"
    return json.loads(file.read_text()) if file.exists() else []


def states(where: Path) -> dict[int, str]:
    return {entry["number"]: entry["state"] for entry in entries(where)}


def metrics(where: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in (where / "runs/s/trials").glob("*/metrics.jsonl")}


def alive(family: list[psutil.Process]) -> list[str]:
    """The names of the processes that are still running."""
    names = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


def best_trial(where: Path) -> Trial:
    trials = open_search(str(where / "runs"), "s").trials
    return min((t for t in trials if t.best and t.state != "failed"), key=lambda t: t.best["val_loss"])  # type: ignore


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs/s: a search that got Ctrl-C, then lost a trial's process, then its driver, and then ended."""
    where = tmp_path_factory.mktemp("search")
    dataset = make_dataset(where / "dataset")
    typed = ["-m", "tune", "search", "--data", str(dataset), "--name", "s", "--trials", str(TRIALS)]
    typed += ["--epochs", str(EPOCHS), *(text for domain in SPACE for text in ("--search", domain))]
    first = Command(where, *typed, *(text for setting in FIXED for text in ("--set", setting)))
    first.wait_until(lambda: b"".join(metrics(where).values()).count(b"\n") >= 2)
    family = first.family()
    os.killpg(first.process.pid, signal.SIGINT)  # to all processes, as a terminal does
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
    done = [entry["name"] for entry in entries(where) if entry["state"] == "done"]
    assert re.search(r"trial \d has lost its process or node: it goes on from its last checkpoint", second.text())
    assert "Traceback" not in second.text()
    kept = {file: lines for file, lines in metrics(where).items() if file.parent.name in done}
    family = second.family()
    second.process.kill()
    second.process.wait()
    # Wait until no trial trains any more. Ray's agents notice a dead driver only after a minute.
    wait_until(lambda: all("Agent" in name for name in alive(family)), 60)
    before = states(where)

    third = Command(where, *shlex.split(stopped[1]))
    assert third.process.wait(240) == 0, third.text()
    (where / "last").write_text(third.text())
    assert kept
    assert all(file.read_bytes().startswith(lines) for file, lines in kept.items())
    assert all(states(where)[n] == "done" for n, state in before.items() if state == "done")
    return where


def test_every_trial_is_there_once_with_the_settings_of_its_number(searched: Path) -> None:
    found = open_search(str(searched / "runs"), "s")
    space = Space.parse(SPACE, {})
    assert [t.number for t in found.trials] == list(range(TRIALS))
    assert [t.setting for t in found.trials] == [space.setting(0, n) for n in range(TRIALS)]
    assert found.trials[0].setting == {"latent_dim": 8, "lr": 1e-3, "samples": 2, "beta": 1.0}
    for trial in found.trials:
        assert [r["epoch"] for r in trial.records] == list(range(trial.epoch))
    assert "done" in states(searched).values()
    with (searched / "runs/s/report.csv").open() as file:
        assert sorted(int(row["trial"]) for row in csv.DictReader(file)) == list(range(TRIALS))


def test_table_of_settings_names_trials_by_search_and_number(searched: Path) -> None:
    """Trials of two searches in one TensorBoard would else share a row."""
    told = []
    for file in sorted((searched / "runs/s/trials").glob("*/*.hparams")):
        metadata = EventAccumulator(str(file)).Reload().SummaryMetadata("_hparams_/session_start_info")
        told.append(HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.group_name)
    assert told == [f"s {number:02d}" for number in range(TRIALS)]


def test_trials_with_bad_numbers_have_failed_and_the_others_ended(searched: Path) -> None:
    for trial in open_search(str(searched / "runs"), "s").trials:
        if trial.setting["beta"] > 1:
            assert trial.state == "failed"
            assert re.search(r"gradients of 20 steps in a row .* --lr", trial.reason)
        else:
            assert trial.state == ("done" if trial.epoch == EPOCHS else "stopped")


def test_interrupted_trial_ends_with_the_numbers_of_an_undisturbed_run(searched: Path) -> None:
    (folder,) = (searched / "runs/s/trials").glob("00-*")
    config = Config.from_json((folder / "config.json").read_text(), "config.json")
    train(config, searched / "whole")
    assert records(folder) == records(searched / "whole")


def test_export_has_the_loss_of_the_best_trial(searched: Path) -> None:
    best = best_trial(searched).best
    assert best
    model = dogvae.load(searched / "runs/s/export", "cpu").model
    val = Dataset(open_search(str(searched / "runs"), "s").about["config"]["data"]).val
    assert evaluate(model, val, torch.device("cpu"))["loss"] == pytest.approx(best["val_loss"], rel=1e-3)
    assert f"{best['val_loss']:,.1f} nats" in (searched / "last").read_text()


def test_printed_command_trains_the_best_trial_longer(searched: Path) -> None:
    typed = re.search(r"dogvae (train --from-search s) --epochs \d+", (searched / "last").read_text())
    assert typed
    typed_on = [*typed[1].split(), "--epochs", "10", "--cpus", "1", "--name", "longer"]
    command = Command(searched, "-m", "dogvae", *typed_on)
    assert command.process.wait(180) == 0, command.text()
    longer, begun = records(searched / "runs/longer"), records(searched / f"runs/s/trials/{best_trial(searched).name}")
    assert [r["epoch"] for r in longer] == list(range(10))
    assert longer[: len(begun)] == begun

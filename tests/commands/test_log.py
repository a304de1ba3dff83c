"""`--log` through Ray: a run on two workers that is stopped and resumed, and a search, in both trackers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.tensorboard import tag_of
from tests.support.command import TRAIN, Command
from tests.support.runs import make_dataset
from tests.support.trackers import of_mlflow, of_wandb


@pytest.mark.slow
def test_run_and_trials_of_ray_are_in_both_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is stopped by Ctrl-C, and goes on by the command that it prints."""
    dataset = make_dataset(tmp_path / "dataset")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # the default: mlflow.db in the command's folder
    small = ["--preset", "small", "--width", "4", "--batch-size", "8"]
    typed = ["--data", str(dataset), "--name", "dogs", "--epochs", "8", "--cpus", "2", "--log", "wandb,mlflow", *small]
    first = Command(tmp_path, TRAIN, *typed)
    first.wait_for("epoch 2/8", 240)
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.wait(240) == 130, first.text()
    go_on = re.search(r"to go on: python (.*)", first.text())
    assert go_on
    assert go_on[1].endswith(" --resume --log wandb,mlflow")
    second = Command(tmp_path, TRAIN, *shlex.split(go_on[1])[1:])
    assert second.wait(240) == 0, second.text()

    search = ["-m", "tune", "search", "--data", str(dataset), "--name", "best", "--trials", "2", "--epochs", "2"]
    search += ["--set", "preset=small", "--set", "width=4", "--set", "batch_size=8", "--log", "wandb,mlflow"]
    third = Command(tmp_path, *search)
    assert third.wait(240) == 0, third.text()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folders = [tmp_path / "runs/dogs", *sorted((tmp_path / "runs/best/trials").iterdir())]
    trials = json.loads((tmp_path / "runs/best/trials.json").read_text())
    states = {trial["name"]: trial["state"].replace("done", "finished") for trial in trials}  # ASHA may stop one
    for survives, runs in ((True, of_mlflow()), (False, [one for folder in folders for one in of_wandb(folder)])):
        sent = {one.name: one for one in runs}
        assert (len(runs), set(sent)) == (3, {folder.name for folder in folders})
        for folder in folders:
            records, one = metrics.read(Storage(folder)), sent[folder.name]
            lines = {r["epoch"] + 1: {tag_of(k): v for k, v in r.items() if k != "epoch"} for r in records}
            assert one.numbers == lines
            assert one.group == ("" if folder.name == "dogs" else "best")
            # Ray may kill a stopped trial, and with it what W&B has in its buffers.
            assert one.pictures or (one.state == "stopped" and not survives)
        assert {name: one.state for name, one in sent.items()} == {"dogs": "finished", **states}

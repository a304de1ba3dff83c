"""`--log`: what a run leaves in Weights & Biases and in MLflow, read back by their own tools, without Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.tune
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.loop import loop
from dogvae.training.previews import FITTED, NORMAL, WALK
from dogvae.training.tensorboard import tag_of
from dogvae.training.trackers import Tracking, prepare
from tests.support.cli import refused
from tests.support.runs import StopAt, job, make_dataset
from tests.support.searches import PLAN, setting
from tests.support.trackers import Sent, of_mlflow, of_wandb
from tune import trial
from tune.trial import SharedByTrials, name_of

CPU = torch.device("cpu")
CLOCK = {"images_per_s", "data_wait", "seconds"}  # an epoch that is repeated has other ones
NAMES = ["wandb", "sqlite", "folder"]  # the trackers; MLflow has two kinds of local stores


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("trackers") / "dataset")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path) -> Iterator[None]:
    """Nothing leaves the machine, and the variables that a run sets are those of its test alone."""
    before = dict(os.environ)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    yield
    os.environ.clear()
    os.environ.update(before)


def tracking_of(name: str, where: Path, group: str = "") -> Tracking:
    if name == "folder":  # MLflow 3 asks for the second variable
        os.environ |= {"MLFLOW_TRACKING_URI": str(where / "store"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    os.chdir(where)  # MLflow puts the pictures of a database beside it
    names = {"wandb": ["wandb"], "both": ["wandb", "mlflow"]}.get(name, ["mlflow"])
    tracking = prepare(names, str(where))
    assert tracking
    return replace(tracking, group=group)


def sent_by(name: str, run: Path) -> Sent:
    (only,) = of_wandb(run) if name == "wandb" else of_mlflow()
    return only


def numbers_of(run: Path, without: set[str] = CLOCK) -> dict[int, dict[str, float]]:
    """The finite numbers of metrics.jsonl by step and TensorBoard's tag."""
    drop = {"epoch", *without}
    records = metrics.read(Storage(run))
    return {r["epoch"] + 1: {tag_of(k): v for k, v in r.items() if k not in drop and v is not None} for r in records}


def pictures_of(run: Path) -> dict[str, dict[int, tuple[int, int]]]:
    """The sizes of TensorBoard's pictures by tag and step."""
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    return {tag: {e.step: (e.width, e.height) for e in events.Images(tag)} for tag in events.Tags()["images"]}


def comparable(value: Any) -> float | str:
    """A setting: MLflow keeps texts, and W&B writes 1.0 as 1."""
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def without_clock(sent: Sent) -> dict[int, dict[str, float]]:
    clock = {tag_of(name) for name in CLOCK}
    return {step: {k: v for k, v in numbers.items() if k not in clock} for step, numbers in sent.numbers.items()}


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_run_is_one_run_of_the_tracker_with_each_epoch_once(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    """The kill came before any checkpoint was written, so all epochs are repeated."""
    config, run = job(dataset, epochs=3), tmp_path / "dogs"
    tracking = tracking_of(name, tmp_path)
    assert not loop(config, Storage(run), CPU, StopAt(30), tracking=tracking)
    first = sent_by(name, run)
    assert (first.name, first.state, first.numbers) == ("dogs", "stopped", numbers_of(run, set()))
    shutil.rmtree(run / "checkpoints")
    observer = StopAt()
    assert loop(config, Storage(run), CPU, observer, tracking=tracking)
    sent = sent_by(name, run)
    assert sent.state == "finished"
    assert without_clock(sent) == numbers_of(run)
    assert set(sent.numbers) == {1, 2, 3}
    assert {k: comparable(sent.config[k]) for k in config.flat()} == {
        k: comparable(v) for k, v in config.flat().items()
    }
    best = metrics.best(metrics.read(Storage(run)))
    assert best
    assert (sent.best["best/epoch"], sent.best["best/loss"]) == (best["epoch"] + 1, best["val_loss"])
    for label in (NORMAL, FITTED, "reconstructions", WALK):
        tag = re.sub("[(),]", "", f"view/{label}") if name != "wandb" else f"view/{label}"  # MLflow takes no such names
        assert sent.pictures[tag] == pictures_of(run)[f"view/{label}"]
    assert [line for line in observer.notes if line.startswith("--log")] == []


def test_tracker_that_fails_leaves_the_training_alone_and_gets_the_rest_later(dataset: Path, tmp_path: Path) -> None:
    """The database is damaged after the first epoch, and mended before the run is resumed for one more epoch."""
    run, database = tmp_path / "dogs", tmp_path / "mlflow.db"
    tracking = tracking_of("sqlite", tmp_path)

    class Damaging(StopAt):
        def epoch(self, record: dict[str, Any]) -> None:
            if record["epoch"] == 0:
                while not (run / "mlflow.json").exists() or json.loads((run / "mlflow.json").read_text())["epochs"] < 1:
                    pass
                shutil.copy(database, tmp_path / "whole.db")
                database.write_bytes(b"damaged " * 100_000)

    observer = Damaging()
    assert loop(job(dataset, epochs=3), Storage(run), CPU, observer, tracking=tracking)
    (warning,) = (line for line in observer.notes if line.startswith("--log"))
    assert warning.startswith("--log mlflow: ")
    assert warning.endswith("; the training goes on, and --resume --log mlflow sends what is missing")
    assert len(metrics.read(Storage(run))) == 3
    shutil.copy(tmp_path / "whole.db", database)
    assert loop(job(dataset, epochs=4), Storage(run), CPU, StopAt(), tracking=tracking)
    sent = sent_by("sqlite", run)
    assert (sent.state, sent.numbers) == ("finished", numbers_of(run, set()))


@pytest.mark.parametrize("name", NAMES[:2])
def test_failed_run_is_failed_in_the_tracker(name: str, dataset: Path, tmp_path: Path) -> None:
    class Breaking(StopAt):
        def epoch(self, record: dict[str, Any]) -> None:
            raise RuntimeError("bad luck")

    tracking = tracking_of(name, tmp_path)
    with pytest.raises(RuntimeError, match="bad luck"):
        loop(job(dataset, epochs=3), Storage(tmp_path / "dogs"), CPU, Breaking(), tracking=tracking)
    sent = sent_by(name, tmp_path / "dogs")
    assert (sent.state, set(sent.numbers)) == ("failed", {1})


def test_trials_are_runs_grouped_by_the_name_of_the_search(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials, one after the other in one process, as Ray Tune has them."""
    config = job(dataset, epochs=2)
    tracking = tracking_of("both", tmp_path, "best")
    shared = SharedByTrials(
        search=str(tmp_path / "best"), config=config, space=PLAN.space, workers=1, cpus=1, gpus=0.0, ended=frozenset(),
        population=False, events="events", tracking=tracking,
    )  # fmt: skip
    monkeypatch.setattr(ray.tune, "report", lambda numbers, checkpoint=None: None)
    monkeypatch.setattr(trial, "is_stopping", lambda events: False)
    settings = [{**setting(lr=lr), "latent_dim": 4} for lr in (0.002, 0.004)]
    for number, chosen in enumerate(settings):
        name = name_of(number, chosen)
        context = SimpleNamespace(get_trial_dir=lambda name=name: f"/tune/{name}")
        monkeypatch.setattr(ray.tune, "get_context", lambda context=context: context)
        trial.run_trial({"trial": {"number": number, "name": name, "setting": chosen}}, shared)
    folders = [tmp_path / "best/trials" / name_of(n, chosen) for n, chosen in enumerate(settings)]
    for sent in (of_mlflow(), [one for folder in folders for one in of_wandb(folder)]):
        sent = sorted(sent, key=lambda one: one.name)
        assert [(one.name, one.group) for one in sent] == [(folder.name, "best") for folder in folders]
        assert [one.numbers for one in sent] == [numbers_of(folder, set()) for folder in folders]
        assert [float(one.config["lr"]) for one in sent] == [0.002, 0.004]
        assert all(one.pictures and one.state == "finished" for one in sent)


@pytest.mark.parametrize("command", ["train --name dogs", "search --name dogs"])
@pytest.mark.parametrize(
    ("log", "wrong", "message"),
    [
        ("wandb", {}, "--log wandb: it is not installed; type pip install 'dogvae[wandb]'"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "--log mlflow: API request to http://127.0.0.1:9"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "store"}, "set `MLFLOW_ALLOW_FILE_STORE=true`"),
        ("wandb,mlfow", {}, "'mlfow' is none of wandb, mlflow; did you mean mlflow?"),
    ],
)
def test_tracker_that_cannot_be_used_is_an_error_before_anything_starts(
    command: str, log: str, wrong: dict[str, str], message: str, dataset: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    os.environ |= wrong
    assert message in refused(capsys, *command.split(), "--data", dataset, "--log", log)
    assert list(tmp_path.iterdir()) == []


def test_missing_key_is_an_error_and_no_question(dataset: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "dogvae", "train", "--data", str(dataset), "--log", "wandb"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    expected = "error: --log wandb: there is no API key; type wandb login, or set WANDB_API_KEY or WANDB_MODE=offline\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", expected)


def test_keys_are_not_printed_with_the_settings() -> None:
    os.environ["WANDB_API_KEY"] = "secret"
    tracking = Tracking(("wandb",), dict(os.environ))
    assert asdict(tracking)["environment"]["WANDB_API_KEY"] == "secret"
    assert "secret" not in repr(tracking)

"""One trial under Ray Tune: what it reports, when it trains, and which checkpoint it takes over in PBT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.tune
import torch

from dogvae.config import Config
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints
from tests.support.searches import PLAN, Spec, contents, entry, record, setting, write_search
from tune import trial
from tune.trial import SharedByTrials

OWN = PLAN.config.replace(**setting(lr=0.004))  # the config of the trial under test
Reports = list[tuple[dict[str, Any], Any]]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    """What is reported to Tune: the numbers, and the files of the checkpoint, if there is one."""
    told: Reports = []

    def report(numbers: dict[str, Any], checkpoint: Any = None) -> None:
        files = {path.name: path.read_text() for path in Path(checkpoint.path).iterdir()} if checkpoint else None
        told.append((numbers, files))

    monkeypatch.setattr(ray.tune, "report", report)
    return told


@pytest.mark.parametrize(
    ("loss", "told"), [(500.5, 500.5), (None, math.inf), (math.nan, math.inf), (-math.inf, math.inf), (-3.0, -3.0)]
)
def test_every_loss_is_reported_as_a_number(loss: float | None, told: float, reports: Reports) -> None:
    numbers = {**record(4, 1.0), "val_loss": loss}
    trial.report(numbers)
    assert reports == [({"loss": told, "epochs": 5, "record": numbers}, None)]


def test_observer_lets_tune_end_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(numbers: dict[str, Any]) -> None:
        raise SystemExit

    monkeypatch.setattr(ray.tune, "report", end)
    observer = trial._TuneObserver("events", None)
    assert observer.wants_saved  # the epoch is stored before Tune ends the process
    with pytest.raises(SystemExit):
        observer.epoch(record(1, 1.0))


def test_observer_asks_twice_a_second_whether_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now, answers = [1000.0], iter([False, True])
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(trial, "is_stopping", lambda events: next(answers))
    observer = trial._TuneObserver("events", None)
    for expected in (False, False, True):
        assert [observer.stopping() for _ in range(100)] == [expected] * 100
        now[0] += 0.5


# --- run_trial


class OneTrial:
    """Trial 0, with `train` in place of the training. `run` calls it as Tune does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = write_search(folder, [Spec(setting(), state="waiting")]) / "trials" / entry(0).name
        self.trained: list[Config] = []
        self.train: Callable[[Any], bool] = lambda observer: True
        self.stopping = False

        def train_here(shared: SharedByTrials, config: Config, storage: Storage, observer: Any) -> bool:
            assert storage.uri == str(self.folder)
            self.trained.append(config)
            return self.train(observer)

        context = SimpleNamespace(get_trial_dir=lambda: f"/tune/somewhere/{self.folder.name}")
        monkeypatch.setattr(ray.tune, "get_context", lambda: context)
        monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: None)
        monkeypatch.setattr(trial, "_train_here", train_here)
        monkeypatch.setattr(trial, "is_stopping", lambda events: self.stopping)

    def run(self, ended: frozenset[str] = frozenset(), population: bool = False) -> None:
        shared = SharedByTrials(
            search=str(self.folder.parent.parent), config=PLAN.config, space=PLAN.space, workers=1, cpus=1, gpus=0.0,
            ended=ended, population=population, events="events",
        )  # fmt: skip
        trial.run_trial({"trial": {"number": 0, "name": "other", "setting": setting(lr=0.004)}}, shared)


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OneTrial:
    return OneTrial(tmp_path, monkeypatch)


def test_trial_trains_its_settings_in_its_folder(one: OneTrial, reports: Reports) -> None:
    one.train = lambda observer: observer.epoch(record(0, 500.0)) or True
    one.run()
    assert one.trained == [OWN]
    assert Config.from_json((one.folder / "config.json").read_text(), "") == OWN
    assert [(numbers["loss"], numbers["epochs"], files) for numbers, files in reports] == [(500.0, 1, None)]


@pytest.mark.parametrize("ended", [True, False])
def test_resumed_trial_reports_its_epochs_and_goes_on_unless_ended(
    ended: bool, one: OneTrial, reports: Reports
) -> None:
    lines = [json.dumps(record(epoch, loss)) for epoch, loss in enumerate((500.0, None))]
    Storage(one.folder).write("metrics.jsonl", "\n".join(lines).encode())
    one.train = lambda observer: observer.epoch(record(2, 490.0)) or True
    one.run(ended=frozenset([one.folder.name if ended else "another"]))
    told = [(1, 500.0), (2, math.inf)] + [(3, 490.0)] * (not ended)
    assert [(numbers["epochs"], numbers["loss"]) for numbers, _ in reports] == told


@pytest.mark.parametrize("begun", [True, False])
def test_trial_of_a_stopping_search_is_waiting(begun: bool, one: OneTrial, reports: Reports) -> None:
    one.train = lambda observer: False
    one.stopping = not begun
    one.run()
    assert reports == [({"state": "waiting"}, None)]
    assert (len(one.trained), one.folder.exists()) == (begun, begun)


@pytest.mark.parametrize("error", [RunFailed("bad numbers\nmore"), UsageError("bad numbers")])
def test_failed_trial_reports_the_first_line_of_its_error(error: Exception, one: OneTrial, reports: Reports) -> None:
    def train(observer: Any) -> bool:
        raise error

    one.train = train
    one.run()
    assert reports == [({"state": "failed", "reason": "bad numbers"}, None)]


# --- population based training


def tune_has_checkpoint_of(writer: str, one: OneTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = one.folder.parent / "from-tune"
    folder.mkdir()
    (folder / "writer.json").write_text(json.dumps(writer))
    checkpoint = SimpleNamespace(as_directory=lambda: nullcontext(str(folder)))
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: checkpoint)


def save_checkpoint(folder: Path, weight: float, step: int, config: Config, **meta: Any) -> None:
    checkpoints = Checkpoints(Storage(folder))
    tensors = {"w": torch.full((2, 3), weight)}
    checkpoints.save(tensors, {"step": step, "epoch": 0, "config": config.to_dict(), **meta})
    checkpoints.wait()


def latest(folder: Path) -> tuple[float, dict[str, Any]]:
    saved = Checkpoints(Storage(folder)).latest()
    assert saved is not None
    return saved.tensors["w"][0, 0].item(), saved.meta


@pytest.mark.parametrize("lr", [0.007, 0.004])
def test_pbt_trial_takes_over_a_better_ones_weights_with_its_own_settings(
    lr: float, one: OneTrial, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = one.folder.parent / "01-better"
    save_checkpoint(better, 7.0, 30, OWN.replace(lr=lr), records=["past"])
    save_checkpoint(one.folder, 1.0, 30, OWN, records=[])
    save_checkpoint(one.folder, 1.5, 40, OWN, records=[])
    before = contents(better)
    tune_has_checkpoint_of("01-better", one, monkeypatch)
    one.run(population=True)
    weight, meta = latest(one.folder)
    assert (weight, meta["step"], meta["records"], meta["config"]) == (7.0, 30, ["past"], OWN.to_dict())
    assert len(list((one.folder / "checkpoints").iterdir())) == 1  # its own step 40 would be the latest
    assert contents(better) == before
    assert one.trained == [OWN]


def test_pbt_trial_keeps_its_own_checkpoints_when_it_goes_on(
    one: OneTrial, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(one.folder, 1.0, 30, OWN, val_loss=400.0)
    save_checkpoint(one.folder, 2.0, 40, OWN, val_loss=500.0)
    before = contents(one.folder / "checkpoints")
    one.train = lambda observer: observer.epoch(record(3, 500.0)) or True
    one.run(population=True)  # after an interruption: Tune has no checkpoint
    tune_has_checkpoint_of(one.folder.name, one, monkeypatch)
    one.run(population=True)
    assert contents(one.folder / "checkpoints") == before
    assert [files for _, files in reports] == 2 * [{"writer.json": json.dumps(one.folder.name)}]


def test_interrupted_pbt_trial_gets_its_new_settings_into_its_checkpoint(one: OneTrial, reports: Reports) -> None:
    """A kill came after PBT chose the settings, and before the trial wrote them."""
    save_checkpoint(one.folder, 1.0, 30, OWN.replace(lr=0.009))
    one.run(population=True)
    assert latest(one.folder)[1]["config"]["lr"] == 0.004

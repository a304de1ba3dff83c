"""Between Ray Tune and the search's files: states in trials.json, stopping, and the resources of a trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dogvae.storage import Storage
from tests.support.searches import EPOCHS, PLAN, SPACE, entry, record, setting
from tune import search
from tune.live import SearchProgress
from tune.search_folder import Entry, SearchPlan, open_search, save


class Tune:
    """Calls the callback as Ray Tune does; its trials are those of `tunes_trial`."""

    def __init__(self, folder: Path, known: Sequence[Entry] = ()) -> None:
        self.progress, self.runs = SearchProgress(6, EPOCHS, list(SPACE), known), folder
        save(Storage(folder / "s"), PLAN, known)  # as the command does before it starts
        self.callback = search._ProgressCallback(self.progress, Storage(folder / "s"), PLAN)

    def start(self, *trials: Any) -> None:
        for trial in trials:
            self.callback.on_trial_start(1, [], trial)

    def result(self, trial: Any, **result: Any) -> None:
        self.callback.on_trial_result(1, [], trial, result)

    def epochs(self, trial: Any, *losses: float) -> None:
        for epoch, loss in enumerate(losses):
            self.result(trial, record=record(epoch, loss), loss=loss, epochs=epoch + 1)

    def complete(self, trial: Any) -> None:
        self.callback.on_trial_complete(1, [], trial)

    def stored(self) -> list[tuple[int, str, str]]:
        return [(t.number, t.state, t.reason) for t in open_search(str(self.runs), "s").trials]


def tunes_trial(number: int, error: str | None = None, **changes: Any) -> Any:
    one = entry(number, **changes)
    config = {"number": number, "name": one.name, "setting": one.setting}
    return SimpleNamespace(trial_id=f"abc_{number}", config={"trial": config}, get_error=lambda: error)


def test_states_of_trials_are_stored_as_they_change(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    whole, early, failing, stopped = (tunes_trial(number, lr=0.001 * (number + 1)) for number in range(4))
    tune.start(early, whole)
    assert tune.stored() == [(0, "running", ""), (1, "running", "")]
    tune.epochs(whole, *[500.0] * EPOCHS)
    tune.epochs(early, 600.0, 590.0)
    tune.complete(whole)
    tune.complete(early)
    tune.start(failing)
    tune.result(failing, state="failed", reason="bad numbers")
    tune.complete(failing)
    tune.start(stopped)
    tune.result(stopped, state="waiting")
    tune.complete(stopped)
    assert tune.stored() == [(0, "done", ""), (1, "stopped", ""), (2, "failed", "bad numbers"), (3, "waiting", "")]
    assert tune.progress._to_announce == [0, 1, 2, 3]
    found = open_search(str(tmp_path), "s")
    assert [t.setting["lr"] for t in found.trials] == [0.001, 0.002, 0.003, 0.004]
    assert SearchPlan.from_dict(found.about, "s") == PLAN


def test_trial_whose_process_died_has_failed_with_the_last_line(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    dead = tunes_trial(0, "Traceback\n  File x\nWorkerCrashedError: killed by signal 9\n")
    for trial in (dead, tunes_trial(1, lr=0.002)):
        tune.start(trial)
        tune.callback.on_trial_error(1, [], trial)
    assert tune.stored() == [(0, "failed", "WorkerCrashedError: killed by signal 9"), (1, "failed", "its process died")]
    assert tune.progress._to_announce == [0, 1]


def test_ended_trials_of_an_earlier_attempt_keep_their_state(tmp_path: Path) -> None:
    known = [entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, "failed", "why", lr=0.003), entry(3, lr=0.004)]
    tune = Tune(tmp_path, known)
    tune.start(*(tunes_trial(number, lr=0.001 * (number + 1)) for number in range(4)))
    assert tune.stored() == [(0, "done", ""), (1, "stopped", ""), (2, "running", ""), (3, "running", "")]
    tune.epochs(tunes_trial(0), 500.0, 490.0)
    tune.complete(tunes_trial(0))
    assert tune.stored()[0] == (0, "done", "")
    assert tune.progress._to_announce == []


def test_pbt_trial_keeps_its_number_and_name_with_another_trials_config(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    one, better = tunes_trial(0), tunes_trial(1, lr=0.002)
    tune.start(one, better)
    one.config = {"trial": {**better.config["trial"], "setting": setting(lr=0.0016)}}
    tune.epochs(one, 500.0)
    tune.start(one)
    tune.complete(one)
    found = open_search(str(tmp_path), "s").trials
    assert [(t.number, t.name, t.setting["lr"], t.state) for t in found] == [
        (0, "00-latent_dim32-lr0.001-samples10", 0.0016, "stopped"),
        (1, "01-latent_dim32-lr0.002-samples10", 0.002, "running"),
    ]


def test_search_ends_when_it_is_stopping_and_no_trial_runs() -> None:
    progress = SearchProgress(6, EPOCHS, list(SPACE), [])
    stopper = search._StopWhenIdle(progress)
    for stopping, state, ends in ((False, "running", False), (True, "running", False), (True, "waiting", True),
                                  (False, "waiting", False)):  # fmt: skip
        progress.stopping, progress.entries[0] = stopping, entry(0, state)
        assert stopper.stop_all() == ends
    assert not stopper("abc_0", {})


@pytest.mark.parametrize(
    ("changes", "resources"),
    [
        ({"cpus": 2, "gpus": 0.5}, {"CPU": 2.0, "GPU": 0.5}),
        ({"cpus": 1, "gpus": 0.0}, {"CPU": 1.0, "GPU": 0.0}),
        ({"workers": 4, "cpus": 2, "gpus": 1.0}, {"memory": 1.0}),  # CPUs and GPUs are left to the workers
    ],
)
def test_resources_of_a_trial(changes: dict[str, Any], resources: dict[str, float]) -> None:
    assert search._resources(replace(PLAN, **changes)) == resources

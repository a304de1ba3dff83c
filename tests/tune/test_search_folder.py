"""The files of a search: reading them back, damage named with a remedy, and the plan in search.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dogvae.config import Config
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training.run_folder import save_config
from tests.support.searches import MIXED, PLAN, Remote, Spec, entry, record, searched, setting, write_search
from tune.search_folder import SearchPlan, open_search, parameters
from tune.space import Space

ABOUT = json.loads(PLAN.to_json())
TRIAL = {"number": 0, "name": entry(0).name, "setting": setting(), "state": "done", "reason": ""}
METRICS = f"trials/{entry(0).name}/metrics.jsonl"


def without(key: str, about: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name != key}


def test_search_is_read_back(tmp_path: Path) -> None:
    specs = [
        Spec(setting(8), [7900.0, 7400.0, 7500.0]),
        Spec(setting(16), [7950.0, None, 7450.0], 20.0, "running"),
        Spec(setting(64), [], 1.0, "waiting"),
        Spec(setting(64, lr=0.01), [7000.0, None], 5.0, "failed", "epoch 3: the gradients were not finite"),
        Spec(setting(), [None, None], 5.0, "stopped"),
    ]
    search = searched(tmp_path, specs)
    assert search.storage.uri == f"{tmp_path}/dogs"
    assert parameters(search) == ["latent_dim", "lr", "samples"]
    assert search.space == PLAN.space
    first, second, *_ = search.trials
    assert first.name == "00-latent_dim8-lr0.001-samples10"
    assert second.records == [record(0, 7950.0, 20.0), record(1, None, 20.0), record(2, 7450.0, 20.0)]
    assert [(t.number, t.setting, t.state, t.reason) for t in search.trials] == [
        (number, spec.setting, spec.state, spec.reason) for number, spec in enumerate(specs)
    ]
    assert [trial.epoch for trial in search.trials] == [3, 3, 0, 2, 2]
    assert [trial.seconds for trial in search.trials] == [30, 60, 0, 10, 10]
    assert [trial.best and trial.best["val_loss"] for trial in search.trials] == [7400, 7450, None, 7000, None]


def test_missing_search_lists_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=rf"^there is no search called dogs in {tmp_path}/no; there is none in that folder yet$"
    ):
        open_search(str(tmp_path / "no"), "dogs")
    for name in ("cats", "birds"):
        write_search(tmp_path, [], name=name)
    save_config(Storage(tmp_path / "a-run"), PLAN.config)
    with pytest.raises(UsageError, match=rf"^there is no search called dogs in {tmp_path}; its .* are birds, cats$"):
        open_search(str(tmp_path), "dogs")
    with pytest.raises(UsageError, match=rf"^{tmp_path}/a-run is a single run, not a search.*: tensorboard --logdir"):
        open_search(str(tmp_path), "a-run")
    monkeypatch.setattr("tune.search_folder.Storage", Remote)
    assert open_search(str(tmp_path), "cats").storage.local is None
    with pytest.raises(UsageError, match=rf"^there is no search called dogs in {tmp_path}$"):
        open_search(str(tmp_path), "dogs")


@pytest.mark.parametrize("name", ["../dogs", "", "a b", ".hidden"])
def test_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        open_search(str(tmp_path), name)


@pytest.mark.parametrize(
    ("file", "content", "message"),  # content None deletes the file
    [
        ("search.json", None, "dogs is damaged: search.json is missing; restore it from a backup"),
        ("search.json", '{"format": "dog', r"dogs is damaged: search.json is not valid \(.*; restore it from a backup"),
        ("search.json", [], "dogs is not a search: .* dogvae-search; give another name"),
        ("search.json", {**ABOUT, "format": "dogvae-dataset"}, "dogs is not a search: .* dogvae-search"),
        ("search.json", {**ABOUT, "version": 2}, "version 2, newer than 1; update DogVAE"),
        ("search.json", without("version", ABOUT), "search.json has no 'version'"),
        ("search.json", {**ABOUT, "space": {}}, r"search.json is not valid \(the space is empty\)"),
        ("search.json", {**ABOUT, "space": {"lr": "normal(0,1)"}}, r"search.json is not valid \(.*'normal'"),
        ("trials.json", None, "dogs is damaged: trials.json is missing"),
        ("trials.json", '[{"number": 0', "trials.json is not valid"),
        ("trials.json", {"00-trial": {}}, "trials.json is not valid"),
        ("trials.json", [without("state", TRIAL)], "trials.json has no 'state'"),
        ("trials.json", [{**TRIAL, "state": "lost"}], "trial 0 has the state 'lost', not one of .*waiting"),
        ("trials.json", [{**TRIAL, "number": "x"}], f"number 'x' and the name '{entry(0).name}'"),
        ("trials.json", [TRIAL, {**TRIAL, "name": "another"}], "two trials have the same number"),
        ("trials.json", [TRIAL, {**TRIAL, "number": 1}], "two trials have the same name"),
        ("trials.json", [{**TRIAL, "setting": {"beta": 1.0}}], "trial 0 sets beta, not latent_dim, lr, samples"),
        ("trials.json", [{**TRIAL, "setting": {**setting(), "lr": "fast"}}], "trials.json is not valid"),
        (METRICS, '{"epoch": 0, "val', "samples10 is damaged: metrics.jsonl is not valid .* delete it to leave"),
        (METRICS, without("val_reconstruction", record(0, 7000.0)), "metrics.jsonl has no 'val_reconstruction'"),
        (METRICS, {**record(0, 7000.0), "val_loss": "low"}, "metrics.jsonl is not valid"),
    ],
)
def test_damage_is_named_with_its_file_and_a_remedy(tmp_path: Path, file: str, content: Any, message: str) -> None:
    path = write_search(tmp_path, [Spec(setting(), [7000.0])]) / file
    open_search(str(tmp_path), "dogs")
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=message) as error:
        open_search(str(tmp_path), "dogs")
    assert str(error.value).startswith(f"{tmp_path}/dogs")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"space": MIXED, "gpus": 0.25, "workers": 1, "searcher": "optuna", "scheduler": "pbt", "seed": 2**32 - 1},
        {"config": Config.make(preset="notebook", lr=0.1 + 0.2, beta=1e-300, augment=False), "cpus": 7, "workers": 4},
        {"gpus": 1 / 3, "trials": 100_000},
        {"space": Space.parse(["lr=loguniform(1.1e-7,0.30000000000000004)"], {"samples": 3})},
    ],
)
def test_plan_is_read_back(changes: dict[str, Any]) -> None:
    plan = replace(PLAN, **changes)
    back = SearchPlan.from_dict(json.loads(plan.to_json()), "s")
    assert back == plan
    assert list(back.space.domains) == list(plan.space.domains)


@pytest.mark.parametrize(
    "changes",  # None removes a field
    [
        *({name: None} for name in ABOUT if name not in ("format", "version")),
        {"config": "small"},
        {"config": {**ABOUT["config"], "model": 3}},
        {"config": without("model", ABOUT["config"])},
        {"space": {"lr": "normal(0,1)"}},
        {"trials": "many"},
        {"searcher": "grid"},
        {"gpus": "all"},
    ],
)
def test_plan_with_a_missing_or_wrong_field_is_damaged(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^/runs/s/search\.json is damaged .* another name$"):
        SearchPlan.from_dict({name: v for name, v in {**ABOUT, **changes}.items() if v is not None}, "/runs/s")

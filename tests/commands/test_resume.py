"""`--resume`: its two syntaxes, the command line of the beginning with --resume added, and what must not differ."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dogvae.commands import search, train
from dogvae.config import Config
from dogvae.data.source import open_source
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training import run_folder
from tests.support.datasets import grey_photos
from tests.support.runs import job, make_dataset
from tests.support.searches import PLAN
from tune.search_folder import SearchPlan, save


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of runs/photos-... and of runs/dogs, which began with the folder `photos`."""
    monkeypatch.chdir(tmp_path)
    grey_photos(tmp_path / "photos", 3)
    manifest = make_dataset(tmp_path / "dataset") / "manifest.json"
    about = json.loads(manifest.read_text())
    about["source"]["signature"] = open_source("photos").signature()
    manifest.write_text(json.dumps(about))
    config = job(tmp_path / "dataset", lr=0.25, batch_size=0, epochs=0)
    for name in (
        "photos-20260102-030405",
        "photos-20260102-030406",
        "photos-new",
        "dogs",
        "photos-20260102-030407-search",
    ):
        run_folder.save_config(Storage(f"runs/{name}"), config)
    return config


def resumed(typed: str) -> tuple[str, Config]:
    """The name and the config of the run that `dogvae train TYPED` resumes."""
    args = train.parse(typed.split(), "dogvae train")
    assert args.resume is True
    name = args.name or run_folder.newest(args.runs, args.from_search or args.data or "portraits:2000")
    storage, config = run_folder.open_old(
        args.runs, name, train._settings(args), args.data, args.crop, args.val_fraction
    )
    return storage.uri.rpartition("/")[2], config


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("--resume dogs", "dogs"),
        ("--name dogs --resume", "dogs"),
        ("--resume dogs --name dogs", "dogs"),
        ("--data photos --resume", "photos-20260102-030406"),
        ("--data photos --name dogs --lr 0.25 --epochs 0 --batch-size 0 --image-size 32 --resume", "dogs"),
        ("--data photos/ --crop center --val-fraction 0.2 --resume dogs", "dogs"),
        ("--data dataset --resume dogs", "dogs"),
    ],
)
def test_command_line_of_the_beginning_goes_on_with_resume_added(typed: str, name: str, begun: Config) -> None:
    assert resumed(typed) == (name, begun)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--resume dogs --name cats", "--resume dogs: --name cats is another name"),
        ("--resume dgs", "there is no run .*/runs/dgs; .*did you mean dogs?"),
        ("--resume", "give the name of the run with --name; none was begun here without one"),
        ("--resume dogs --data photos --lr 0.5", "--lr: this run has 0.25, not 0.5"),
        ("--resume dogs --data drawn:60", "--data: drawn:60 is not what this run was trained on, or has changed"),
        ("--resume dogs --crop box", "--crop: .*/dataset was prepared with center"),
        ("--resume dogs --data photos --val-fraction 0.3", "--val-fraction: .*/dataset was prepared with 0.2"),
    ],
)
def test_other_data_and_settings_are_refused(typed: str, message: str, begun: Config) -> None:
    with pytest.raises(UsageError, match=message):
        resumed(typed)


def test_photos_that_have_changed_since_are_refused(begun: Config) -> None:
    os.utime("photos/001.png", (1, 1))
    with pytest.raises(UsageError, match=r"has changed; without --data it goes on with .*/dataset"):
        resumed("--data photos --resume")


# --- a search


@pytest.fixture
def plan(begun: Config) -> SearchPlan:
    """The plan of runs/photos-...-search and of runs/best, begun with the photos."""
    plan = replace(PLAN, config=begun)
    for name in ("photos-20260102-030408-search", "best"):
        save(Storage(f"runs/{name}"), plan, [])
    return plan


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("--resume best", "best"),
        ("--name best --resume", "best"),
        ("--data photos --resume", "photos-20260102-030408-search"),
        ("--data photos --name best --trials 9 --set beta=1 --epochs 0 --seed 3 --resume", "best"),
        ("--resume best --searcher random --scheduler asha --cpus-per-trial 1 --gpus-per-trial 0", "best"),
    ],
)
def test_search_goes_on_by_the_command_line_of_its_beginning(
    typed: str, name: str, plan: SearchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    opened = search.open_search

    def stop(*args: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(search, "open_search", lambda runs, name: found.append(name) or opened(runs, name))
    monkeypatch.setattr("tune.schedulers.make_scheduler", stop)  # the settings are accepted by then
    with pytest.raises(InterruptedError):
        search.main(["search", *typed.split()])
    assert found == [name]

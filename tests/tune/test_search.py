"""The search without Ray: what the command line refuses, which settings come next, what is seen, what Tune is told."""

from __future__ import annotations

import io
import json
import math
import random
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from rich.console import Console

from dogvae.cluster import connect
from dogvae.cluster import nodes as cluster
from dogvae.commands import flags
from dogvae.commands import search as command
from dogvae.commands import train as train_command
from dogvae.config import Config
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.run_folder import check_copy, copy_checkpoints, save_config
from tests.conftest import WriteDataset
from tune import live as view
from tune import search, trial
from tune.live import View
from tune.ranking import best_run
from tune.search_folder import Entry, Plan, open_search, save
from tune.searcher import TreeParzen, listed
from tune.space import Domain, Space
from tune.trial import Job, name_of

NOTEBOOK = {"latent_dim": 32, "lr": 0.001, "samples": 10}
EPOCHS = 8
CHECKPOINT = "checkpoints/step-{:09d}-0123456789abcdef.safetensors"
PLAN = Plan(
    space=Space.parse([], {}), config=Config.make(preset="small", epochs=EPOCHS, data="dogs"), trials=6,
    searcher="random", scheduler="asha", seed=3, workers=1, cpus=1, gpus=0.0,
)  # fmt: skip


def record(epoch: int, loss: float | None) -> dict[str, Any]:
    """A line of metrics.jsonl, as far as anyone here reads it."""
    numbers = {"val_loss": loss, "val_reconstruction": loss and loss - 90, "val_kl": loss and 90.0}
    numbers |= {"val_explained": 0.1, "images_per_s": 50.0, "seconds": 2.0 * (epoch + 1)}
    return {"epoch": epoch, "step": 10 * (epoch + 1), **numbers}


def entry(number: int, state: str = "waiting", reason: str = "", **setting: Any) -> Entry:
    setting = {**NOTEBOOK, **setting}
    return Entry(number, name_of(number, setting), setting, state, reason)


def write_search(
    runs: Path, entries: Sequence[Entry], losses: dict[int, list[float | None]], plan: Plan = PLAN
) -> Path:
    """A search called `s`, as it lies on the storage: the losses of trials by their number; returns its folder."""
    storage = Storage(runs / "s")
    save(storage, plan, entries)
    for one in entries:
        if epochs := losses.get(one.number):
            folder = storage / f"trials/{one.name}"
            lines = "".join(json.dumps(record(*numbered)) + "\n" for numbered in enumerate(epochs))
            folder.write("metrics.jsonl", lines.encode())
            save_config(folder, plan.config.replace(**one.setting))
    return runs / "s"


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts Ray fails the test."""

    def start(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(connect, "connect", start)
    monkeypatch.setattr(search, "make_hub", start)


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up cluster."""
    monkeypatch.setattr(connect, "connect", lambda address, verbose, environments=False: "Ray at nowhere")
    monkeypatch.setattr(cluster, "_autoscaler_limits", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [node(CPU=2.0)])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})


class Shell:
    """A folder, and what is typed there."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def run(self, *argv: str) -> tuple[int, str, str]:
        """`python -m tune ...`: its exit status, stdout and stderr."""
        return flags.run(command.main, argv), *self._capsys.readouterr()

    def mistake(self, *argv: str, said: str = "", main: Callable[[Sequence[str]], int] = command.main) -> str:
        """The one line that a mistake is answered with; nothing in the folder is changed, and no more than `said`."""
        before = contents(self.folder)
        assert flags.run(main, argv) == 2
        out, err = self._capsys.readouterr()
        assert out in ("", said)
        assert err.startswith("error: ")
        assert err.index("\n") == len(err) - 1
        assert contents(self.folder) == before
        return err[:-1]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


@pytest.fixture
def dogs(write_dataset: WriteDataset) -> str:
    """A prepared dataset of 16 and 4 images; its path."""
    images = np.zeros((8, 3, 32, 32), np.uint8)
    return str(write_dataset([images, images], [images[:4]]))


def bug(reason: str, *values: Any) -> Any:
    """A case that fails as long as the bug is there."""
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


# --- mistakes on the command line


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--trials 0", ["--trials: 0 is too small", "at least 1"]),
        ("--trials many", ["--trials", "'many'", "python -m tune search --help"]),
        ("--epochs -2", ["--epochs: -2 is too small", "at least 1"]),
        ("--epochs 0", ["--epochs: 0 is too small"]),
        ("--seed -1", ["--seed: -1 is too small", "at least 0"]),
        ("--seed 4294967296", ["--seed: 4294967296 is too large", "4294967295"]),
        ("--set latent_dim=8 --set lr=0.001 --set samples=1", ["--search: --set fixes all", "something else"]),
        ("--search depth=choice(1,2)", ["--search: no setting is called 'depth'", "latent_dim", "lr"]),
        ("--set depth=3", ["--set: no setting is called 'depth'", "latent_dim", "width"]),
        ("--search lr=0.1", ["--search: 'lr=0.1' is not NAME=KIND(...)", "lr=loguniform(1e-4,1e-2)"]),
        ("--search lr=normal(0,1)", ["--search lr: no kind is called 'normal'", "loguniform"]),
        ("--search lr=uniform(0.2,0.1)", ["--search lr: uniform(0.2,0.1) is empty"]),
        ("--search lr=choice(0.1) --set lr=0.1", ["--search lr: --set fixes it already"]),
        ("--set width", ["--set: 'width' is not NAME=VALUE"]),
        ("--set width=2", ["--set width: 2 is too small", "at least 4"]),
        ("--searcher grid", ["--searcher: 'grid' is none of random, optuna"]),
        ("--scheduler hyperband", ["--scheduler: 'hyperband' is none of asha, pbt, none"]),
        ("--scheduler pbt --searcher optuna", ["--scheduler pbt", "leave out --searcher optuna"]),
        ("--scheduler pbt --workers-per-trial 2", ["--scheduler pbt", "leave out --workers-per-trial"]),
        ("--gpus-per-trial 2", ["--gpus-per-trial: a worker has one GPU or a part", "--workers-per-trial"]),
        ("--gpus-per-trial 0.5 --workers-per-trial 2", ["--gpus-per-trial: a worker has one GPU or a part"]),
        ("--gpus-per-trial -1", ["--gpus-per-trial: -1.0 is too small", "at least 0"]),
        ("--gpus-per-trial nan", ["--gpus-per-trial: nan is not a finite number"]),
        ("--cpus-per-trial 0", ["--cpus-per-trial: 0 is too small"]),
        ("--workers-per-trial 0", ["--workers-per-trial: 0 is too small"]),
        ("--time-budget junk", ["--time-budget: 'junk' is not a time such as 30s, 5m or 2h"]),
        ("--time-budget 0m", ["--time-budget: '0m' is not a time"]),
        ("--name ../x", ["--name: '../x' must consist of letters"]),
        ("--data nowhere", ["nowhere"]),
        ("--trails 3", ["--trails", "--help"]),
    ],
)
def test_mistakes_are_one_line_before_ray_starts(typed: str, words: list[str], shell: Shell) -> None:
    told = shell.mistake("search", *typed.split())
    assert [word for word in words if word not in told] == [], told


@pytest.mark.parametrize("argv", [[], ["find"], ["report"], ["dashboard"]])
def test_command_without_what_it_needs(argv: list[str], shell: Shell) -> None:
    assert "--help" in shell.mistake(*argv)


@pytest.mark.parametrize(
    "typed",
    [
        *("--data drawn:60", "--name other", "--epochs 9", "--searcher optuna", "--scheduler none", "--seed 4"),
        *("--search beta=uniform(0,4)", "--set width=8"),
        *("--gpus-per-trial 1", "--cpus-per-trial 2", "--workers-per-trial 2"),
        pytest.param("--seed 0"),
        pytest.param("--gpus-per-trial 0"),
    ],
)
def test_resumed_search_keeps_what_it_began_with(typed: str, shell: Shell) -> None:
    write_search(shell.folder / "runs", [entry(0)], {})
    told = shell.mistake("search", "--resume", "s", *typed.split())
    assert told == f"error: {typed.split()[0]}: a resumed search keeps what it began with; leave it out"


READERS = [["search", "--resume"], ["report"], ["dashboard"]]


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
def test_unknown_search_is_answered_by_those_there_are(argv: list[str], shell: Shell) -> None:
    assert "there is none yet" in shell.mistake(*argv, "nobody")
    for name in ("cats", "birds"):
        save(Storage(shell.folder / "kept" / name), PLAN, [])
    save_config(Storage(shell.folder / "kept/a-run"), PLAN.config)
    told = shell.mistake(*argv, "nobody", "--runs", "kept")
    assert told == f"error: no search is called nobody in {shell.folder}/kept; there are birds, cats"


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
def test_run_is_no_search(argv: list[str], shell: Shell) -> None:
    save_config(Storage(shell.folder / "runs/one"), PLAN.config)
    assert f"{shell.folder}/runs/one is no search but one run" in shell.mistake(*argv, "one")


ABOUT = json.loads(PLAN.to_json())
TRIAL = {"number": 0, "name": "00-a", "setting": NOTEBOOK, "state": "done", "reason": ""}
CORRUPT: dict[str, tuple[str, Any, str]] = {
    # what: (file, its new text or JSON, None to delete it; words of the message)
    "half a search.json": ("search.json", PLAN.to_json()[:100], "search.json makes no sense"),
    "search.json of something else": ("search.json", {**ABOUT, "format": "other"}, "is no search"),
    "search.json of a later version": ("search.json", {**ABOUT, "version": 2}, "update DogVAE"),
    "search.json without a space": ("search.json", {**ABOUT, "space": {}}, "nothing is searched"),
    "no trials.json": ("trials.json", None, "trials.json is missing"),
    "half a trials.json": ("trials.json", '[{"number": 0,', "trials.json makes no sense"),
    "a trial without a name": ("trials.json", [{"number": 0}], "trials.json has no 'name'"),
    "a trial in no state": ("trials.json", [{**TRIAL, "state": "lost"}], "trial 0 is 'lost'"),
    "a trial of another space": ("trials.json", [{**TRIAL, "setting": {"beta": 1.0}}], "trial 0 sets beta"),
}


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
@pytest.mark.parametrize("what", CORRUPT)
def test_corrupted_search_is_named_with_its_file(what: str, argv: list[str], shell: Shell) -> None:
    file, content, words = CORRUPT[what]
    path = write_search(shell.folder / "runs", [entry(0, "done")], {0: [500.0]}) / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    told = shell.mistake(*argv, "s")
    assert words in told
    assert str(path.parent) in told


@pytest.mark.parametrize("numbers", [pytest.param(n) for n in ([0, 2], [0, 0], [1])])
def test_trials_whose_numbers_are_not_0_1_2(numbers: list[int], shell: Shell) -> None:
    """Either that is refused, or each is taken up under its own number."""
    write_search(shell.folder / "runs", [entry(n, lr=10.0 ** -(n + 2)) for n in numbers], {})
    try:
        known = [Entry(t.number, t.name, t.setting) for t in open_search("runs", "s").trials]
    except UsageError:
        return
    given = {one["number"]: (one["name"], one["setting"]) for one in listed(PLAN.space, 0, 6, known)}
    assert all(given[one.number] == (one.name, one.setting) for one in known)
    assert len({name for name, _ in given.values()}) == 6


@pytest.mark.parametrize(
    "what",
    ["there is a run", pytest.param("there is a search")],
)
def test_name_that_exists_is_left_alone(what: str, shell: Shell) -> None:
    if what == "there is a run":
        save_config(Storage(shell.folder / "runs/s"), PLAN.config)
    else:
        write_search(shell.folder / "runs", [entry(0)], {})
    told = shell.mistake("search", "--name", "s", "--data", "drawn:60")
    assert f"{shell.folder}/runs/s exists" in told
    assert "choose another name" in told
    assert "--resume" in told


def test_folder_that_exists_is_left_alone(shell: Shell) -> None:
    (shell.folder / "runs/s").mkdir(parents=True)
    told = shell.mistake("search", "--name", "s", "--data", "drawn:60")
    assert told == f"error: --name: {shell.folder}/runs/s exists and is not a run; choose another name"


def test_fewer_trials_than_there_are(shell: Shell, two_cpus: None) -> None:
    write_search(shell.folder / "runs", [entry(0)], {})
    told = shell.mistake("search", "--resume", "s", "--trials", "5", said="Ray at nowhere\n")
    assert told == "error: --trials: this search has 6, which 5 would take back"


@pytest.mark.parametrize("typed", ["--cpus-per-trial 3", "--workers-per-trial 3", "--gpus-per-trial 1"])
def test_trial_that_never_fits_into_the_cluster(typed: str, shell: Shell, two_cpus: None) -> None:
    told = shell.mistake("search", "--data", "drawn:60", *typed.split(), said="Ray at nowhere\n")
    assert typed.split()[0] in told
    assert "never fits into this cluster" in told


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        pytest.param("--scheduler pbt --set lr=0.001 --set samples=1", "shapes the"),
        pytest.param("--searcher optuna", "pip install"),
    ],
)
def test_mistakes_that_the_libraries_notice(
    typed: str, words: str, dogs: str, shell: Shell, two_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    before = contents(shell.folder)
    status, _, told = shell.run("search", "--data", dogs, *typed.split())
    assert status == 2
    assert words in told
    assert contents(shell.folder) == before


# --- the command, but for its trials


@pytest.fixture
def searching(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> list[dict[str, Any]]:
    """Searches end at once, without an epoch, as the last element says; the others are what they were asked for."""
    asked: list[dict[str, Any]] = [{"end": None}]

    def run(storage: Storage, plan: Plan, known: list[Entry], at_once: int, budget_s: float | None) -> int | None:
        asked.insert(-1, {"plan": plan, "known": known, "at_once": at_once, "budget_s": budget_s})
        return asked[-1]["end"]

    monkeypatch.setattr(search, "run", run)
    monkeypatch.setattr("tune.report.write", lambda found: None)  # its picture takes seconds
    return asked


def test_search_is_what_was_typed(searching: list[dict[str, Any]], dogs: str, shell: Shell) -> None:
    typed = "--trials 7 --epochs 5 --seed 9 --search lr=uniform(0.1,0.2) --set width=8 --set latent_dim=4 "
    typed += "--scheduler none --searcher optuna --time-budget 2m --name s"
    searching[-1]["end"] = 0
    assert shell.run("search", "--data", dogs, *typed.split())[0] == 0
    asked = searching[0]
    plan: Plan = asked["plan"]
    assert (asked["at_once"], asked["budget_s"], asked["known"]) == (2, 120.0, [])
    assert (plan.trials, plan.searcher, plan.scheduler, plan.seed) == (7, "optuna", "none", 9)
    assert (plan.workers, plan.cpus, plan.gpus) == (1, 1, 0.0)
    assert plan.space.to_json() == {"lr": "uniform(0.1,0.2)", "samples": "choice(1,3,10)"}
    flat = plan.config.flat()
    assert [flat[name] for name in ("epochs", "seed", "width", "latent_dim", "preset")] == [5, 9, 8, 4, "default"]
    assert (flat["data"], flat["image_size"], flat["batch_size"]) == (dogs, 32, 16)
    assert Plan.from_about(open_search("runs", "s").about, "s") == plan


def test_search_without_data_is_small(
    searching: list[dict[str, Any]], dogs: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dogvae.commands.search.DRAWN", dogs)
    shell.run("search", "--name", "a")
    shell.run("search", "--name", "b", "--set", "preset=notebook")
    plans = [asked["plan"] for asked in searching[:-1]]
    assert [plan.config.preset for plan in plans] == ["small", "notebook"]
    assert [plan.config.epochs for plan in plans] == [12, 50]
    assert plans[0].trials == 12


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, 0])
def test_interrupted_search_says_how_to_go_on(
    end: int, searching: list[dict[str, Any]], dogs: str, shell: Shell
) -> None:
    searching[-1]["end"] = int(end)
    status, said, told = shell.run("search", "--data", dogs, "--name", "s", "--runs", "my runs")
    assert status == (128 + end if end else 0)
    assert said.splitlines()[-1] == "stopped; to go on: python -m tune search --resume s --runs 'my runs'"
    assert told == ""


def test_search_without_one_epoch_has_failed(searching: list[dict[str, Any]], dogs: str, shell: Shell) -> None:
    status, _, told = shell.run("search", "--data", dogs, "--name", "s")
    assert status == 1
    assert told.startswith(f"error: no trial of {shell.folder}/runs/s has finished an epoch")


def test_resumed_search_knows_its_trials(searching: list[dict[str, Any]], shell: Shell) -> None:
    known = [entry(0, "stopped"), entry(1, "failed", "why", lr=0.002), entry(2, "waiting", lr=0.003)]
    trials = write_search(shell.folder / "runs", known, {0: [500.0], 2: [490.0]}) / "trials"
    Storage(trials / known[0].name).write(CHECKPOINT.format(10), b"")
    searching[-1]["end"] = 2
    shell.run("search", "--resume", "s")
    shell.run("search", "--resume", "s", "--trials", "9", "--time-budget", "30s")
    assert [asked["known"] for asked in searching[:-1]] == [known, known]
    assert searching[0]["plan"] == PLAN
    assert [asked["plan"].trials for asked in searching[:-1]] == [6, 9]
    assert searching[1]["budget_s"] == 30.0
    assert open_search("runs", "s").about["trials"] == 9


@pytest.mark.parametrize(
    ("state", "epochs", "steps", "is_left"),
    [
        ("done", 8, [70, 80], "done"),
        ("done", 8, [81], "done"),
        ("done", 8, [70], "waiting"),
        ("done", 8, [], "waiting"),
        ("done", 7, [70], "waiting"),
        ("stopped", 2, [10, 20], "stopped"),
        ("stopped", 2, [10], "waiting"),
        ("stopped", 0, [], "waiting"),
        ("failed", 2, [10], "failed"),
        ("failed", 0, [], "failed"),
        ("running", 2, [20], "running"),
        ("waiting", 2, [20], "waiting"),
    ],
)
def test_trial_whose_end_was_not_saved_has_not_ended(
    state: str, epochs: int, steps: list[int], is_left: str, searching: list[dict[str, Any]], shell: Shell
) -> None:
    """A kill between the last epoch, that of 8, and its checkpoint."""
    folder = write_search(shell.folder / "runs", [entry(0, state)], {0: [500.0] * epochs}) / "trials" / entry(0).name
    for step in steps:
        Storage(folder).write(CHECKPOINT.format(step), b"")
    searching[-1]["end"] = 2
    shell.run("search", "--resume", "s")
    assert searching[0]["known"] == [entry(0, is_left)]


def test_dry_run_shows_the_plan_and_changes_nothing(dogs: str, shell: Shell, two_cpus: None) -> None:
    before = contents(shell.folder)
    status, said, _ = shell.run("search", "--data", dogs, "--trials", "3", "--seed", "4", "--dry-run")
    assert status == 0
    shown, end = json.JSONDecoder().raw_decode(said, said.index("{"))
    assert (shown["trials"], shown["seed"], shown["space"]["lr"]) == (3, 4, "loguniform(0.0001,0.01)")
    told, *first = said[end:].strip().splitlines()
    assert told == "2 at once; the first settings:"
    assert first == [str(PLAN.space.setting(4, n)) for n in range(3)]
    assert contents(shell.folder) == before


# --- going on with the best trial


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--from-search nobody", ["no search is called nobody", "there are s"]),
        ("--from-search s --data drawn:60", ["--from-search", "leave out --resume and --data"]),
        ("--from-search s --resume --name x", ["--from-search", "leave out --resume and --data"]),
        ("--from-search s --crop box", ["--from-search", "leave out --val-fraction and --crop"]),
        ("--from-search s --lr 0.5", ["--lr", "0.002", "0.5"]),
        ("--from-search s --latent-dim 8", ["--latent-dim", "32", "8"]),
        ("--from-search s --epochs 3", ["--epochs", "done 3 epochs already", "3 is not more"]),
        ("--from-search s --epochs 2", ["--epochs", "done 3 epochs already", "2 is not more"]),
        ("--from-search empty", ["no trial of", "has finished an epoch"]),
        ("--from-search s --name one", ["--name", "one exists", "--resume"]),
    ],
)
def test_mistakes_of_going_on_with_the_best(typed: str, words: list[str], shell: Shell) -> None:
    runs = shell.folder / "runs"
    write_search(runs, [entry(0, "done"), entry(1, "done", lr=0.002)], {0: [500.0] * 8, 1: [490.0, 480.0, 470.0]})
    write_search(shell.folder / "elsewhere", [entry(0, "failed"), entry(1)], {})
    if "empty" in typed:
        (shell.folder / "elsewhere/s").rename(runs / "empty")
    save_config(Storage(runs / "one"), PLAN.config)
    told = shell.mistake(*typed.split(), main=train_command.main)
    assert [word for word in words if word not in told] == [], told


def test_run_that_goes_on_has_the_best_trials_configuration(
    shell: Shell, two_cpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(shell.folder / "runs", [entry(0), entry(1, lr=0.002), entry(2, "failed", "why", lr=0.003)],
                 {0: [500.0] * 8, 1: [490.0] * 3, 2: [400.0]})  # fmt: skip
    before = contents(shell.folder)
    typed = ["--from-search", "s", "--epochs", "20", "--name", "longer", "--dry-run"]
    assert flags.run(train_command.main, typed) == 0
    said = capsys.readouterr().out
    shown = json.loads(said[said.index("{") :])
    assert shown.pop("run") == f"{shell.folder}/runs/longer"
    assert shown.pop("workers") == "1 CPU worker of 2 CPUs"
    assert shown == PLAN.config.replace(lr=0.002, latent_dim=32, samples=10, epochs=20).to_dict()
    assert contents(shell.folder) == before


def test_best_run_has_the_least_loss_of_those_that_count(tmp_path: Path) -> None:
    entries = [entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, "failed", "why", lr=0.003), entry(3)]
    write_search(tmp_path, entries, {0: [600.0, 480.0, 500.0], 1: [None, 490.0], 2: [100.0]})
    run, config = best_run(open_search(str(tmp_path), "s"))
    assert run.uri == f"{tmp_path}/s/trials/00-latent_dim32-lr0.001-samples10"
    assert config == PLAN.config.replace(**NOTEBOOK)


@pytest.mark.parametrize("losses", [{}, {0: [None]}, {1: [100.0]}])
def test_there_is_no_best_run_without_an_epoch_that_counts(
    losses: dict[int, list[float | None]], tmp_path: Path
) -> None:
    write_search(tmp_path, [entry(0), entry(1, "failed", "why", lr=0.002)], losses)
    with pytest.raises(UsageError, match=r"^no trial of .*/s has finished an epoch$"):
        best_run(open_search(str(tmp_path), "s"))


@pytest.mark.parametrize("damage", ["half a file", pytest.param("no file")])
def test_best_run_without_its_configuration(damage: str, tmp_path: Path) -> None:
    file = write_search(tmp_path, [entry(0, "done")], {0: [500.0]}) / f"trials/{entry(0).name}/config.json"
    file.write_text('{"mod') if damage == "half a file" else file.unlink()
    with pytest.raises(UsageError, match=r"config\.json"):
        best_run(open_search(str(tmp_path), "s"))


def test_copy_may_only_train_longer(tmp_path: Path) -> None:
    write_search(tmp_path, [entry(0, "stopped")], {0: [500.0, 490.0]})
    source, config = best_run(open_search(str(tmp_path), "s"))
    assert check_copy(source, config, {}) == config
    assert check_copy(source, config, {"epochs": 3, "lr": 0.001}) == config.replace(epochs=3)
    with pytest.raises(UsageError, match=r"^--epochs: .* has done 2 epochs already; 2 is not more$"):
        check_copy(source, config, {"epochs": 2})
    with pytest.raises(UsageError, match=r"^--epochs: .* 1 is not more$"):
        check_copy(source, config.replace(epochs=1), {})
    with pytest.raises(UsageError, match=r"^--batch-size: .* not 4"):
        check_copy(source, config, {"batch_size": 4})


def saved(storage: Storage, value: float, step: int, **meta: Any) -> None:
    checkpoints = Checkpoints(storage)
    checkpoints.save({"w": torch.full((2, 3), value)}, {"step": step, "epoch": 0, **meta})
    checkpoints.wait()


def test_copied_checkpoints_are_the_same(tmp_path: Path) -> None:
    source, copy = Storage(tmp_path / "a"), Storage(tmp_path / "b")
    for step, loss in ((1, 300.0), (2, 100.0), (3, 200.0), (4, 250.0)):
        saved(source, step, step, val_loss=loss)
    source.write("metrics.jsonl", b"")
    before = contents(tmp_path / "a")
    copy_checkpoints(source, copy)
    assert contents(tmp_path / "a") == before
    assert contents(tmp_path / "b") == {
        tmp_path / "b" / path.relative_to(tmp_path / "a"): data
        for path, data in before.items()
        if path.name != "metrics.jsonl"
    }
    latest, best = Checkpoints(copy).latest(), Checkpoints(copy).best()
    assert latest is not None
    assert best is not None
    assert (latest.tensors["w"].tolist(), latest.meta["val_loss"]) == ([[4.0] * 3] * 2, 250.0)
    assert best.meta["val_loss"] == 100.0
    copy_checkpoints(Storage(tmp_path / "nobody"), Storage(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


# --- which setting comes next


def test_first_setting_is_the_notebooks() -> None:
    first, *others = listed(PLAN.space, 5, 20, [])
    assert first == {"number": 0, "name": "00-latent_dim32-lr0.001-samples10", "setting": NOTEBOOK}
    assert [one["number"] for one in others] == list(range(1, 20))
    assert all(one["name"] == name_of(one["number"], one["setting"]) for one in others)
    assert len({one["setting"]["lr"] for one in others}) == 19


def test_settings_are_the_seeds_alone() -> None:
    before = listed(PLAN.space, 5, 20, [])
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert listed(Space.from_json(PLAN.space.to_json()), 5, 20, []) == before
    assert listed(PLAN.space, 6, 20, [])[1:] != before[1:]


def test_earlier_trials_come_first_and_then_those_that_would_have_come() -> None:
    whole = listed(PLAN.space, 5, 9, [])
    known = [Entry(**one, state="done") for one in whole[:4]]
    assert listed(PLAN.space, 5, 6, known) == whole[:6]
    assert listed(PLAN.space, 5, 9, known) == whole


def test_earlier_trials_keep_their_names_and_settings() -> None:
    """Population based training has changed the setting since the name was given."""
    known = [Entry(0, "00-a", NOTEBOOK | {"lr": 0.0042}), Entry(1, "01-b", NOTEBOOK | {"lr": 0.0077})]
    given = listed(PLAN.space, 5, 3, known)
    assert given[0] == {"number": 0, "name": "00-a", "setting": NOTEBOOK | {"lr": 0.0042}}
    assert given[1] == {"number": 1, "name": "01-b", "setting": NOTEBOOK | {"lr": 0.0077}}
    assert given[2] == listed(PLAN.space, 5, 3, [])[2]


def contains(domain: Domain, value: Any) -> bool:
    """Whether the domain has the value, in its own type."""
    if type(value) is not type(domain.values[0]):
        return False
    return value in domain.values if domain.kind == "choice" else domain.values[0] <= value <= domain.values[1]


MIXED = Space.parse(
    ["beta=uniform(0.5,4)", "batch_size=randint(8,64)", "augment=choice(true,false)", "norm=choice(group,batch)",
     "schedule=choice(cosine,constant)", "ema=choice(0,0.9,0.99)"], {},
)  # fmt: skip
LR = Space.parse(["lr=loguniform(1e-5,1e-1)"], {"latent_dim": 8, "samples": 1})
Loss = Callable[[dict[str, Any]], float]


def suggested(space: Space, loss: Loss, count: int, seed: int = 0, known: Sequence[Entry] = ()) -> list[dict[str, Any]]:
    """What trials are given one after the other, each of them told its loss."""
    searcher = TreeParzen(space, seed, known)
    given = []
    for number in range(count):
        given.append(searcher.suggest(f"t{number}")["given"])
        searcher.on_trial_complete(f"t{number}", {"loss": loss(given[-1]["setting"])})
    return given


def distance(setting: dict[str, Any]) -> float:
    """From the best learning rate, in powers of ten."""
    return abs(math.log10(setting["lr"] / 2e-4))


def test_optuna_stays_within_the_domains_and_begins_with_the_notebook() -> None:
    given = suggested(MIXED, lambda setting: setting["beta"], 30)
    first = NOTEBOOK | {"beta": 1.0, "batch_size": 32, "augment": True, "schedule": "constant", "norm": "batch"}
    first |= {"ema": 0.0}
    assert given[0] == {"number": 0, "name": name_of(0, first), "setting": first}
    for number, one in enumerate(given):
        assert (one["number"], one["name"]) == (number, name_of(number, one["setting"]))
        assert set(one["setting"]) == set(MIXED.domains)
        assert all(contains(MIXED.domains[name], value) for name, value in one["setting"].items()), one
    assert len({one["setting"]["lr"] for one in given}) == 30


def test_optuna_repeats_itself_with_the_same_seed_and_losses() -> None:
    one = suggested(LR, distance, 12)
    assert suggested(LR, distance, 12) == one
    assert suggested(LR, distance, 12, seed=1)[1:] != one[1:]


def test_optuna_learns_from_the_losses() -> None:
    near, far = suggested(LR, distance, 9), suggested(LR, lambda setting: -distance(setting), 9)
    assert near[:5] == far[:5]
    assert near[5:] != far[5:]


def test_optuna_comes_nearer_to_the_best_than_chance() -> None:
    """Found: 0.008 powers of ten against 0.045 for the nearest, 0.47 against 1.01 for the second half."""
    searches = [suggested(LR, lambda setting: distance(setting) ** 2, 40, seed) for seed in range(4)]
    learned = [[distance(one["setting"]) for one in search] for search in searches]
    by_chance = [[distance(LR.setting(seed, number)) for number in range(40)] for seed in range(4)]
    assert statistics.mean(map(min, learned)) < 0.5 * statistics.mean(map(min, by_chance))
    late, late_by_chance = ([d for run in runs for d in run[20:]] for runs in (learned, by_chance))
    assert statistics.mean(late) < 0.7 * statistics.mean(late_by_chance)


@pytest.mark.parametrize(
    ("result", "error"),
    [(None, True), ({"loss": math.inf}, False), ({"state": "failed"}, False), ({"loss": 5.0}, True)],
)
def test_failed_trial_does_not_stop_optuna(result: dict[str, Any] | None, error: bool) -> None:
    """It goes on as if that one had never been: what it has is no loss."""
    searcher = TreeParzen(LR, 0, [])
    settings = []
    for number in range(12):
        settings.append(searcher.suggest(f"t{number}")["given"]["setting"])
        if number % 3 == 1:
            searcher.on_trial_complete(f"t{number}", result, error)
        else:
            searcher.on_trial_complete(f"t{number}", {"loss": distance(settings[-1])})
    assert len({setting["lr"] for setting in settings}) == 12
    told = searcher._study.get_trials(deepcopy=False)
    assert [one.value is None for one in told] == [number % 3 == 1 for number in range(12)]


def test_optuna_suggests_different_settings_to_trials_side_by_side() -> None:
    """Found: they spread by 0.9 powers of ten; if the trials at work were forgotten, by 0.3."""
    spread = []
    for seed in range(4):
        searcher, told = TreeParzen(LR, seed, []), {}
        for number in range(25):
            told[f"t{number}"] = searcher.suggest(f"t{number}")["given"]["setting"]
            if number < 15:
                searcher.on_trial_complete(f"t{number}", {"loss": distance(told[f"t{number}"]) ** 2})
        side_by_side = list(told)[15:]
        spread.append(statistics.pstdev(math.log10(told[name]["lr"]) for name in side_by_side))
        for name in reversed(side_by_side):  # they need not end as they began
            searcher.on_trial_complete(name, {"loss": distance(told[name]) ** 2})
        assert searcher._study.best_params == min(told.values(), key=distance)
    assert statistics.mean(spread) > 0.6


def test_optuna_begins_with_the_earlier_trials() -> None:
    whole = suggested(LR, distance, 12)
    known = [Entry(number, f"{number:02d}-kept", whole[number]["setting"], "done") for number in range(10)]
    again = suggested(LR, distance, 14, known=known)
    assert [(one["name"], one["setting"]) for one in again[:10]] == [(one.name, one.setting) for one in known]
    assert [one["number"] for one in again] == list(range(14))
    fresh = again[10:]
    assert all(one["name"] == name_of(one["number"], one["setting"]) for one in fresh)
    other = suggested(LR, lambda setting: -distance(setting), 14, known=known)
    assert other[10:] != fresh  # it learned from them


def test_without_optuna_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"^--searcher optuna: install it by pip install .*optuna"):
        TreeParzen(LR, 0, [])


# --- the plan


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
    back = Plan.from_about(json.loads(plan.to_json()), "s")
    assert back == plan
    assert list(back.space.domains) == list(plan.space.domains)


@pytest.mark.parametrize(
    "missing", ["trials", "searcher", "scheduler", "seed", "workers", "cpus", "gpus", "space", "config"]
)
def test_plan_that_lacks_something_is_damaged(missing: str) -> None:
    about = {key: value for key, value in ABOUT.items() if key != missing}
    with pytest.raises(UsageError, match=rf"^/runs/s/search\.json is damaged \('{missing}'\): .* another name$"):
        Plan.from_about(about, "/runs/s")


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "small"},
        {"config": {**ABOUT["config"], "model": 3}},
        {"config": {**ABOUT["config"], "depth": 3}},
        {"config": {**ABOUT["config"], "lr": -1.0}},
        {"config": {key: value for key, value in ABOUT["config"].items() if key != "model"}},
        {"space": {"lr": "normal(0,1)"}},
        pytest.param({"trials": "many"}),
        pytest.param({"trials": 0}),
        pytest.param({"searcher": "grid"}),
        pytest.param({"scheduler": "median"}),
        pytest.param({"cpus": None}),
        pytest.param({"gpus": "all"}),
    ],
)
def test_plan_with_something_else_is_damaged(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        Plan.from_about({**ABOUT, **changes}, "/runs/s")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", ["waiting", pytest.param("done")])
def test_damaged_plan_is_not_resumed(state: str, shell: Shell, two_cpus: None) -> None:
    folder = write_search(shell.folder / "runs", [entry(0, state)], {0: [500.0]})
    (folder / "search.json").write_text(json.dumps({**ABOUT, "config": "small"}))
    assert "search.json is damaged" in shell.mistake("search", "--resume", "s", said="Ray at nowhere\n")


@pytest.mark.parametrize(("epochs", "first"), [(1, 1), (3, 1), (8, 2), (50, 12)])
def test_successive_halving_waits_a_quarter_and_ends_with_the_epochs(epochs: int, first: int) -> None:
    scheduler = search.scheduler_of(changed(config=PLAN.config.replace(epochs=epochs)))
    assert isinstance(scheduler, ASHAScheduler)
    assert (scheduler._time_attr, scheduler._max_t) == ("epochs", epochs)
    rungs = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
    assert (min(rungs), scheduler._reduction_factor) == (first, 3)


def changed(**changes: Any) -> Plan:
    return replace(PLAN, **changes)


def test_no_scheduler_lets_all_trials_end() -> None:
    assert search.scheduler_of(changed(scheduler="none")) is None


def test_population_mutates_only_what_the_weights_can_take() -> None:
    scheduler = search.scheduler_of(changed(scheduler="pbt", space=MIXED))
    assert isinstance(scheduler, PopulationBasedTraining)
    assert scheduler._time_attr == "epochs"
    assert set(scheduler._hyperparam_mutations["given"]["setting"]) == set(MIXED.domains) - {"latent_dim", "norm"}
    shapes = Space.parse(["width=choice(16,32)"], {"lr": 0.001, "samples": 1})
    with pytest.raises(UsageError, match=r"^--scheduler pbt: .*shapes the network"):
        search.scheduler_of(changed(scheduler="pbt", space=shapes))


def test_population_never_leaves_the_domains() -> None:
    """A long line of heirs, by Ray's own mutations: every value stays in its domain, and all of them are come by."""
    scheduler = search.scheduler_of(changed(scheduler="pbt", space=MIXED))
    assert isinstance(scheduler, PopulationBasedTraining)
    random.seed(0)
    np.random.seed(0)
    given = {"number": 4, "name": "04-a", "setting": MIXED.setting(0, 4)}
    seen = []
    for _ in range(400):
        config, _ = scheduler._get_new_config(SimpleNamespace(), SimpleNamespace(config={"given": given}))
        assert {key: config["given"][key] for key in ("number", "name")} == {"number": 4, "name": "04-a"}
        given = config["given"]
        seen.append(given["setting"])
        assert all(contains(MIXED.domains[name], value) for name, value in seen[-1].items()), seen[-1]
        assert set(seen[-1]) == set(MIXED.domains)
    for name, domain in MIXED.domains.items():
        values = {setting[name] for setting in seen}
        if name in ("latent_dim", "norm"):
            assert values == {MIXED.setting(0, 4)[name]}
        elif domain.kind == "choice":
            assert values == set(domain.values)
        else:
            assert len(values) > 50


@pytest.mark.parametrize("factor", [0.0, 1e-9, 0.8, 1.0, 1.2, 1e9])
def test_population_is_brought_back_into_the_domains(factor: float) -> None:
    scheduler = search.scheduler_of(changed(scheduler="pbt", space=MIXED))
    assert isinstance(scheduler, PopulationBasedTraining)
    setting = {"lr": 0.005 * factor, "beta": 2.0 * factor, "batch_size": round(30 * factor), "samples": 3}
    before = MIXED.setting(0, 4) | setting
    after = scheduler._custom_explore_fn({"given": {"number": 4, "name": "04-a", "setting": before}})["given"]
    for name, low, high in (("lr", 1e-4, 1e-2), ("beta", 0.5, 4.0), ("batch_size", 8, 64)):
        assert after["setting"][name] == pytest.approx(float(np.clip(setting[name], low, high)))
    assert all(contains(MIXED.domains[name], value) for name, value in after["setting"].items())


@pytest.mark.parametrize(
    ("changes", "resources"),
    [
        ({"cpus": 2, "gpus": 0.5}, {"CPU": 2.0, "GPU": 0.5}),
        ({"cpus": 1, "gpus": 0.0}, {"CPU": 1.0, "GPU": 0.0}),
        ({"workers": 4, "cpus": 2, "gpus": 1.0}, {"memory": 1.0}),  # those of the workers are to be left for them
    ],
)
def test_resources_of_a_trial(changes: dict[str, Any], resources: dict[str, float]) -> None:
    assert search._resources(changed(**changes)) == resources


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "room"),
    [
        ([node(CPU=2)], 1, 0.0, 2),
        ([node(CPU=4), node(CPU=3)], 2, 0.0, 3),  # what is left of two nodes is no room
        ([node(CPU=2), node(False, CPU=64)], 1, 0.0, 2),
        ([node(CPU=2), node(False)], 1, 0.0, 2),
        ([node(memory=1e9)], 1, 0.0, 0),
        ([node(CPU=2)], 1, 1.0, 0),
        ([node(CPU=8, GPU=1), node(CPU=2, GPU=4), node(CPU=8)], 1, 1.0, 3),
        ([node(CPU=8, GPU=1), node(CPU=2, GPU=4), node(CPU=8)], 1, 0.5, 4),
        ([node(CPU=16, GPU=1)], 1, 0.1, 10),
        ([node(CPU=16, GPU=1)], 1, 1 / 3, 3),
        ([node(CPU=16, GPU=1)], 1, 0.3, 3),
        ([node(CPU=16, GPU=1)], 4, 0.1, 4),
        pytest.param([node(CPU=16, GPU=2)], 1, 0.4, 4),
    ],
)
def test_room_for_workers(
    nodes: list[dict[str, Any]], cpus: int, gpus: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.slots(cpus, gpus) == room


# --- what is seen


class Clock:
    """In place of `time`: sleeping is what lets it go on, and what happens meanwhile is up to the test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.meanwhile: Callable[[float], None] = lambda now: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(view, "time", clock)
    return clock


def seen(known: Sequence[Entry] = (), trials: int = 6) -> View:
    return View(trials, EPOCHS, list(NOTEBOOK), known)


def put(view: View, one: Entry, losses: Sequence[float | None] = ()) -> None:
    view.entries[one.number] = one
    for epoch, loss in enumerate(losses):
        view.record(one.number, record(epoch, loss))


def busy() -> View:
    """Six of 24 trials, one of each kind."""
    view = seen(trials=24)
    put(view, entry(0, "done"), [700.0, 520.4, 530.0, 540.0, 550.0, 560.0, 570.0, 580.0])
    put(view, entry(1, "running", lr=0.00213), [610.0, 480.6, None])
    put(view, entry(2, "failed", "bad numbers", lr=0.01), [90.0])
    put(view, entry(3, "stopped", latent_dim=8, samples=1), [12600.0, 12345.0])
    put(view, entry(4, "running", lr=0.000123))
    put(view, entry(5, "waiting", lr=0.0001), [math.nan])
    return view


def shown(view: View, width: int, height: int = 100) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(view._table(height))
    return console.export_text().rstrip("\n").split("\n")


def test_best_is_on_top_and_failed_ones_are_last() -> None:
    assert busy()._ranked() == [1, 0, 3, 4, 5, 2]


def test_trial_is_described_with_its_best_loss_and_why_it_failed() -> None:
    view = busy()
    told = [view._describe(view.entries[number]) for number in range(6)]
    assert told[0] == "trial 0 (latent_dim 32, lr 0.001, samples 10) done after epoch 8, loss 520"
    assert told[1] == "trial 1 (latent_dim 32, lr 0.0021, samples 10) running after epoch 3, loss 481"
    assert told[2] == "trial 2 (latent_dim 32, lr 0.01, samples 10) failed after epoch 1, loss 90: bad numbers"
    assert told[3] == "trial 3 (latent_dim 8, lr 0.001, samples 1) stopped after epoch 2, loss 12,345"
    assert told[4] == "trial 4 (latent_dim 32, lr 0.00012, samples 10) running after epoch 0"
    assert told[5] == "trial 5 (latent_dim 32, lr 0.0001, samples 10) waiting after epoch 1"


def test_summary_before_anything_has_ended(clock: Clock) -> None:
    view = seen()
    assert view._summary() == "0 of 6 trials ended, 0 running"
    put(view, entry(0, "running"))
    clock.now += 60
    assert view._summary() == "0 of 6 trials ended, 1 running"
    put(view, entry(0, "running"), [512.3])
    assert view._summary() == "0 of 6 trials ended, 1 running, best so far: 512 by trial 0"


def test_summary_counts_and_says_what_is_left(clock: Clock) -> None:
    view = busy()
    clock.now += 60  # 3 of 24 in a minute
    told = "3 of 24 trials ended, 1 of them early, 1 failed, 2 running, about 7:00 left, best so far: 481 by trial 1"
    assert view._summary() == told


def test_time_left_is_that_of_trials_that_were_not_known(clock: Clock) -> None:
    view = seen([entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, lr=0.003)])
    clock.now += 90
    assert view._summary() == "2 of 6 trials ended, 1 of them early, 0 running"
    put(view, entry(2, "done", lr=0.003), [500.0])
    assert "3 of 6 trials ended, 1 of them early, 0 running, about 4:30 left" in view._summary()


def test_no_time_is_left_from_trials_that_failed_earlier(clock: Clock) -> None:
    view = seen([entry(0, "done"), entry(1, "failed", "why", lr=0.002)])
    clock.now += 1
    assert "left" not in view._summary()


def test_table_has_a_line_for_each_trial() -> None:
    header, *lines, _ = shown(busy(), 120)
    columns = "trial latent_dim lr samples epoch loss reconstruction KL state"
    assert header.split() == columns.split()
    rows = ["1 32 0.0021 10 3/8 481 391 90 running", "0 32 0.001 10 8/8 520 430 90 done",
            "3 8 0.001 1 2/8 12,345 12,255 90 stopped", "4 32 0.00012 10 0/8 running",
            "5 32 0.0001 10 1/8 waiting", "2 32 0.01 10 1/8 90 0 90 failed"]  # fmt: skip
    assert [line.split() for line in lines[:6]] == [row.split() for row in rows]


@pytest.mark.parametrize(("height", "numbers"), [(100, "103452"), (2, "10"), (1, "1"), (0, "1"), (-3, "1")])
def test_table_shows_the_best_where_there_is_no_room(height: int, numbers: str) -> None:
    lines = shown(busy(), 120, height)
    assert [line.split()[0] for line in lines[1 : 1 + len(numbers)]] == list(numbers)
    assert lines[1 + len(numbers)].startswith("3 of 24 trials ended")


def test_table_of_a_narrow_terminal_still_has_a_line_for_each_trial() -> None:
    assert [line.split()[0] for line in shown(busy(), 60)[1:7]] == list("103452")


def test_table_is_cut_nowhere_in_100_columns() -> None:
    lines = shown(busy(), 100)
    assert [len(line.split()) for line in lines[:7]] == [9, 9, 9, 9, 6, 6, 9]
    assert "…" not in "".join(lines)


def test_nothing_is_wrapped_in_100_columns(clock: Clock) -> None:
    view = busy()
    clock.now += 60
    assert len(shown(view, 100)) == 1 + 6 + 1


class FakeHub:
    """Counts how often it is to stop."""

    def __init__(self, stopped: Callable[[], None] = lambda: None) -> None:
        self.stops = 0

        def stop() -> None:
            self.stops += 1
            stopped()

        self.stop = SimpleNamespace(remote=stop)


def finished() -> Future[None]:
    fit: Future[None] = Future()
    fit.set_result(None)
    return fit


def test_each_trial_is_told_once_but_those_of_an_earlier_attempt(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, lr=0.003), entry(3, "failed", "why", lr=0.004)]
    view, hub = seen(known), FakeHub()
    fit: Future[None] = Future()

    def meanwhile(now: float) -> None:
        number = round((now - 1000) / 0.2) - 1
        if number < 4:
            put(view, entry(number, "done", lr=0.001 * (number + 1)), [500.0 - number] * EPOCHS)
            view.ended(number)
        elif number == 9:
            fit.set_result(None)

    clock.meanwhile = meanwhile
    assert view.follow(fit, hub, None) is None
    told = capsys.readouterr().out.splitlines()
    begin = [line.partition("; ")[0] for line in told]
    assert begin == [
        "trial 2 (latent_dim 32, lr 0.003, samples 10) done after epoch 8, loss 498",
        "trial 3 (latent_dim 32, lr 0.004, samples 10) done after epoch 8, loss 497",
    ]
    assert told[-1].endswith("best so far: 497 by trial 3")
    assert hub.stops == 0


def test_what_ended_last_is_told_too(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    view = seen()
    put(view, entry(0, "failed", "bad numbers"))
    view.ended(0)
    assert view.follow(finished(), FakeHub(), None) is None
    assert capsys.readouterr().out.startswith(
        "trial 0 (latent_dim 32, lr 0.001, samples 10) failed after epoch 0: bad numbers; 1 of 6 trials ended, 1 failed"
    )


def test_log_hears_of_a_quiet_search_every_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit: Future[None] = Future()
    clock.meanwhile = lambda now: fit.set_result(None) if now > 1000 + 200 and not fit.done() else None
    seen().follow(fit, FakeHub(), None)
    assert capsys.readouterr().out == 3 * "0 of 6 trials ended, 0 running\n"


def test_time_budget_stops_the_search_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit: Future[None] = Future()
    hub = FakeHub()
    clock.meanwhile = lambda now: fit.set_result(None) if now > 1050 and not fit.done() else None
    assert seen().follow(fit, hub, 10.0) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert told[0].startswith("time is up: stopping after a checkpoint of each trial")
    assert hub.stops == 1
    assert 1050 < clock.now < 1051


def test_search_that_ends_within_its_time_is_not_stopped(clock: Clock) -> None:
    fit: Future[None] = Future()
    hub = FakeHub()
    clock.meanwhile = lambda now: fit.set_result(None) if now > 1009 and not fit.done() else None
    assert seen().follow(fit, hub, 10.0) is None
    assert hub.stops == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_search_after_a_checkpoint(
    signum: signal.Signals, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    fit: Future[None] = Future()
    hub = FakeHub(lambda: fit.set_result(None))
    clock.meanwhile = lambda now: signal.raise_signal(signum) if not hub.stops else None
    before = signal.getsignal(signum)
    assert seen().follow(fit, hub, 10.0) == signum
    assert capsys.readouterr().out == "stopping after a checkpoint of each trial; once more stops at once\n"
    assert hub.stops == 1
    assert signal.getsignal(signum) is before


def test_second_signal_ends_the_search_at_once(clock: Clock) -> None:
    clock.meanwhile = lambda now: signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as error:
        seen().follow(Future(), FakeHub(), None)
    assert error.value.code == 130


def test_signal_after_the_time_is_up_ends_the_search_at_once(clock: Clock) -> None:
    fit: Future[None] = Future()
    hub = FakeHub()
    signals = iter([signal.SIGINT])

    def meanwhile(now: float) -> None:
        if hub.stops and (signum := next(signals, None)):
            signal.raise_signal(signum)
        elif hub.stops and not fit.done():
            fit.set_result(None)

    clock.meanwhile = meanwhile
    with pytest.raises(SystemExit):
        seen().follow(fit, hub, 10.0)


def test_error_of_the_search_is_not_lost(clock: Clock) -> None:
    fit: Future[None] = Future()
    fit.set_exception(RuntimeError("Ray has gone"))
    with pytest.raises(RuntimeError, match="Ray has gone"):
        seen().follow(fit, FakeHub(), None)


def test_terminal_gets_the_table(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    assert busy().follow(finished(), FakeHub(), None) is None
    assert "reconstruction" in screen.getvalue()
    assert "12,345" in screen.getvalue()


# --- what Tune tells


class Told:
    """The callback, its view and its folder, and the trials that Tune would tell it of."""

    def __init__(self, folder: Path, known: Sequence[Entry] = ()) -> None:
        self.view, self.runs = seen(known), folder
        save(Storage(folder / "s"), PLAN, known)  # as the command does before it starts
        self.watch = search._Watch(self.view, Storage(folder / "s"), PLAN)

    def start(self, one: Any) -> None:
        self.watch.on_trial_start(1, [], one)

    def result(self, one: Any, **result: Any) -> None:
        self.watch.on_trial_result(1, [], one, result)

    def epochs(self, one: Any, *losses: float) -> None:
        for epoch, loss in enumerate(losses):
            self.result(one, record=record(epoch, loss), loss=loss, epochs=epoch + 1)

    def complete(self, one: Any) -> None:
        self.watch.on_trial_complete(1, [], one)

    def stored(self) -> list[tuple[int, str, str]]:
        return [(t.number, t.state, t.reason) for t in open_search(str(self.runs), "s").trials]


def tunes(number: int, error: str | None = None, **setting: Any) -> Any:
    """A trial as Tune has it."""
    one = entry(number, **setting)
    given = {"number": number, "name": one.name, "setting": one.setting}
    return SimpleNamespace(trial_id=f"abc_{number}", config={"given": given}, get_error=lambda: error)


def test_states_of_trials_are_stored_as_they_change(tmp_path: Path) -> None:
    told = Told(tmp_path)
    whole, early, failing, stopped = (tunes(number, lr=0.001 * (number + 1)) for number in range(4))
    for one in (early, whole):
        told.start(one)
    assert told.stored() == [(0, "running", ""), (1, "running", "")]
    told.epochs(whole, *[500.0] * EPOCHS)
    told.epochs(early, 600.0, 590.0)
    told.complete(whole)
    told.complete(early)
    told.start(failing)
    told.result(failing, state="failed", reason="bad numbers")
    told.complete(failing)
    told.start(stopped)
    told.result(stopped, state="waiting")
    told.complete(stopped)
    assert told.stored() == [(0, "done", ""), (1, "stopped", ""), (2, "failed", "bad numbers"), (3, "waiting", "")]
    assert told.view._news == [0, 1, 2, 3]
    found = open_search(str(tmp_path), "s")
    assert [t.setting["lr"] for t in found.trials] == [0.001, 0.002, 0.003, 0.004]
    assert Plan.from_about(found.about, "s") == PLAN


def test_trial_whose_process_died_has_failed_with_the_last_line(tmp_path: Path) -> None:
    told = Told(tmp_path)
    dead, silent = tunes(0, "Traceback\n  File x\nWorkerCrashedError: killed by signal 9\n"), tunes(1, lr=0.002)
    for one in (dead, silent):
        told.start(one)
        told.watch.on_trial_error(1, [], one)
    assert told.stored() == [(0, "failed", "WorkerCrashedError: killed by signal 9"), (1, "failed", "its process died")]
    assert told.view._news == [0, 1]


def test_trials_that_had_ended_stay_so(tmp_path: Path) -> None:
    known = [entry(0, "done"), entry(1, "stopped", lr=0.002), entry(2, "failed", "why", lr=0.003), entry(3, lr=0.004)]
    told = Told(tmp_path, known)
    for number in range(4):
        told.start(tunes(number, lr=0.001 * (number + 1)))
    assert told.stored() == [(0, "done", ""), (1, "stopped", ""), (2, "running", ""), (3, "running", "")]
    told.epochs(tunes(0), 500.0, 490.0)
    told.complete(tunes(0))
    assert told.stored()[0] == (0, "done", "")
    assert told.view._news == []


def test_trial_that_takes_over_another_keeps_its_number_and_name(tmp_path: Path) -> None:
    """Population based training gives it the other's configuration, number and all."""
    told = Told(tmp_path)
    one, better = tunes(0), tunes(1, lr=0.002)
    told.start(one)
    told.start(better)
    one.config = {"given": {**better.config["given"], "setting": {**NOTEBOOK, "lr": 0.0016}}}
    told.epochs(one, 500.0)
    told.start(one)
    told.complete(one)
    found = open_search(str(tmp_path), "s").trials
    assert [(t.number, t.name, t.setting["lr"], t.state) for t in found] == [
        (0, "00-latent_dim32-lr0.001-samples10", 0.0016, "stopped"),
        (1, "01-latent_dim32-lr0.002-samples10", 0.002, "running"),
    ]


def test_search_ends_when_it_is_to_stop_and_no_trial_is_at_work() -> None:
    view = seen()
    stop = search._Stop(view)
    put(view, entry(0, "running"))
    assert not stop.stop_all()
    view.stopping = True
    assert not stop.stop_all()
    put(view, entry(0, "waiting"))
    assert stop.stop_all()
    view.stopping = False
    assert not stop.stop_all()
    assert not stop("abc_0", {})


# --- what Tune is told


def test_name_of_a_trial() -> None:
    setting = {"samples": 3, "latent_dim": 16, "lr": 0.00213}
    assert name_of(3, setting) == "03-latent_dim16-lr0.0021-samples3"
    assert name_of(0, NOTEBOOK) == "00-latent_dim32-lr0.001-samples10"
    assert name_of(123, setting) == "123-latent_dim16-lr0.0021-samples3"


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Any]]:
    """What Tune is told: numbers, and the content of the checkpoint, if there is one."""
    told: list[tuple[dict[str, Any], Any]] = []

    def report(numbers: dict[str, Any], checkpoint: Any = None) -> None:
        files = {path.name: path.read_text() for path in Path(checkpoint.path).iterdir()} if checkpoint else None
        told.append((numbers, files))

    monkeypatch.setattr(ray.tune, "report", report)
    return told


@pytest.mark.parametrize(
    ("loss", "told"), [(500.5, 500.5), (None, math.inf), (math.nan, math.inf), (-math.inf, math.inf), (-3.0, -3.0)]
)
def test_tune_is_told_a_number_for_every_loss(loss: float | None, told: float, reports: list[Any]) -> None:
    trial.report(record(4, loss))
    ((numbers, files),) = reports
    assert (numbers["loss"], numbers["epochs"], files) == (told, 5, None)
    assert numbers["record"]["seconds"] == 10.0


def test_tune_is_given_a_checkpoint_that_says_whose_it_is(reports: list[Any]) -> None:
    trial.report(record(0, 1.0), "03-a")
    assert [files for _, files in reports] == [{"writer.json": '"03-a"'}]


def test_trial_ends_when_tune_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: what it told is on the storage already."""

    def enough(record: dict[str, Any], writer: str | None) -> None:
        raise SystemExit

    monkeypatch.setattr(trial, "report", enough)
    observer = trial._TuneObserver("hub", None)
    assert observer.wants_saved
    with pytest.raises(SystemExit):
        observer.epoch(record(1, 1.0))


def test_hub_is_asked_twice_a_second_whether_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answers = Clock(), iter([False, True])
    monkeypatch.setattr(trial, "time", clock)
    monkeypatch.setattr(trial, "wants_to_stop", lambda hub: next(answers))
    observer = trial._TuneObserver("hub", None)
    assert [observer.stopping() for _ in range(100)] == [False] * 100
    clock.now += 0.5
    assert [observer.stopping() for _ in range(100)] == [False] * 100
    clock.now += 0.5
    assert [observer.stopping() for _ in range(100)] == [True] * 100


class Trial:
    """One trial, its training replaced by `train`; `tell` runs it as Tune would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = write_search(folder, [entry(0)], {}) / "trials" / entry(0).name
        self.trained: list[Config] = []
        self.train: Callable[[Any], bool] = lambda observer: True
        self.stop = False

        def alone(job: Job, config: Config, storage: Storage, observer: Any) -> bool:
            assert storage.uri == str(self.folder)
            self.trained.append(config)
            return self.train(observer)

        context = SimpleNamespace(get_trial_dir=lambda: f"/tune/somewhere/{self.folder.name}")
        monkeypatch.setattr(ray.tune, "get_context", lambda: context)
        monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: None)
        monkeypatch.setattr(trial, "_alone", alone)
        monkeypatch.setattr(trial, "wants_to_stop", lambda hub: self.stop)

    def tell(self, ended: frozenset[str] = frozenset(), population: bool = False) -> None:
        job = Job(
            search=str(self.folder.parent.parent), config=PLAN.config, space=PLAN.space, workers=1, cpus=1, gpus=0.0,
            ended=ended, population=population, hub="hub",
        )  # fmt: skip
        trial.run_trial({"given": {"number": 0, "name": "other", "setting": NOTEBOOK | {"lr": 0.004}}}, job)


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(tmp_path, monkeypatch)


def test_trial_trains_its_setting_in_its_folder(one: Trial, reports: list[Any]) -> None:
    one.train = lambda observer: observer.epoch(record(0, 500.0)) or True
    one.tell()
    config = PLAN.config.replace(latent_dim=32, lr=0.004, samples=10)
    assert one.trained == [config]
    assert Config.from_json((one.folder / "config.json").read_text(), "") == config
    assert [(numbers["loss"], numbers["epochs"], files) for numbers, files in reports] == [(500.0, 1, None)]


def test_trial_that_had_ended_only_tells_its_epochs(one: Trial, reports: list[Any]) -> None:
    one.folder.mkdir(parents=True)
    lines = [json.dumps(record(epoch, loss)) for epoch, loss in enumerate((500.0, None, 480.0))]
    (one.folder / "metrics.jsonl").write_text("\n".join(lines))
    one.tell(ended=frozenset([one.folder.name]))
    assert [(numbers["epochs"], numbers["loss"]) for numbers, _ in reports] == [(1, 500.0), (2, math.inf), (3, 480.0)]
    assert one.trained == []


def test_trial_that_had_not_ended_tells_its_epochs_and_goes_on(one: Trial, reports: list[Any]) -> None:
    one.folder.mkdir(parents=True)
    (one.folder / "metrics.jsonl").write_text(json.dumps(record(0, 500.0)))
    one.train = lambda observer: observer.epoch(record(1, 490.0)) or True
    one.tell(ended=frozenset(["another"]))
    assert [numbers["loss"] for numbers, _ in reports] == [500.0, 490.0]


def test_trial_does_not_begin_in_a_search_that_is_to_stop(one: Trial, reports: list[Any]) -> None:
    one.stop = True
    one.tell()
    assert reports == [({"state": "waiting"}, None)]
    assert one.trained == []
    assert not one.folder.exists()


def test_trial_that_was_interrupted_waits(one: Trial, reports: list[Any]) -> None:
    one.train = lambda observer: False
    one.tell()
    assert [numbers for numbers, _ in reports] == [{"state": "waiting"}]


@pytest.mark.parametrize("error", [RunFailed("bad numbers\nmore"), UsageError("bad numbers")])
def test_trial_that_cannot_go_on_says_why_in_a_line(error: Exception, one: Trial, reports: list[Any]) -> None:
    def train(observer: Any) -> bool:
        raise error

    one.train = train
    one.tell()
    assert [numbers for numbers, _ in reports] == [{"state": "failed", "reason": "bad numbers"}]


# --- population based training: taking over


def from_tune(writer: str, folder: Path) -> Any:
    """Tune's checkpoint of a trial."""
    folder.mkdir()
    (folder / "writer.json").write_text(json.dumps(writer))
    return SimpleNamespace(as_directory=lambda: nullcontext(str(folder)))


def state(folder: Path) -> tuple[float, dict[str, Any]]:
    latest = Checkpoints(Storage(folder)).latest()
    assert latest is not None
    return latest.tensors["w"][0, 0].item(), latest.meta


@pytest.mark.parametrize("lr", [0.007, 0.004])
def test_trial_takes_over_the_weights_of_a_better_one_with_its_own_setting(
    lr: float, one: Trial, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    better = one.folder.parent / "01-better"
    theirs, ours = (PLAN.config.replace(**(NOTEBOOK | {"lr": value})) for value in (lr, 0.004))
    saved(Storage(better), 7.0, 30, config=theirs.to_dict(), records=["past"])
    saved(Storage(one.folder), 1.0, 30, config=ours.to_dict(), records=[])
    saved(Storage(one.folder), 1.5, 40, config=ours.to_dict(), records=[])
    before = contents(better)
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: from_tune("01-better", one.folder.parent / "from-tune"))
    one.tell(population=True)
    weight, meta = state(one.folder)
    assert (weight, meta["step"], meta["records"], meta["config"]) == (7.0, 30, ["past"], ours.to_dict())
    assert len(list((one.folder / "checkpoints").iterdir())) == 1  # or the latest would be its own of before
    assert contents(better) == before
    assert one.trained == [ours]


def test_trial_of_a_population_goes_on_from_its_own(
    one: Trial, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = PLAN.config.replace(**{**NOTEBOOK, "lr": 0.004})
    saved(Storage(one.folder), 1.0, 30, config=ours.to_dict(), val_loss=400.0)
    saved(Storage(one.folder), 2.0, 40, config=ours.to_dict(), val_loss=500.0)
    before = contents(one.folder / "checkpoints")
    one.train = lambda observer: observer.epoch(record(3, 500.0)) or True
    one.tell(population=True)  # after an interruption: Tune has no checkpoint
    monkeypatch.setattr(ray.tune, "get_checkpoint", lambda: from_tune(one.folder.name, one.folder.parent / "from-tune"))
    one.tell(population=True)
    assert contents(one.folder / "checkpoints") == before
    assert [files for _, files in reports] == 2 * [{"writer.json": json.dumps(one.folder.name)}]


def test_trial_of_a_population_has_its_new_setting_in_its_checkpoint(one: Trial, reports: list[Any]) -> None:
    """Interrupted after it got its setting, and before it took it over."""
    saved(Storage(one.folder), 1.0, 30, config=PLAN.config.replace(lr=0.009).to_dict())
    one.tell(population=True)
    assert state(one.folder)[1]["config"]["lr"] == 0.004

"""The search on the command line, without Ray: mistakes, the plan, resuming, and `--from-search`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from dogvae.cluster import connect, nodes
from dogvae.commands import search as command
from dogvae.commands import train
from dogvae.commands.entry import run as run_command
from dogvae.config import ModelConfig
from dogvae.errors import UsageError
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.run_folder import check_copy, copy_checkpoints, save_config
from tests.conftest import WriteDataset
from tests.support.searches import PLAN, Spec, contents, entry, searched, setting, write_search
from tune import search
from tune.ranking import best_run
from tune.search_folder import SearchPlan, open_search
from tune.space import Space

CHECKPOINT = "checkpoints/step-{:09d}-0123456789abcdef.safetensors"


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray, or looking for one, fails the test."""
    for module, name in ((ray, "init"), (connect, "connect"), (search, "start_events")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("Ray was started"))


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake cluster of one node."""
    monkeypatch.setattr(connect, "connect", lambda address, verbose: "Ray at nowhere")
    monkeypatch.setattr(nodes, "_autoscaler_limits", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [node(CPU=2.0)])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})


class Shell:
    """A folder, and commands typed there."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.runs, self._capsys = folder, folder / "runs", capsys

    def run(self, *argv: str) -> tuple[int, str, str]:
        """`python -m tune ...`: exit status, stdout and stderr."""
        return run_command(command.main, argv), *self._capsys.readouterr()

    def mistake(self, *argv: str, said: str = "", main: Callable[[Sequence[str]], int] = command.main) -> str:
        """The one error line of a mistake. Nothing in the folder may change, and stdout is empty or `said`."""
        before = contents(self.folder)
        assert run_command(main, argv) == 2
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
    """The path of a prepared dataset of 16 training and 4 validation images."""
    images = np.zeros((8, 3, 32, 32), np.uint8)
    return str(write_dataset([images, images], [images[:4]]))


# --- mistakes


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("search --trials 0", "--trials: 0 .* 1$"),
        ("search --trials many", "--trials.*'many'.*python -m tune search --help"),
        ("search --epochs -2", "--epochs: -2 .* 0$"),
        ("search --seed 4294967296", "--seed: 4294967296 .* 4294967295$"),
        ("search --search lr=choice(0.1) --set lr=0.1", "--search lr: --set fixes it already"),
        ("search --searcher grid", "--searcher: 'grid' .* random, optuna$"),
        ("search --scheduler hyperband", "--scheduler: 'hyperband' .* asha, pbt, none$"),
        ("search --scheduler pbt --searcher optuna", "--scheduler pbt.* leave out --searcher optuna$"),
        ("search --scheduler pbt --workers-per-trial 2", "--scheduler pbt.* leave out --workers-per-trial$"),
        ("search --scheduler pbt --set lr=0.1 --set samples=1", "--scheduler pbt: .* add another"),
        ("search --gpus-per-trial 2", "--gpus-per-trial: a worker has one GPU.* --workers-per-trial 4$"),
        ("search --gpus-per-trial 0.5 --workers-per-trial 2", "--gpus-per-trial: a worker has one GPU.* alone"),
        ("search --cpus-per-trial 0", "--cpus-per-trial: 0 "),
        ("search --workers-per-trial 0", "--workers-per-trial: 0 "),
        ("search --time-budget junk", "--time-budget: 'junk' "),
        ("search --name ../x", "--name: '../x' "),
        ("search --data nowhere", "nowhere"),
        ("", "--help"),
        ("report", "--help"),
    ],
)
def test_mistake_is_one_line_before_ray_starts(typed: str, message: str, shell: Shell) -> None:
    assert re.search(message, shell.mistake(*typed.split()))


@pytest.mark.parametrize("typed", ["--searcher optuna", "--resume dogs"])
def test_missing_optuna_is_a_mistake(typed: str, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    write_search(shell.runs, [], replace(PLAN, searcher="optuna"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "--searcher optuna: Optuna is not installed" in shell.mistake("search", *typed.split())


@pytest.mark.parametrize(
    "typed",
    [
        *("--name other", "--epochs 9", "--searcher optuna", "--scheduler none", "--seed 0"),
        *("--search beta=uniform(0,4)", "--set width=8"),
        *("--gpus-per-trial 1", "--cpus-per-trial 2", "--workers-per-trial 2"),
    ],
)
def test_resumed_search_refuses_other_settings(typed: str, shell: Shell) -> None:
    write_search(shell.runs, [Spec(setting())])
    told = shell.mistake("search", "--resume", "dogs", *typed.split())
    assert re.match(rf"error: .*{typed.partition('=')[0].split()[0]}", told)
    assert re.search("this search has .*; a resumed search keeps its settings|is another name", told)


@pytest.mark.parametrize("argv", [["search", "--resume"], ["report"], ["dashboard"]], ids=" ".join)
def test_missing_or_damaged_search_is_one_line(argv: list[str], shell: Shell) -> None:
    assert shell.mistake(*argv, "dogs").endswith("there is none in that folder yet")
    path = write_search(shell.runs, [Spec(setting(), [500.0])])
    assert shell.mistake(*argv, "cats").endswith(f"no search called cats in {shell.runs}; its searches are dogs")
    (path / "trials.json").write_text("[{")
    assert f"{path} is damaged: trials.json" in shell.mistake(*argv, "dogs")


@pytest.mark.parametrize(("name", "remedy"), [("run", "--name run --resume"), ("dogs", "--resume dogs"), ("x", "")])
def test_existing_name_is_refused(name: str, remedy: str, shell: Shell) -> None:
    save_config(Storage(shell.runs / "run"), PLAN.config)
    write_search(shell.runs, [Spec(setting())])
    (shell.runs / "x").mkdir()
    told = shell.mistake("search", "--data", "drawn:60", "--name", name)
    assert re.search(f"--name: {shell.runs}/{name} exists.*{remedy}.* choose another name", told)


def test_resuming_with_fewer_trials_or_a_damaged_plan_is_refused(shell: Shell) -> None:
    about = write_search(shell.runs, [Spec(setting())]) / "search.json"
    told = shell.mistake("search", "--resume", "dogs", "--trials", "5")
    assert told == "error: --trials: this search has 6 trials already, and 5 are fewer"
    about.write_text(json.dumps({**json.loads(about.read_text()), "config": "small"}))
    assert "search.json is damaged" in shell.mistake("search", "--resume", "dogs")


@pytest.mark.parametrize("typed", ["--cpus-per-trial 3", "--workers-per-trial 3", "--gpus-per-trial 1"])
def test_trial_that_never_fits_into_the_cluster_is_refused(typed: str, shell: Shell, two_cpus: None) -> None:
    told = shell.mistake("search", "--data", "drawn:60", *typed.split(), said="Ray at nowhere\n")
    assert re.search(f"{typed.split()[0]}.* never fits into this cluster", told)


@pytest.mark.parametrize(
    ("cluster", "cpus", "gpus", "room"),
    [
        ([node(CPU=4), node(CPU=3)], 2, 0.0, 3),  # one trial does not span two nodes
        ([node(CPU=2), node(False, CPU=64)], 1, 0.0, 2),
        ([node(CPU=8, GPU=1), node(CPU=2, GPU=4), node(CPU=8)], 1, 1.0, 3),
        ([node(CPU=8, GPU=1), node(CPU=2, GPU=4), node(CPU=8)], 1, 0.5, 4),
        ([node(CPU=16, GPU=1)], 1, 1 / 3, 3),
        ([node(CPU=16, GPU=1)], 4, 0.1, 4),
        ([node(CPU=16, GPU=2)], 1, 0.4, 4),  # a fraction does not span two GPUs
    ],
)
def test_room_for_workers(
    cluster: list[dict[str, Any]], cpus: int, gpus: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    assert nodes.slots(cpus, gpus) == room


# --- the plan


class Searches(list[Any]):
    """The arguments of all searches. A search ends at once, without an epoch, and with the status `end`."""

    end: int | None = 0

    def run(self, storage: Storage, *args: Any) -> int | None:
        self.append(args)
        return self.end


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> Searches:
    searches = Searches()
    monkeypatch.setattr(search, "run", searches.run)
    monkeypatch.setattr("tune.report.write", lambda found: None)  # drawing its picture takes seconds
    return searches


def test_flags_become_the_plan(searches: Searches, dogs: str, shell: Shell) -> None:
    typed = "--trials 7 --epochs 5 --seed 9 --search lr=uniform(0.1,0.2) --set width=8 --set latent_dim=4 "
    typed += "--scheduler none --searcher optuna --time-budget 2m --name s"
    assert shell.run("search", "--data", dogs, *typed.split())[0] == 0
    ((plan, known, at_once, budget_s, tracking),) = searches
    assert (known, at_once, budget_s, tracking) == ([], 2, 120.0, None)
    assert (plan.trials, plan.searcher, plan.scheduler, plan.seed) == (7, "optuna", "none", 9)
    assert (plan.workers, plan.cpus, plan.gpus) == (1, 1, 0.0)
    assert plan.space.to_json() == {"lr": "uniform(0.1,0.2)", "samples": "choice(1,3,10)"}
    flat = plan.config.flat()
    assert [flat[name] for name in ("epochs", "seed", "width", "latent_dim", "preset")] == [5, 9, 8, 4, "default"]
    assert (flat["data"], flat["image_size"], flat["batch_size"]) == (dogs, 32, 16)
    assert SearchPlan.from_dict(open_search("runs", "s").about, "s") == plan


@pytest.mark.parametrize(("typed", "preset", "epochs"), [("", "small", 8), ("--set preset=notebook", "notebook", 50)])
def test_search_without_data_is_small(
    typed: str, preset: str, epochs: int, searches: Searches, dogs: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dogvae.commands.search.DEFAULT_DATA", dogs)
    shell.run("search", *typed.split())
    ((plan, *_),) = searches
    assert (plan.config.preset, plan.config.epochs, plan.trials) == (preset, epochs, 12)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, 0])
def test_interrupted_search_prints_how_to_go_on(end: int, searches: Searches, dogs: str, shell: Shell) -> None:
    searches.end = int(end)
    status, said, told = shell.run("search", "--data", dogs, "--name", "s", "--runs", "my runs")
    assert status == (128 + end if end else 0)
    assert said.splitlines()[-1] == "stopped; to go on: python -m tune search --resume s --runs 'my runs'"
    assert told == ""


def test_search_without_one_epoch_has_failed(searches: Searches, dogs: str, shell: Shell) -> None:
    searches.end = None
    status, _, told = shell.run("search", "--data", dogs, "--name", "s")
    assert status == 1
    assert told.startswith(f"error: no trial of {shell.folder}/runs/s has finished an epoch")


def test_dry_run_prints_the_plan_and_changes_nothing(dogs: str, shell: Shell, two_cpus: None) -> None:
    before = contents(shell.folder)
    status, said, _ = shell.run("search", "--data", dogs, "--trials", "3", "--seed", "4", "--dry-run")
    assert status == 0
    shown, end = json.JSONDecoder().raw_decode(said)
    assert (shown["trials"], shown["seed"], shown["space"]["lr"]) == (3, 4, "loguniform(0.0003,0.01)")
    told, *first = said[end:].strip().splitlines()
    assert told == "2 at once; the first settings:"
    assert first == [str(Space.parse([], {}).setting(4, n)) for n in range(3)]
    assert contents(shell.folder) == before


def test_search_that_the_disk_cannot_hold_is_refused(
    searches: Searches, dogs: str, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial keeps the two latest checkpoints and the best, and writes another: 4 x 4 numbers for each weight."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    fixed = ["--search", "latent_dim=choice(4,8)", "--set", "width=4", "--set", "lr=0.001", "--trials", "9"]
    models = [ModelConfig(image_size=32, width=4, latent_dim=n) for n in (4, 8)]
    sizes = {m.latent_dim: sum(4 * p.numel() for p in VAE(m).parameters()) for m in models}
    needs = sum(16 * sizes[Space.parse(fixed[1:2], {}).setting(0, n)["latent_dim"]] for n in range(9))
    for free, status in ((needs - 1, 2), (needs, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        got, _, told = shell.run("search", "--data", dogs, "--name", f"s{status}", *fixed)
        assert (got, "the checkpoints of 9 trials may take" in told) == (status, status == 2)


# --- resuming


def test_run_that_is_not_there_is_started_by_resume_with_data(
    dogs: str, shell: Shell, two_cpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--name", "new", "--resume", "--epochs", "3", "--dry-run"]
    assert "add --data" in shell.mistake(*typed, main=train.main)
    assert run_command(train.main, [*typed, "--data", dogs]) == 0
    said, told = capsys.readouterr()
    assert (json.loads(said)["data"], json.loads(said)["epochs"]) == (dogs, 3)
    assert told.startswith("warning: --resume: there is no run new in runs yet, so it starts now\n")


def test_resumed_search_knows_its_plan_and_trials(searches: Searches, shell: Shell) -> None:
    """The second trial has not saved its end: it goes on."""
    specs = [Spec(setting(lr=0.002), state="failed", reason="why"), Spec(setting(), [490.0], state="stopped")]
    write_search(shell.runs, specs)
    shell.run("search", "--resume", "dogs")
    shell.run("search", "--resume", "dogs", "--trials", "9", "--time-budget", "30s")
    known = [entry(0, "failed", "why", lr=0.002), entry(1)]
    assert searches == [(PLAN, known, 2, None, None), (replace(PLAN, trials=9), known, 2, 30.0, None)]
    assert open_search("runs", "dogs").about["trials"] == 9


@pytest.mark.parametrize(
    ("state", "epochs", "steps", "resumed"),
    [
        ("done", 8, [70, 80], "done"),
        ("done", 8, [70], "waiting"),
        ("done", 7, [70], "waiting"),
        ("stopped", 2, [10, 20], "stopped"),
        ("stopped", 2, [10], "waiting"),
        ("stopped", 0, [], "waiting"),
        ("failed", 2, [10], "failed"),
        ("running", 2, [20], "running"),
        ("waiting", 2, [20], "waiting"),
    ],
)
def test_trial_without_its_last_epoch_or_checkpoint_goes_on(
    state: str, epochs: int, steps: list[int], resumed: str, tmp_path: Path
) -> None:
    """A kill came between the last of 8 epochs and its checkpoint."""
    found = searched(tmp_path, [Spec(setting(), [500.0] * epochs, state=state)])
    folder = found.storage / f"trials/{entry(0).name}"
    for step in steps:
        folder.write(CHECKPOINT.format(step), b"")
    assert command.resumed_entry(found.storage, PLAN, found.trials[0]) == entry(0, resumed)


# --- going on with the best trial


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--from-search nobody", ["no search called nobody", "dogs"]),
        ("--from-search dogs --data drawn:60", ["--from-search", "leave out --data"]),
        ("--from-search dogs --crop box", ["--from-search", "leave out --val-fraction and --crop"]),
        ("--from-search dogs --lr 0.5", ["--lr", "0.002", "0.5"]),
        ("--from-search dogs --latent-dim 8", ["--latent-dim", "32", "8"]),
        ("--from-search dogs --epochs 3", ["--epochs", "done 3 epochs"]),
        ("--from-search empty", ["no trial of", "has finished an epoch"]),
        ("--from-search dogs --name one", ["--name", "one exists", "--resume"]),
    ],
)
def test_mistake_with_from_search_is_one_line(typed: str, words: list[str], shell: Shell) -> None:
    write_search(shell.runs, [Spec(setting(), [500.0] * 8), Spec(setting(lr=0.002), [490.0, 480.0, 470.0])])
    write_search(shell.runs, [Spec(setting(), state="failed"), Spec(setting())], name="empty")
    save_config(Storage(shell.runs / "one"), PLAN.config)
    told = shell.mistake(*typed.split(), main=train.main)
    assert [word for word in words if word not in told] == [], told


def test_from_search_starts_with_the_best_trials_config(
    shell: Shell, two_cpus: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(shell.runs, [Spec(setting(), [500.0] * 8), Spec(setting(lr=0.002), [490.0] * 3)])
    before = contents(shell.folder)
    typed = ["--from-search", "dogs", "--epochs", "20", "--name", "longer", "--dry-run"]
    assert run_command(train.main, typed) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("run") == f"{shell.runs}/longer"
    assert shown.pop("workers") == "1 CPU worker of 2 CPUs"
    assert shown == PLAN.config.replace(lr=0.002, latent_dim=32, samples=10, epochs=20).to_dict()
    assert contents(shell.folder) == before


def test_copy_of_a_run_may_only_train_longer(tmp_path: Path) -> None:
    source, config = best_run(searched(tmp_path, [Spec(setting(), [500.0, 490.0])]))
    assert check_copy(source, config, {}) == config
    assert check_copy(source, config, {"epochs": 3, "lr": 0.001}) == config.replace(epochs=3)
    for changes, flag in (({"epochs": 2}, "--epochs: .* 2 epochs"), ({"batch_size": 4}, "--batch-size: .* 4")):
        with pytest.raises(UsageError, match=f"^{flag}"):
            check_copy(source, config, changes)
    with pytest.raises(UsageError, match=r"^--epochs: .* 2 epochs"):
        check_copy(source, config.replace(epochs=1), {})


def test_copied_checkpoints_are_the_same(tmp_path: Path) -> None:
    source, copy = Storage(tmp_path / "a"), Storage(tmp_path / "b")
    files = {CHECKPOINT.format(step): bytes([step]) for step in (1, 2)}
    for name, data in {**files, "metrics.jsonl": b""}.items():
        source.write(name, data)
    copy_checkpoints(source, copy)
    assert {name: copy.read(name) for name in files} == files
    assert copy.names() == []

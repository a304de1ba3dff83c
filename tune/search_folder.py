"""The folder of a search: search.json holds its plan, trials.json the state of each trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dogvae.config import Config, check
from dogvae.errors import UsageError
from dogvae.json_text import parse
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.run_folder import CONFIG, check_name
from tune.space import Space

FORMAT, VERSION = "dogvae-search", 1
ABOUT, TRIALS, FOLDER = "search.json", "trials.json", "trials"
NUMBERS = ("val_loss", "val_reconstruction", "val_kl", "val_explained", "images_per_s")  # null where not finite
STATES = ("running", "stopped", "done", "failed", "waiting")
SEARCHERS, SCHEDULERS = ("random", "optuna"), ("asha", "pbt", "none")

# Type and range of the fields of a SearchPlan, besides its space and config.
LIMITS: dict[str, tuple[type, dict[str, Any]]] = {
    "trials": (int, {"low": 1, "high": 100_000}),
    "searcher": (str, {"choices": SEARCHERS}),
    "scheduler": (str, {"choices": SCHEDULERS}),
    "seed": (int, {"low": 0, "high": 2**32 - 1}),
    "workers": (int, {"low": 1}),
    "cpus": (int, {"low": 1}),
    "gpus": (float, {"low": 0, "high": 1}),
}

T = TypeVar("T")


@dataclass(frozen=True)
class SearchPlan:
    """What the user asked for, as search.json keeps it."""

    space: Space
    config: Config
    """The config of every trial, before its own settings are put in. It names the dataset."""
    trials: int
    searcher: str
    scheduler: str
    seed: int
    workers: int
    """Workers of each trial."""
    cpus: int
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker: 0, 1 or a fraction."""

    def to_json(self) -> str:
        """The text of search.json."""
        about = {name: getattr(self, name) for name in LIMITS}
        what = {"space": self.space.to_json(), "config": self.config.to_dict()}
        return json.dumps({"format": FORMAT, "version": VERSION, **about, **what}, indent=2) + "\n"

    @staticmethod
    def from_dict(about: dict[str, Any], where: str) -> SearchPlan:
        """The plan in a parsed search.json of the folder `where`. Raises UsageError if a field is missing or wrong."""
        try:
            for name, (kind, limits) in LIMITS.items():
                check(name, about[name], kind, limits)
            space, config = Space.from_json(about["space"]), Config.make_nested(about["config"])
            return SearchPlan(space, config, **{name: about[name] for name in LIMITS})
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(f"{where}/{ABOUT} is damaged ({error}): start a new search under another name") from error


@dataclass(frozen=True)
class Entry:
    """A trial in trials.json: its number, folder name, settings, state (one of STATES) and why it failed."""

    number: int
    name: str
    setting: dict[str, Any]
    state: str = "waiting"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial(Entry):
    """A trial with its epochs: `records` are the lines of its metrics.jsonl."""

    records: list[dict[str, Any]]

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.records[-1]["epoch"] + 1 if self.records else 0

    @property
    def finite(self) -> list[dict[str, Any]]:
        """The records with a finite validation loss."""
        return metrics.with_finite_loss(self.records)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record with the lowest validation loss."""
        return metrics.best(self.records)

    @property
    def seconds(self) -> float:
        """Time of training and validation so far."""
        return self.records[-1]["seconds"] if self.records else 0.0


@dataclass
class Search:
    """A search as it was when it was opened: `about` is the parsed search.json."""

    storage: Storage
    about: dict[str, Any]
    trials: list[Trial]

    @property
    def space(self) -> Space:
        """The search space."""
        return Space.from_json(self.about["space"])


def parameters(search: Search) -> list[str]:
    """The names of the searched settings."""
    return list(search.about["space"])


def save(storage: Storage, plan: SearchPlan, entries: Sequence[Entry]) -> None:
    """Write trials.json, then search.json: a folder with search.json is a complete search."""
    save_trials(storage, entries)
    storage.write(ABOUT, plan.to_json().encode())


def save_trials(storage: Storage, entries: Sequence[Entry]) -> None:
    """Write trials.json."""
    storage.write(TRIALS, (json.dumps([asdict(entry) for entry in entries], indent=1) + "\n").encode())


def open_search(runs: str, name: str) -> Search:
    """Read the search `runs/name`. Raises UsageError if there is none, or if it is newer than this code or damaged."""
    storage = Storage(runs) / check_name(name)
    try:
        if not storage.exists(ABOUT):
            raise UsageError(_no_search(Storage(runs), name, storage))
        about = read_checked(storage, ABOUT, lambda: parse(storage.read(ABOUT)))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise UsageError(f"{storage.uri} is not a search: {ABOUT} is not in the format {FORMAT}; give another name")
        if (version := read_checked(storage, ABOUT, lambda: int(about["version"]))) > VERSION:
            raise UsageError(f"{storage.uri} is a search of version {version}, newer than {VERSION}; update DogVAE")
        space = read_checked(storage, ABOUT, lambda: _space(about["space"]))
        entries = read_checked(storage, TRIALS, lambda: _entries(parse(storage.read(TRIALS)), space))
        return Search(storage, about, [Trial(**e, records=_records(storage, e["name"])) for e in entries])
    except OSError as error:
        raise UsageError(f"{storage.uri} cannot be read: {error}") from error


def read_checked(
    storage: Storage, file: str, read: Callable[[], T], otherwise: str = "start a new search under another name"
) -> T:
    """The result of `read`, which parses `file`. Raises UsageError if the file is missing or has other content."""
    try:
        return read()
    except FileNotFoundError:
        what = "is missing"
    except KeyError as error:
        what = f"has no {error}"
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"is not valid ({error})"
    raise UsageError(f"{storage.uri} is damaged: {file} {what}; restore it from a backup, or {otherwise}")


def _no_search(runs: Storage, name: str, storage: Storage) -> str:
    """The message for a folder without search.json."""
    if storage.exists(TRIALS):
        return f"{storage.uri} is damaged: {ABOUT} is missing; restore it from a backup, or start a new search"
    if storage.exists(CONFIG):
        return (
            f"{storage.uri} is a single run, not a search; to see it: tensorboard --logdir {storage.uri}; to train it "
            f"longer: dogvae train --name {name} --resume --epochs N"
        )
    if runs.local is None:  # an object store lists files only
        return f"there is no search called {name} in {runs.uri}"
    others = sorted(path.parent.name for path in runs.local.glob(f"*/{ABOUT}"))
    known = f"its searches are {', '.join(others)}" if others else "there is none in that folder yet"
    return f"there is no search called {name} in {runs.uri}; {known}"


def _space(texts: dict[str, str]) -> Space:
    space = Space.from_json(texts)
    if not space.domains:
        raise ValueError("the space is empty")
    return space


def _entries(entries: list[dict[str, Any]], space: Space) -> list[dict[str, Any]]:
    """The checked entries of trials.json."""
    checked = []
    for entry in entries:
        kept = {key: entry[key] for key in ("number", "name", "setting", "state", "reason")}
        number, name, setting, state = (kept[key] for key in ("number", "name", "setting", "state"))
        if not isinstance(number, int) or not isinstance(name, str):
            raise ValueError(f"a trial has the number {number!r} and the name {name!r}")
        if state not in STATES:
            raise ValueError(f"trial {number} has the state {state!r}, not one of {', '.join(STATES)}")
        if set(setting) != set(space.domains):
            raise ValueError(f"trial {number} sets {', '.join(setting) or 'nothing'}, not {', '.join(space.domains)}")
        for parameter, value in setting.items():
            space.domains[parameter].nearest(value)  # a TypeError for a value of another type
        checked.append(kept)
    for key in ("number", "name"):
        if len({entry[key] for entry in checked}) < len(checked):
            raise ValueError(f"two trials have the same {key}")
    return checked


def _records(storage: Storage, name: str) -> list[dict[str, Any]]:
    """The epochs of a trial; an empty list before its first epoch ends."""
    folder = storage / f"{FOLDER}/{name}"

    def read() -> list[dict[str, Any]]:
        records = metrics.read(folder)
        for r in records:  # a KeyError or a TypeError if a number is missing or is not a number
            sum([r["epoch"], r["seconds"], *(r[key] or 0.0 for key in NUMBERS)])
        return records

    return read_checked(folder, metrics.FILE, read, "delete it to leave its epochs out")

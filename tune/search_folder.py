"""What a search is, and its two files: search.json, and trials.json with how its trials stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dogvae.config import Config, check
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.run_folder import CONFIG, check_name
from tune.space import Space

FORMAT, VERSION = "dogvae-search", 1
ABOUT, TRIALS, FOLDER = "search.json", "trials.json", "trials"
NUMBERS = ("val_loss", "val_reconstruction", "val_kl", "val_explained", "images_per_s")  # null where not finite
STATES = ("running", "stopped", "done", "failed", "waiting")
SEARCHERS, SCHEDULERS = ("random", "optuna"), ("asha", "pbt", "none")

LIMITS: dict[str, tuple[type, dict[str, Any]]] = {
    "trials": (int, {"low": 1, "high": 100_000}),
    "searcher": (str, {"choices": SEARCHERS}),
    "scheduler": (str, {"choices": SCHEDULERS}),
    "seed": (int, {"low": 0, "high": 2**32 - 1}),
    "workers": (int, {"low": 1}),
    "cpus": (int, {"low": 1}),
    "gpus": (float, {"low": 0, "high": 1}),
}


@dataclass(frozen=True)
class Plan:
    """What a search is, as search.json keeps it."""

    space: Space
    config: Config
    """Of every trial, but for what is searched; the dataset is part of it."""
    trials: int
    searcher: str
    scheduler: str
    seed: int
    workers: int
    cpus: int
    gpus: float
    """Of each worker."""

    def to_json(self) -> str:
        """The text of search.json."""
        about = {name: getattr(self, name) for name in LIMITS}
        what = {"space": self.space.to_json(), "config": self.config.to_dict()}
        return json.dumps({"format": FORMAT, "version": VERSION, **about, **what}, indent=2) + "\n"

    @staticmethod
    def from_about(about: dict[str, Any], where: str) -> Plan:
        """The plan that search.json holds; UsageError if it is damaged."""
        try:
            for name, (kind, limits) in LIMITS.items():
                check(name, about[name], kind, limits)
            space, config = Space.from_json(about["space"]), Config.make_nested(about["config"])
            return Plan(space, config, **{name: about[name] for name in LIMITS})
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(f"{where}/{ABOUT} is damaged ({error}): search anew under another name") from error


def save(storage: Storage, plan: Plan, entries: Sequence[Entry]) -> None:
    """Write what a search is and how its trials stand; search.json last, it makes the folder a search."""
    save_trials(storage, entries)
    storage.write(ABOUT, plan.to_json().encode())


def save_trials(storage: Storage, entries: Sequence[Entry]) -> None:
    """Write how the trials stand."""
    storage.write(TRIALS, (json.dumps([asdict(entry) for entry in entries], indent=1) + "\n").encode())


T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What trials.json says of a trial: its number, its folder, its setting, and how it stands (one of STATES)."""

    number: int
    name: str
    setting: dict[str, Any]
    state: str = "waiting"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial(Entry):
    """One setting and the epochs that were trained with it; `records` are the lines of its metrics.jsonl."""

    records: list[dict[str, Any]]

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.records[-1]["epoch"] + 1 if self.records else 0

    @property
    def finite(self) -> list[dict[str, Any]]:
        """The records whose validation loss is a finite number."""
        return metrics.with_finite_loss(self.records)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the epoch with the least validation loss."""
        return metrics.best(self.records)

    @property
    def seconds(self) -> float:
        """Time of training and validation so far."""
        return self.records[-1]["seconds"] if self.records else 0.0


@dataclass
class Search:
    """A search as it was when it was opened: `about` is its search.json."""

    storage: Storage
    about: dict[str, Any]
    trials: list[Trial]

    @property
    def space(self) -> Space:
        """What is searched."""
        return Space.from_json(self.about["space"])


def parameters(search: Search) -> list[str]:
    """The names of the searched settings."""
    return list(search.about["space"])


def open_search(runs: str, name: str) -> Search:
    """Read `runs/name`. Raises UsageError if it is no search, of a newer version, or damaged."""
    storage = Storage(runs) / check_name(name)
    try:
        if not storage.exists(ABOUT):
            raise UsageError(_missing(Storage(runs), name, storage))
        about = _read(storage, ABOUT, lambda: json.loads(storage.read(ABOUT)))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise UsageError(f"{storage.uri} is no search: {ABOUT} is not of the format {FORMAT}; give another name")
        if (version := _read(storage, ABOUT, lambda: int(about["version"]))) > VERSION:
            raise UsageError(f"{storage.uri} is a search of version {version}, newer than {VERSION}; update DogVAE")
        space = _read(storage, ABOUT, lambda: _space(about["space"]))
        entries = _read(storage, TRIALS, lambda: _entries(json.loads(storage.read(TRIALS)), space))
        return Search(storage, about, [Trial(**e, records=_records(storage, e["name"])) for e in entries])
    except OSError as error:
        raise UsageError(f"{storage.uri} cannot be read: {error}") from error


def _missing(runs: Storage, name: str, storage: Storage) -> str:
    """What to say where there is no search.json."""
    if storage.exists(TRIALS):
        return f"{storage.uri} is damaged: {ABOUT} is missing; bring it back from a copy, or search anew"
    if storage.exists(CONFIG):
        return f"{storage.uri} is no search but one run; see it by tensorboard --logdir {storage.uri}"
    if runs.local is None:  # an object store lists files only
        return f"no search is called {name} in {runs.uri}"
    others = sorted(path.parent.name for path in runs.local.glob(f"*/{ABOUT}"))
    there = f"there are {', '.join(others)}" if others else "there is none yet"
    return f"no search is called {name} in {runs.uri}; {there}"


def _read(storage: Storage, file: str, read: Callable[[], T], otherwise: str = "search anew under another name") -> T:
    """What `read` makes of a file; UsageError if the file is missing, or not what we write."""
    try:
        return read()
    except FileNotFoundError:
        what = "is missing"
    except KeyError as error:
        what = f"has no {error}"
    except (TypeError, ValueError, AttributeError) as error:
        what = f"makes no sense ({error})"
    raise UsageError(f"{storage.uri} is damaged: {file} {what}; bring it back from a copy, or {otherwise}")


def _space(texts: dict[str, str]) -> Space:
    space = Space.from_json(texts)
    if not space.domains:
        raise ValueError("nothing is searched")
    return space


def _entries(entries: list[dict[str, Any]], space: Space) -> list[dict[str, Any]]:
    """What trials.json says of each trial, checked."""
    checked = []
    for entry in entries:
        kept = {key: entry[key] for key in ("number", "name", "setting", "state", "reason")}
        if not isinstance(kept["number"], int) or not isinstance(kept["name"], str):
            raise ValueError(f"trial {kept['number']!r} is called {kept['name']!r}")
        if kept["state"] not in STATES:
            raise ValueError(f"trial {kept['number']} is {kept['state']!r}, not {', '.join(STATES)}")
        if set(kept["setting"]) != set(space.domains):
            raise ValueError(f"trial {kept['number']} sets {', '.join(kept['setting']) or 'nothing'}")
        for parameter, value in kept["setting"].items():
            space.domains[parameter].nearest(value)  # a TypeError if it is of another type
        checked.append(kept)
    for key in ("number", "name"):
        if len({entry[key] for entry in checked}) < len(checked):
            raise ValueError(f"two trials have the same {key}")
    return checked


def _records(storage: Storage, name: str) -> list[dict[str, Any]]:
    """The epochs of a trial, none if it has not finished one."""
    folder = storage / f"{FOLDER}/{name}"

    def read() -> list[dict[str, Any]]:
        records = metrics.read(folder)
        for r in records:  # a TypeError or a KeyError if a number is none, or is not there
            sum([r["epoch"], r["seconds"], *(r[key] or 0.0 for key in NUMBERS)])
        return records

    return _read(folder, metrics.FILE, read, "delete it to leave its epochs out")

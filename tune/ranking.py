"""What a search has left, and what that says: reading it back as far as it has come, ranking, importance.

Losses are negative ELBOs of the validation images in nats per image; seconds are those of training and validation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dogvae.config import Config
from dogvae.console import UsageError
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.run_folder import CONFIG, check_name
from tune.space import Domain, Space

MIN_TRIALS = 4  # below it, importance would be guessed
FORMAT, VERSION = "dogvae-search", 1
ABOUT, TRIALS, FOLDER = "search.json", "trials.json", "trials"
NUMBERS = ("val_loss", "val_reconstruction", "val_kl", "val_explained", "images_per_s")  # null where not finite
STATES = ("running", "stopped", "done", "failed", "waiting")
SEARCHERS, SCHEDULERS = ("random", "optuna"), ("asha", "pbt", "none")

Row = dict[str, Any]
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
        return metrics.finite(self.records)

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


def equal_time(search: Search) -> float | None:
    """Seconds at which the trials compare: those of the fastest that is done; else what all but the failed reached."""
    done = [t.seconds for t in search.trials if t.records and t.state == "done"]
    return min(done or [t.seconds for t in search.trials if t.records and t.state != "failed"], default=None)


def common_epoch(search: Search) -> int:
    """The last epoch (1, 2, ...) that all trials have reached, but those that failed or have none; 0 if all such."""
    return min((t.epoch for t in search.trials if t.records and t.state != "failed"), default=0)


def importance(search: Search) -> dict[str, float | None]:
    """The share of the variance of the loss, at the last common epoch, that each parameter alone explains.

    Of choices the correlation ratio eta squared (between groups over total), of ranges the R squared of a parabola in
    the value or, for loguniform, its logarithm: a good learning rate lies in the middle. Chance alone explains
    something too: 1 - (1 - share) (n - 1) / (n - k) for n trials and k groups or coefficients takes that off, which is
    epsilon squared (Kelley 1935, PNAS 21, 554) for groups and adjusted R squared for parabolas, floored at 0. None if
    it cannot be told: fewer than 4 trials, no more trials than groups, or nothing varies.
    """
    at = common_epoch(search) - 1
    compared = [(t, r["val_loss"]) for t in search.trials if t.state != "failed" for r in t.finite if r["epoch"] == at]
    y = np.array([loss for _, loss in compared])
    domains = search.space.domains
    return {name: _share(domain, [t.setting[name] for t, _ in compared], y) for name, domain in domains.items()}


def _share(domain: Domain, values: list[Any], y: np.ndarray) -> float | None:
    levels = list(dict.fromkeys(values))
    k = len(levels) if domain.kind == "choice" else min(3, len(levels))
    if len(y) < MIN_TRIALS or k < 2 or len(y) <= k or np.ptp(y) == 0:
        return None
    if domain.kind == "choice":
        group = np.array([levels.index(value) for value in values])
        fitted = np.array([y[group == g].mean() for g in range(k)])[group]
    else:
        x = np.log(values) if domain.kind == "loguniform" else np.array(values, float)
        x = (x - x.mean()) / x.std()  # or powers of small numbers make the fit ill-conditioned
        fitted = np.polyval(np.polyfit(x, y, k - 1), x)
    unexplained = np.square(y - fitted).sum() / np.square(y - y.mean()).sum()
    return max(0.0, 1 - float(unexplained) * (len(y) - 1) / (len(y) - k))


def rows(search: Search) -> list[Row]:
    """A row for each trial, best first; failed ones and those without an epoch come last and have no rank."""

    def order(row: Row) -> tuple[bool, bool, float, int]:
        return not counts(row), row["state"] == "failed", row["loss"] if counts(row) else 0.0, row["trial"]

    table = sorted((_row(trial, parameters(search), equal_time(search)) for trial in search.trials), key=order)
    return [{**row, "rank": i if counts(row) else None} for i, row in enumerate(table, 1)]


def _row(trial: Trial, names: list[str], time_s: float | None) -> Row:
    best = trial.best or {}
    speeds = [r["images_per_s"] for r in trial.records if r["images_per_s"] is not None]
    in_time = [r["val_loss"] for r in trial.finite if time_s is not None and r["seconds"] <= time_s]
    row = {
        "rank": None,
        "trial": trial.number,
        **{name: trial.setting[name] for name in names},
        "state": trial.state,
        "epochs": trial.epoch,
        "loss": best.get("val_loss"),
        "reconstruction": best.get("val_reconstruction"),
        "kl": best.get("val_kl"),
        "explained": best.get("val_explained"),
        "seconds": trial.seconds,
        "images_per_s": statistics.median(speeds) if speeds else None,
        "loss_at_equal_time": min(in_time, default=None),
        "reason": trial.reason,
    }
    # JSON has no NaN, and neither table needs it.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def counts(row: Row) -> bool:
    """Whether a row takes part in the ranking."""
    return row["loss"] is not None and row["state"] != "failed"


def pareto(rows: list[Row]) -> list[Row]:
    """The rows that no other row beats in seconds or loss without losing in the other; fastest first."""
    front: list[Row] = []
    for row in sorted(filter(counts, rows), key=lambda r: (r["seconds"], r["loss"])):
        equal = front and (row["seconds"], row["loss"]) == (front[-1]["seconds"], front[-1]["loss"])
        if not front or row["loss"] < front[-1]["loss"] or equal:
            front.append(row)
    return front


def best_run(search: Search) -> tuple[Storage, Config]:
    """The run of the best trial, and its configuration; UsageError if no trial has finished an epoch."""
    table = rows(search)
    if not table or not counts(table[0]):
        raise UsageError(f"no trial of {search.storage.uri} has finished an epoch")
    name = next(trial.name for trial in search.trials if trial.number == table[0]["trial"])
    run = search.storage / f"{FOLDER}/{name}"
    text = _read(run, CONFIG, lambda: run.read(CONFIG).decode())
    return run, Config.from_json(text, f"{run.uri}/{CONFIG}")

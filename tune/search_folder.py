"""What a search is, and its two files: search.json, and trials.json with how its trials stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dogvae.config import Config, check
from dogvae.console import UsageError
from dogvae.storage import Storage
from tune.ranking import ABOUT, FORMAT, SCHEDULERS, SEARCHERS, TRIALS, VERSION, Entry
from tune.space import Space

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

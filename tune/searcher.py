"""The settings of each trial: drawn at random beforehand, or suggested by Optuna, which learns from the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from tune.search_folder import Entry
from tune.space import Space
from tune.trial import name_of


def trial_config(number: int, setting: dict[str, Any], known: Mapping[int, Entry]) -> dict[str, Any]:
    """What Ray Tune passes to a trial. A trial of an earlier attempt keeps its folder name."""
    name = known[number].name if number in known else name_of(number, setting)
    return {"number": number, "name": name, "setting": setting}


def random_trials(space: Space, seed: int, trials: int, known: Sequence[Entry]) -> list[dict[str, Any]]:
    """The configs of all trials: settings of a resumed search first, then the ones it would have drawn next."""
    old = {entry.number: entry for entry in known}
    settings = [old[n].setting if n in old else space.setting(seed, n) for n in range(trials)]
    return [trial_config(number, setting, old) for number, setting in enumerate(settings)]


class NumberedOptunaSearch(OptunaSearch):
    """Ray's OptunaSearch with trial numbers that a resumed search keeps.

    The trials of an earlier attempt come first, with their settings and names; trial 0 has the notebook's settings.
    The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011).
    """

    def __init__(self, space: Space, seed: int, trials: int, known: Sequence[Entry]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._known = {entry.number: entry for entry in known}
        first = {entry.number: entry.setting for entry in known}
        first.setdefault(0, space.setting(seed, 0))
        # Optuna suggests the points in this order, then settings of its own.
        self._numbers = [*first, *(number for number in range(trials) if number not in first)]
        super().__init__(
            OptunaSearch.convert_search_space({name: domain.as_tune() for name, domain in space.domains.items()}),
            metric="loss",
            mode="min",
            points_to_evaluate=list(first.values()),
            # Without `constant_liar`, trials that run side by side would get nearly the same settings.
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=5),
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The config of the next trial."""
        setting = super().suggest(trial_id)
        assert setting is not None
        return {"trial": trial_config(self._numbers.pop(0), setting, self._known)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna gets the last loss only: some results have none, and a restarted trial reports its epochs again."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the loss. A trial that failed or has no finite loss is ignored in later suggestions."""
        failed = error or not math.isfinite((result or {}).get("loss", math.inf))
        super().on_trial_complete(trial_id, None if failed else result, failed)

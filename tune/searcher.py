"""Which setting comes next: a list drawn beforehand, or Optuna, which learns from the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from dogvae.errors import UsageError
from tune.search_folder import Entry
from tune.space import Domain, Space
from tune.trial import name_of


def given(number: int, setting: dict[str, Any], known: Mapping[int, Entry]) -> dict[str, Any]:
    """What a trial is given; one of an earlier attempt keeps its name."""
    name = known[number].name if number in known else name_of(number, setting)
    return {"number": number, "name": name, "setting": setting}


def listed(space: Space, seed: int, trials: int, known: Sequence[Entry]) -> list[dict[str, Any]]:
    """What all trials are given: the settings of the earlier attempt, then those that it would have come to."""
    old = {entry.number: entry for entry in known}
    settings = [old[n].setting if n in old else space.setting(seed, n) for n in range(trials)]
    return [given(number, setting, old) for number, setting in enumerate(settings)]


class TreeParzen(Searcher):
    """Settings from Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    Those of an earlier attempt come first, and the very first is the notebook's own. UsageError without Optuna.
    """

    def __init__(self, space: Space, seed: int, known: Sequence[Entry]) -> None:
        super().__init__(metric="loss", mode="min")
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UsageError("--searcher optuna: install it by pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Trials run beside each other: without `constant_liar` it would suggest the same to all of them.
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=5)
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._distributions = {name: _distribution(domain) for name, domain in space.domains.items()}
        self._space, self._seed, self._known = space, seed, {entry.number: entry for entry in known}
        self._asked: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """What the next trial is given."""
        number = len(self._asked)
        if number in self._known:
            self._study.enqueue_trial(self._known[number].setting)
        elif number == 0:
            self._study.enqueue_trial(self._space.setting(self._seed, 0))
        self._asked[trial_id] = self._study.ask(self._distributions)
        return {"given": given(number, dict(self._asked[trial_id].params), self._known)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """How a trial ended."""
        from optuna.trial import TrialState

        loss = math.inf if error else (result or {}).get("loss", math.inf)
        if math.isfinite(loss):
            self._study.tell(self._asked[trial_id], loss)
        else:
            self._study.tell(self._asked[trial_id], state=TrialState.FAIL)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is taken up again from what its trials left."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.kind == "choice":
        return CategoricalDistribution(domain.values)
    low, high = domain.values
    if domain.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=domain.kind == "loguniform")

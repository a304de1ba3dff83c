"""Which setting comes next: the searchers, behind the one door that Ray Tune knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from dogvae.config import Config
from dogvae.console import UsageError
from tune.results import Entry
from tune.space import Space
from tune.trial import name_of


class Settings(Searcher):
    """The settings of an earlier attempt first, then random ones; the very first is the notebook's own.

    Random settings are a function of the seed and the trial's number, so that an attempt taken up again goes on with
    those that the first would have come to.
    """

    def __init__(self, space: Space, seed: int, known: Sequence[Entry]) -> None:
        super().__init__(metric="loss", mode="min")
        self._space, self._seed, self._known = space, seed, list(known)
        self._next = 0
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Its number, name and setting."""
        number = self._next
        self._next += 1
        self._numbers[trial_id] = number
        if number < len(self._known):
            entry = self._known[number]
            setting, name = entry.setting, entry.name
        else:
            setting = self.draw(number)
            name = name_of(number, setting)
        return {"number": number, "name": name, "setting": setting}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune says how a trial ended."""
        loss = (result or {}).get("loss", math.inf)
        self.tell(self._numbers[trial_id], math.inf if error else loss)

    def draw(self, number: int) -> dict[str, Any]:
        """The setting of trial `number`."""
        if number == 0:
            return self._space.first(Config.make(preset="notebook").flat())
        return self._space.setting(self._seed, number)

    def tell(self, number: int, loss: float) -> None:
        """Trial `number` ended with `loss`, infinite if it failed: random settings do not care."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: an attempt is taken up again from what its trials left."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


class TreeParzen(Settings):
    """Settings from Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), which learns from the losses."""

    def __init__(self, space: Space, seed: int, known: Sequence[Entry]) -> None:
        super().__init__(space, seed, known)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Trials run beside each other: without `constant_liar` it would suggest the same to all of them.
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=5)
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._distributions = {name: _distribution(domain) for name, domain in space.domains.items()}
        self._asked: dict[int, Any] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """See Settings; what is known already Optuna is told as its own idea."""
        if self._next < len(self._known):
            self._ask(self._next, self._known[self._next].setting)
        return super().suggest(trial_id)

    def draw(self, number: int) -> dict[str, Any]:
        return self._ask(number, super().draw(0) if number == 0 else {})

    def _ask(self, number: int, fixed: dict[str, Any]) -> dict[str, Any]:
        if fixed:
            self._study.enqueue_trial(fixed)
        self._asked[number] = self._study.ask(self._distributions)
        return dict(self._asked[number].params)

    def tell(self, number: int, loss: float) -> None:
        from optuna.trial import TrialState

        if math.isfinite(loss):
            self._study.tell(self._asked[number], loss)
        else:
            self._study.tell(self._asked[number], state=TrialState.FAIL)


def _distribution(domain: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.kind == "choice":
        return CategoricalDistribution(domain.values)
    low, high = domain.values
    if domain.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=domain.kind == "loguniform")


def searcher(kind: str, space: Space, seed: int, known: Sequence[Entry]) -> Settings:
    """A searcher by its name; UsageError if what it needs is not installed."""
    if kind == "random":
        return Settings(space, seed, known)
    try:
        return TreeParzen(space, seed, known)
    except ModuleNotFoundError as error:
        raise UsageError("--searcher optuna: install it by pip install 'dogvae[optuna]'") from error

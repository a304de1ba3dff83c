"""The schedulers: the rungs of ASHA, and what PBT may mutate and how far."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from dogvae.errors import UsageError
from tests.support.searches import MIXED, PLAN, contains
from tune.schedulers import make_scheduler
from tune.space import Space

START = {"number": 4, "name": "04-a", "setting": MIXED.setting(0, 4)}


@pytest.fixture
def pbt() -> PopulationBasedTraining:
    scheduler = make_scheduler(replace(PLAN, scheduler="pbt", space=MIXED))
    assert isinstance(scheduler, PopulationBasedTraining)
    return scheduler


@pytest.mark.parametrize(("epochs", "first"), [(1, 1), (3, 1), (8, 2), (50, 12)])
def test_asha_keeps_a_third_after_a_quarter_of_the_epochs(epochs: int, first: int) -> None:
    scheduler = make_scheduler(replace(PLAN, config=PLAN.config.replace(epochs=epochs)))
    assert isinstance(scheduler, ASHAScheduler)
    assert (scheduler._time_attr, scheduler._max_t) == ("epochs", epochs)
    rungs = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
    assert (min(rungs), scheduler._reduction_factor) == (first, 3)


def test_no_scheduler_lets_all_trials_end() -> None:
    assert make_scheduler(replace(PLAN, scheduler="none")) is None


def test_pbt_mutates_only_settings_that_keep_the_networks_shape(pbt: PopulationBasedTraining) -> None:
    assert pbt._time_attr == "epochs"
    assert set(pbt._hyperparam_mutations["trial"]["setting"]) == set(MIXED.domains) - {"latent_dim", "likelihood"}
    shapes = Space.parse(["width=choice(16,32)"], {"lr": 0.001, "samples": 1})
    with pytest.raises(UsageError, match=r"^--scheduler pbt: .* network's shape; add .* --search lr="):
        make_scheduler(replace(PLAN, scheduler="pbt", space=shapes))


def test_pbt_stays_within_the_domains_and_reaches_every_value(pbt: PopulationBasedTraining) -> None:
    """400 mutations in a row by Ray's own code, which multiplies by 0.8 or 1.2."""
    random.seed(0)
    np.random.seed(0)
    trial, seen = START, []
    for _ in range(400):
        config, _ = pbt._get_new_config(SimpleNamespace(), SimpleNamespace(config={"trial": trial}))
        assert {key: config["trial"][key] for key in ("number", "name")} == {"number": 4, "name": "04-a"}
        trial = config["trial"]
        seen.append(trial["setting"])
        assert all(contains(MIXED.domains[name], value) for name, value in seen[-1].items()), seen[-1]
        assert set(seen[-1]) == set(MIXED.domains)
    for name, domain in MIXED.domains.items():
        values = {setting[name] for setting in seen}
        if name in ("latent_dim", "likelihood"):
            assert values == {MIXED.setting(0, 4)[name]}
        elif domain.kind == "choice":
            assert values == set(domain.values)
        else:
            assert len(values) > 50

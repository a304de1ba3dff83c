"""The schedulers of a search: ASHA ends bad trials early, population based training (PBT) copies good ones."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from dogvae.config import ModelConfig, fields_of
from dogvae.errors import UsageError
from tune.search_folder import SearchPlan
from tune.space import Space


def make_scheduler(plan: SearchPlan) -> TrialScheduler | None:
    """Ray Tune's scheduler for a plan; None lets every trial end. Raises UsageError if PBT could mutate nothing."""
    epochs = max(1, plan.config.epochs)  # 0 until the dataset is open
    quarter = max(1, epochs // 4)
    if plan.scheduler == "asha":
        # Asynchronous successive halving (Li et al. 2020): of the trials that reach a rung, the best third goes on.
        return ASHAScheduler("epochs", max_t=epochs, grace_period=quarter, reduction_factor=3)
    if plan.scheduler == "pbt":
        return _population_based_training(plan.space, quarter)
    return None


def _population_based_training(space: Space, interval: int) -> PopulationBasedTraining:
    """PBT (Jaderberg et al. 2017) over the settings that leave the network's shape as it is."""
    shape = {name for name, _, _ in fields_of(ModelConfig)}  # a trial can only copy weights of its own shape
    mutable = {name: domain for name, domain in space.domains.items() if name not in shape}
    if not mutable:
        raise UsageError(
            "--scheduler pbt: every searched setting changes the network's shape; add another such as --search lr=..."
        )

    def clip(config: dict[str, Any]) -> dict[str, Any]:
        """Move mutated values back into their domains: PBT multiplies by 0.8 or 1.2."""
        setting = config["trial"]["setting"]
        clipped = setting | {name: mutable[name].nearest(setting[name]) for name in mutable}
        return {"trial": {**config["trial"], "setting": clipped}}

    # From a list, PBT moves to a neighbour; it scales the values of other domains by a factor.
    mutations = {name: list(d.values) if d.kind == "choice" else d.as_tune() for name, d in mutable.items()}
    return PopulationBasedTraining(
        "epochs",
        perturbation_interval=interval,
        hyperparam_mutations={"trial": {"setting": mutations}},
        custom_explore_fn=clip,
    )

"""The search itself: trials side by side under Ray Tune, watched, interrupted and taken up again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from dogvae.config import ModelConfig, fields_of
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training.events import in_background, start_events
from tune.live import View
from tune.search_folder import Entry, Plan, save_trials
from tune.searcher import TreeParzen, listed
from tune.trial import Job, run_trial

SCRATCH = ".tune"  # Tune's own folder; nothing in it is needed again
RETRIES = 2  # of a trial whose process died
# Tune's own loggers would write every number twice; our signals are handled by us; a trial's thread ends after its
# checkpoint is written.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a traceback each; `_Watch` says it in a line
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run(storage: Storage, plan: Plan, known: Sequence[Entry], at_once: int, budget_s: float | None) -> int | None:
    """Run the trials, `at_once` side by side; `known` are those of earlier attempts.

    Returns None when all have ended, a signal that stopped the search, or 0 if its time was up; then the trials that
    ran are saved, and another attempt goes on with them.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hub = start_events()
    job = Job(
        search=storage.uri,
        config=plan.config,
        space=plan.space,
        workers=plan.workers,
        cpus=plan.cpus,
        gpus=plan.gpus,
        ended=frozenset(entry.name for entry in known if entry.state in ("done", "stopped")),
        population=plan.scheduler == "pbt",
        hub=hub,
    )
    view = View(plan.trials, plan.config.epochs, list(plan.space.domains), known)
    optuna = plan.searcher == "optuna"
    settings = {} if optuna else {"given": tune.grid_search(listed(plan.space, plan.seed, plan.trials, known))}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, job=job), _resources(plan)),
        param_space=settings,
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=plan.trials if optuna else 1,
            search_alg=TreeParzen(plan.space, plan.seed, known) if optuna else None,
            scheduler=scheduler_of(plan),
            max_concurrent_trials=at_once,
            reuse_actors=True,  # the next trial starts in the process of the last: imports take longer than epochs
            trial_dirname_creator=lambda trial: trial.config["given"]["name"],
        ),
        run_config=tune.RunConfig(
            name=SCRATCH,
            storage_path=storage.uri,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[_Watch(view, storage, plan)],
            stop=_Stop(view),
            verbose=0,
        ),
    )
    return view.follow(in_background(tuner.fit), hub, budget_s)


def _resources(plan: Plan) -> dict[str, float]:
    """What Tune sets aside for a trial. Workers of Ray Train ask for their own: all CPUs and GPUs are to be theirs."""
    if plan.workers > 1:
        return {"memory": 1.0}  # a byte: nothing at all is refused
    return {"CPU": float(plan.cpus), "GPU": plan.gpus}


def scheduler_of(plan: Plan) -> TrialScheduler | None:
    """The scheduler of a plan; UsageError if it has nothing to do."""
    epochs = plan.config.epochs
    if plan.scheduler == "asha":
        # Successive halving, asynchronously (Li et al. 2020): of the trials that reached a rung, a third goes on.
        return ASHAScheduler("epochs", max_t=epochs, grace_period=max(1, epochs // 4), reduction_factor=3)
    if plan.scheduler == "pbt":
        shape = {name for name, _, _ in fields_of(ModelConfig)}  # weights of another shape cannot be taken over
        mutable = {name: domain for name, domain in plan.space.domains.items() if name not in shape}
        if not mutable:
            raise UsageError("--scheduler pbt: all that is searched shapes the network; add --search lr=...")

        def within(config: dict[str, Any]) -> dict[str, Any]:
            setting = config["given"]["setting"]
            return {
                "given": {**config["given"], "setting": setting | {n: mutable[n].nearest(setting[n]) for n in mutable}}
            }

        # Population based training (Jaderberg et al. 2017). A list is for values that have neighbours, not factors.
        mutations = {name: list(d.values) if d.kind == "choice" else d.as_tune() for name, d in mutable.items()}
        return PopulationBasedTraining(
            "epochs",
            perturbation_interval=max(1, epochs // 4),
            hyperparam_mutations={"given": {"setting": mutations}},
            custom_explore_fn=within,
        )
    return None


class _Watch(tune.Callback):
    """Tells the view what happens, and writes trials.json whenever a trial changes its state."""

    def __init__(self, view: View, storage: Storage, plan: Plan) -> None:
        self._view, self._storage, self._plan = view, storage, plan
        self._numbers: dict[str, int] = {}

    def _entry(self, trial: Any) -> Entry:
        given = trial.config["given"]  # population based training replaces it by that of another trial
        number = self._numbers.setdefault(trial.trial_id, given["number"])
        known = self._view.entries.get(number) or Entry(number, given["name"], {})
        return replace(known, setting=given["setting"])

    def _set(self, entry: Entry, **changes: Any) -> None:
        before = self._view.entries.get(entry.number)
        after = replace(entry, **changes)
        self._view.entries[entry.number] = after
        if after != before:
            save_trials(self._storage, [self._view.entries[n] for n in sorted(self._view.entries)])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        entry = self._entry(trial)
        if entry.state not in ("done", "stopped"):
            self._set(entry, state="running", reason="")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        entry = self._entry(trial)
        if "record" in result:
            self._view.record(entry.number, result["record"])
        if "state" in result:
            self._set(entry, state=result["state"], reason=result.get("reason", ""))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        entry = self._entry(trial)
        if entry.state == "running":
            all_done = self._view.epochs_of(entry.number) >= self._plan.config.epochs
            self._set(entry, state="done" if all_done else "stopped")
        self._view.ended(entry.number)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._entry(trial).number
        self._view.note(f"trial {number} has lost its process or node: it goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = str(trial.get_error() or "its process died").strip().splitlines()
        entry = self._entry(trial)
        self._set(entry, state="failed", reason=lines[-1])
        self._view.ended(entry.number)


class _Stop(tune.Stopper):
    """Ends the search once it is to stop and no trial is at work any more."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._view.stopping and not self._view.at_work()

"""Run a search: trials side by side under Ray Tune, with their states on the console and in trials.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import tune

from dogvae.console import say
from dogvae.storage import Storage
from dogvae.training.events import in_background, start_events
from dogvae.training.run_folder import runs_and_name
from dogvae.training.trackers import Tracking, end_killed
from tune.hparams import write_end
from tune.live import SearchProgress
from tune.schedulers import make_scheduler
from tune.search_folder import FOLDER, Entry, SearchPlan, save_trials
from tune.searcher import NumberedOptunaSearch, random_trials
from tune.trial import SharedByTrials, run_trial

SCRATCH = ".tune"  # Ray Tune's own folder; a resumed search does not read it
ENDS = {"done": "finished", "stopped": "stopped", "failed": "failed"}  # states of trials, in a tracker's words
RETRIES = 2  # of a trial whose process died
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they would write every number a second time
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # SearchProgress handles signals
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # no tracebacks: _ProgressCallback keeps the last line
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial first writes its checkpoint
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run(
    storage: Storage,
    plan: SearchPlan,
    known: Sequence[Entry],
    at_once: int,
    budget_s: float | None,
    tracking: Tracking | None = None,
) -> int | None:
    """Run the trials of `plan`, `at_once` side by side; `known` are the trials of earlier attempts.

    Returns None when all trials have ended, the number of the signal that stopped the search, or 0 after `budget_s`
    seconds. A stopped search has saved its trials, and can be resumed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    tracking = tracking and replace(tracking, group=runs_and_name(storage)[1])
    events = start_events()
    shared = SharedByTrials(
        search=storage.uri,
        config=plan.config,
        space=plan.space,
        workers=plan.workers,
        cpus=plan.cpus,
        gpus=plan.gpus,
        ended=frozenset(entry.name for entry in known if entry.state in ("done", "stopped")),
        population=plan.scheduler == "pbt",
        events=events,
        tracking=tracking,
    )
    progress = SearchProgress(plan.trials, plan.config.epochs, list(plan.space.domains), known)
    optuna = plan.searcher == "optuna"
    listed = {} if optuna else {"trial": tune.grid_search(random_trials(plan.space, plan.seed, plan.trials, known))}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, shared=shared), _resources(plan)),
        param_space=listed,
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=plan.trials if optuna else 1,
            search_alg=NumberedOptunaSearch(plan.space, plan.seed, plan.trials, known) if optuna else None,
            scheduler=make_scheduler(plan),
            max_concurrent_trials=at_once,
            reuse_actors=True,  # the next trial starts in the process of the last: imports take longer than epochs
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=tune.RunConfig(
            name=SCRATCH,
            storage_path=storage.uri,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[_ProgressCallback(progress, storage, plan)],
            stop=_StopWhenIdle(progress),
            progress_reporter=tune.CLIReporter(),  # silent at this verbosity; that for notebooks clears the cell
            verbose=0,
        ),
    )
    stopped = progress.follow(in_background(tuner.fit), events, budget_s)
    for entry in progress.entries.values():
        if tracking and entry.state in ENDS:  # Ray Tune has killed the processes of the last trials
            trial, config = storage / f"{FOLDER}/{entry.name}", plan.config.replace(**entry.setting)
            end_killed(tracking, config, trial, ENDS[entry.state], _say_warning)
    return stopped


def _say_warning(line: str) -> None:
    if line.startswith("--log"):
        say(line)


def _resources(plan: SearchPlan) -> dict[str, float]:
    """What Ray Tune reserves for a trial's own process."""
    if plan.workers > 1:
        # Ray Train reserves CPUs and GPUs for the workers. Tune refuses an empty request: one byte of memory.
        return {"memory": 1.0}
    return {"CPU": float(plan.cpus), "GPU": plan.gpus}


class _ProgressCallback(tune.Callback):
    """Updates the progress, and writes trials.json whenever a trial changes its state."""

    def __init__(self, progress: SearchProgress, storage: Storage, plan: SearchPlan) -> None:
        self._progress, self._storage, self._plan = progress, storage, plan
        self._numbers: dict[str, int] = {}

    def _entry(self, trial: Any) -> Entry:
        config = trial.config["trial"]
        # PBT later replaces the config by one of another trial: the first number stays.
        number = self._numbers.setdefault(trial.trial_id, config["number"])
        known = self._progress.entries.get(number) or Entry(number, config["name"], {})
        return replace(known, setting=config["setting"])

    def _set(self, entry: Entry, **changes: Any) -> None:
        entries = self._progress.entries
        before, after = entries.get(entry.number), replace(entry, **changes)
        entries[entry.number] = after
        if after != before:
            save_trials(self._storage, [entries[number] for number in sorted(entries)])
            if after.state in ENDS:
                write_end(self._storage / f"{FOLDER}/{after.name}", after.state != "failed")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        entry = self._entry(trial)
        if entry.state not in ("done", "stopped"):
            self._set(entry, state="running", reason="")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        entry = self._entry(trial)
        if "record" in result:
            self._progress.record(entry.number, result["record"])
        for line in result.get("warnings", ()):
            self._progress.note(f"trial {entry.number}: {line}")
        if "state" in result:
            self._set(entry, state=result["state"], reason=result.get("reason", ""))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        entry = self._entry(trial)
        if entry.state == "running":
            all_done = self._progress.epochs_of(entry.number) >= self._plan.config.epochs
            self._set(entry, state="done" if all_done else "stopped")
        self._progress.ended(entry.number)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._entry(trial).number
        self._progress.note(f"trial {number} has lost its process or node: it goes on from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = str(trial.get_error() or "its process died").strip().splitlines()
        entry = self._entry(trial)
        self._set(entry, state="failed", reason=lines[-1])
        self._progress.ended(entry.number)


class _StopWhenIdle(tune.Stopper):
    """Ends the search when a stop was requested and no trial is running any more."""

    def __init__(self, progress: SearchProgress) -> None:
        self._progress = progress

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._progress.stopping and not self._progress.any_running()

"""What the trials of a search show: their ranking, Pareto front and best run, and the importance of each parameter.

Losses are negative ELBOs of the validation images in nats per image. Seconds cover training and validation.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from dogvae.config import Config
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training.run_folder import CONFIG
from tune.search_folder import FOLDER, Search, Trial, parameters, read_checked
from tune.space import Domain

MIN_TRIALS = 4  # fewer say nothing about importance

Row = dict[str, Any]


def equal_time(search: Search) -> float | None:
    """Seconds at which trials are compared; None before the first epoch.

    The time of the fastest trial that is done; while none is done, the time that all but the failed have reached.
    """
    done = [t.seconds for t in search.trials if t.records and t.state == "done"]
    return min(done or [t.seconds for t in search.trials if t.records and t.state != "failed"], default=None)


def common_epoch(search: Search) -> int:
    """The last epoch (1, 2, ...) that all trials have reached, without failed and empty ones; 0 if none is left."""
    return min((t.epoch for t in search.trials if t.records and t.state != "failed"), default=0)


def importance(search: Search) -> dict[str, float | None]:
    """The share of the loss variance at the last common epoch that each parameter alone explains: 0 to 1, or None.

    For choices: the correlation ratio eta squared, variance between groups over total variance. For ranges: R squared
    of a parabola in the value, or in its logarithm for loguniform; a parabola, because the best value may lie in the
    middle. Chance explains a part as well. For n trials and k groups or coefficients,
    1 - (1 - share) (n - 1) / (n - k) removes that part. It is epsilon squared (Kelley 1935, PNAS 21, 554) for groups,
    and adjusted R squared for parabolas. Negative results become 0. None with fewer than 4 trials, with no more trials
    than groups, or where nothing varies.
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
        x = (x - x.mean()) / x.std()  # the fit is ill-conditioned with powers of small numbers
        fitted = np.polyval(np.polyfit(x, y, k - 1), x)
    unexplained = np.square(y - fitted).sum() / np.square(y - y.mean()).sum()
    return max(0.0, 1 - float(unexplained) * (len(y) - 1) / (len(y) - k))


def rows(search: Search) -> list[Row]:
    """A row for each trial, best loss first. Trials that failed or have no finite loss come last, without a rank."""

    def order(row: Row) -> tuple[bool, bool, float, int]:
        return not is_ranked(row), row["state"] == "failed", row["loss"] if is_ranked(row) else 0.0, row["trial"]

    table = sorted((_row(trial, parameters(search), equal_time(search)) for trial in search.trials), key=order)
    return [{**row, "rank": i if is_ranked(row) else None} for i, row in enumerate(table, 1)]


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
    # JSON has no NaN.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def is_ranked(row: Row) -> bool:
    """Whether a trial takes part in the ranking: it has a finite loss and has not failed."""
    return row["loss"] is not None and row["state"] != "failed"


def pareto(rows: list[Row]) -> list[Row]:
    """The Pareto front in seconds and loss, fastest first: no other row is at least as good in both, better in one."""
    front: list[Row] = []
    for row in sorted(filter(is_ranked, rows), key=lambda r: (r["seconds"], r["loss"])):
        equal = front and (row["seconds"], row["loss"]) == (front[-1]["seconds"], front[-1]["loss"])
        if not front or row["loss"] < front[-1]["loss"] or equal:
            front.append(row)
    return front


def best_run(search: Search) -> tuple[Storage, Config]:
    """The run of the best trial and its config. Raises UsageError if no trial has finished an epoch."""
    table = rows(search)
    if not table or not is_ranked(table[0]):
        raise UsageError(f"no trial of {search.storage.uri} has finished an epoch")
    name = next(trial.name for trial in search.trials if trial.number == table[0]["trial"])
    run = search.storage / f"{FOLDER}/{name}"
    text = read_checked(run, CONFIG, lambda: run.read(CONFIG).decode())
    return run, Config.from_json(text, f"{run.uri}/{CONFIG}")

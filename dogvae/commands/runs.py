"""`dogvae runs`: the runs and searches of a folder, newest last."""

from __future__ import annotations

import argparse
import json
import time

from dogvae.config import Config
from dogvae.console import clock, say
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.run_folder import CONFIG
from tune.search_folder import ABOUT, TRIALS

TITLES = ("name", "state", "epochs", "loss", "explained", "age")
Row = tuple[str, ...]


def runs(args: argparse.Namespace) -> None:
    """Print a line for each run and each search of `--runs`, ordered by the time of their last epoch."""
    storage = Storage(args.runs)
    names = [name for name in storage.folders() if not name.startswith(".")]
    found = [row for name in names if (row := _row(storage / name, name)) is not None]
    if not found:
        raise UsageError(f"--runs: there are no runs in {storage.uri}")
    lines = [TITLES, *(row for _, row in sorted(found))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        say("  ".join([name.ljust(widths[0]), *numbers]))


def _row(storage: Storage, name: str) -> tuple[float, Row] | None:
    """When a run or a search was last written to, and its line. None if the folder is neither."""
    try:
        if storage.exists(ABOUT):
            trials = json.loads(storage.read(TRIALS))
            done = sum(trial["state"] not in ("running", "waiting") for trial in trials)
            modified = storage.modified(TRIALS)
            return modified, (name, "search", f"{done} of {len(trials)} trials", "-", "-", _age(modified))
        if not storage.exists(CONFIG):
            return None
        records, config = metrics.read(storage), Config.from_json(storage.read(CONFIG).decode(), name)
        best = metrics.best(records) or {}
        modified = storage.modified(metrics.FILE if records else CONFIG)
    except (OSError, KeyError, TypeError, ValueError):  # a UsageError of an old or damaged config is a ValueError
        return 0.0, (name, "damaged", "-", "-", "-", "-")
    state = "done" if len(records) >= config.epochs else "unfinished"
    loss, explained = best.get("val_loss"), best.get("val_explained")
    numbers = ("-" if loss is None else f"{loss:,.0f}", "-" if explained is None else f"{explained:.3f}")
    return modified, (name, state, f"{len(records)} of {config.epochs}", *numbers, _age(modified))


def _age(modified: float) -> str:
    """The time since then: `3 days`, or `1:02:03`."""
    seconds = time.time() - modified
    return clock(seconds) if seconds < 172_800 else f"{seconds / 86_400:.0f} days"

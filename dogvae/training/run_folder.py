"""The folder of a run: its name, its config.json, starting it and resuming it."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

from dogvae.config import Config
from dogvae.data.find import DataChoice
from dogvae.errors import UsageError, did_you_mean
from dogvae.storage import Storage, did_you_mean_folder, is_uri
from dogvae.training import metrics

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
TIME = len("YYYYMMDD-HHMMSS")  # at the end of a default name


def default_name(data: str) -> str:
    """A name made of the name of the data and the time: `dogs-20260131-142501`."""
    data = data.partition("?")[0] if is_uri(data) else data  # without options, which may hold keys
    stem = re.sub(r"[^\w.-]+", "-", data.rstrip("/").rsplit("/", 1)[-1].split(".")[0]).strip("-.") or "run"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_name(name: str) -> str:
    """Return `name`; UsageError if a folder cannot have it."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"--name: {name!r} must consist of letters, digits, '-', '_' and '.', and start with a letter or digit"
        )
    return name


def runs_and_name(run: Storage) -> tuple[str, str]:
    """The folder of runs that holds `run`, a path or a URI, and the name of `run`: `--runs` and `--name`."""
    place, mark, options = run.uri.partition("?")  # options of an object store, as pyarrow takes them
    runs, _, name = place.rpartition("/")
    return runs + mark + options, name


def exists(runs: str, name: str) -> bool:
    """Whether there is a folder of this name in `runs`."""
    return (Storage(runs) / check_name(name)).exists("")


def open_new(runs: str, name: str) -> Storage:
    """The storage of a new run; UsageError with the command that resumes it if it exists."""
    storage = Storage(runs) / check_name(name)
    if storage.local:
        there = next(parent for parent in storage.local.parents if parent.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UsageError(f"--runs: {there} is not a folder that you may write to; choose another one")
    if storage.exists(CONFIG):
        raise UsageError(f"--name: {storage.uri} exists; resume it with --name {name} --resume, or choose another name")
    if storage.exists(""):
        raise UsageError(f"--name: {storage.uri} exists and is not a run; choose another name")
    return storage


def newest(runs: str, data: str, ending: str = "", file: str = CONFIG) -> str:
    """The name of the newest run (or search) of these data that was begun without --name. UsageError if there is none.

    `ending` follows the time in its name, and its folder has the file `file`.
    """
    name = re.compile(re.escape(default_name(data)[:-TIME]) + r"\d{8}-\d{6}" + re.escape(ending))
    storage = Storage(runs)
    found = [folder for folder in storage.folders() if name.fullmatch(folder) and storage.exists(f"{folder}/{file}")]
    if not found:
        raise UsageError("--resume: give the name of the run with --name; none was begun here without one")
    return max(found)


def open_old(
    runs: str, name: str, settings: dict[str, Any], data: str | None, crop: str | None = None, val: float | None = None
) -> tuple[Storage, Config]:
    """The storage and the config of a run to resume; `val` is --val-fraction.

    Only `epochs`, and the path of the same data, may change. A UsageError names any other setting that differs.
    """
    storage = Storage(runs) / check_name(name)
    try:
        config = Config.from_json(storage.read(CONFIG).decode(), f"{storage.uri}/{CONFIG}")
    except FileNotFoundError as error:
        names = [folder for folder in Storage(runs).folders() if not folder.startswith(".")]
        close = did_you_mean(name, names)
        raise UsageError(f"--resume: there is no run {storage.uri}; to start it, add --data{close}") from error
    # 0 had the run choose: it keeps what it chose.
    settings = {k: v for k, v in settings.items() if v != 0 or k not in ("epochs", "batch_size")}
    check_kept(config, settings)
    if data is not None or crop is not None or val is not None:
        choice = DataChoice(data or config.data, None, crop, val)
        settings = {**settings, "data": choice.resumed(config.data, config.fingerprint)}
    return storage, config.replace(**settings)


def open_run(run: str) -> tuple[Storage, Config]:
    """The storage and the config of a run, a path or a URI; UsageError if `run` is not a run."""
    storage = Storage(run)
    try:
        return storage, Config.from_json(storage.read(CONFIG).decode(errors="replace"), f"{run}/{CONFIG}")
    except OSError as error:
        raise UsageError(f"{run} is not a run: it has no {CONFIG}{did_you_mean_folder(run)}") from error


def check_kept(config: Config, settings: dict[str, Any]) -> None:
    """UsageError for a setting that differs from that of the run to resume."""
    if settings.get("epochs") == 0:
        raise UsageError(
            "--epochs: a run that goes on needs a number above 0; leave the flag out to keep that of the run"
        )
    known = config.flat()
    for setting, value in settings.items():
        if setting != "epochs" and value != known[setting]:
            flag = "--" + setting.replace("_", "-")
            raise UsageError(f"{flag}: this run has {known[setting]}, not {value}; a resumed run keeps its settings")


def check_copy(source: Storage, config: Config, settings: dict[str, Any]) -> Config:
    """The config of a new run that continues `source`: only `epochs` may differ, and must exceed those done."""
    check_kept(config, settings)
    done, epochs = len(metrics.read(source)), settings.get("epochs", config.epochs)
    if epochs <= done:
        raise UsageError(f"--epochs: {source.uri} has done {done} epochs already; {epochs} is not more")
    return config.replace(**settings)


def copy_checkpoints(source: Storage, storage: Storage) -> None:
    """Copy the checkpoints of one run to another."""
    for name in source.names(CHECKPOINTS):
        storage.write(f"{CHECKPOINTS}/{name}", source.read(f"{CHECKPOINTS}/{name}"))


def is_finished(storage: Storage, config: Config) -> bool:
    """Whether the run has done all its epochs and has the checkpoint of the last one."""
    records = metrics.read(storage)
    return bool(records) and records[-1]["epoch"] + 1 >= config.epochs and is_saved(storage, records)


def is_saved(storage: Storage, records: list[dict[str, Any]]) -> bool:
    """Whether there is a checkpoint of the last of these epochs, or of a later step."""
    steps = [int(name.split("-")[1]) for name in storage.names(CHECKPOINTS) if name.startswith("step-")]
    return bool(records) and max(steps, default=-1) >= records[-1]["step"]


def save_config(storage: Storage, config: Config) -> None:
    """Write config.json."""
    storage.write(CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())

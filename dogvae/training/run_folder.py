"""The folder of a run: naming it, starting it, and taking it up again."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

from dogvae.config import Config
from dogvae.data.manifest import read_manifest
from dogvae.errors import UsageError
from dogvae.storage import Storage, is_uri
from dogvae.training import metrics

if TYPE_CHECKING:
    pass
from dogvae.data.find import absolute

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def default_name(data: str) -> str:
    """A name from what the data is called and the time: `dogs-20260131-142501`."""
    data = data.partition("?")[0] if is_uri(data) else data  # without options, maybe keys
    stem = re.sub(r"[^\w.-]+", "-", data.rstrip("/").rsplit("/", 1)[-1].split(".")[0]).strip("-.") or "run"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_name(name: str) -> str:
    """The name, if a folder can be called so; else UsageError."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(
            f"--name: {name!r} must consist of letters, digits, '-', '_' and '.', and start with a letter or digit"
        )
    return name


def open_new(runs: str, name: str) -> Storage:
    """The storage of a run that does not exist yet; UsageError with the command to type if it does."""
    storage = Storage(runs) / check_name(name)
    if storage.exists(CONFIG):
        raise UsageError(
            f"--name: {storage.uri} exists; go on with it by --name {name} --resume, or choose another name"
        )
    if storage.exists(""):
        raise UsageError(f"--name: {storage.uri} exists and is not a run; choose another name")
    return storage


def open_old(runs: str, name: str | None, settings: dict[str, Any], data: str | None) -> tuple[Storage, Config]:
    """The storage and the config of a run to resume.

    Of all settings only `epochs` may change, and the path of the same data; UsageError names any other that differs.
    """
    if name is None:
        raise UsageError("--resume: say which run, with --name")
    storage = Storage(runs) / check_name(name)
    try:
        config = Config.from_json(storage.read(CONFIG).decode(), f"{storage.uri}/{CONFIG}")
    except FileNotFoundError as error:
        raise UsageError(f"--resume: there is no run {storage.uri}; leave --resume out to start it") from error
    _check_kept(config, settings)
    if data is not None:
        settings = {**settings, "data": absolute(data)}
        read_manifest(data, config.fingerprint)
    return storage, config.replace(**settings)


def _check_kept(config: Config, settings: dict[str, Any]) -> None:
    """UsageError for a setting that a run which goes on cannot have otherwise than before."""
    known = config.flat()
    for setting, value in settings.items():
        if setting != "epochs" and value != known[setting]:
            flag = "--" + setting.replace("_", "-")
            raise UsageError(f"{flag}: this run has {known[setting]}, not {value}; a resumed run keeps its settings")


def check_copy(source: Storage, config: Config, settings: dict[str, Any]) -> Config:
    """The config of a new run that is to go on where `source` is; only `epochs` may differ, and must be more."""
    _check_kept(config, settings)
    done, epochs = len(metrics.read(source)), settings.get("epochs", config.epochs)
    if epochs <= done:
        raise UsageError(f"--epochs: {source.uri} has done {done} epochs already, and {epochs} are no more")
    return config.replace(**settings)


def copy_checkpoints(source: Storage, storage: Storage) -> None:
    """Give a new run the state of another."""
    for name in source.names(CHECKPOINTS):
        storage.write(f"{CHECKPOINTS}/{name}", source.read(f"{CHECKPOINTS}/{name}"))


def is_finished(storage: Storage, config: Config) -> bool:
    """Whether the run has done all its epochs, and has the checkpoint of the last one."""
    records = metrics.read(storage)
    return bool(records) and records[-1]["epoch"] + 1 >= config.epochs and is_saved(storage, records)


def is_saved(storage: Storage, records: list[dict[str, Any]]) -> bool:
    """Whether there is a checkpoint that knows all these epochs."""
    steps = [int(name.split("-")[1]) for name in storage.names(CHECKPOINTS) if name.startswith("step-")]
    return bool(records) and max(steps, default=-1) >= records[-1]["step"]


def save_config(storage: Storage, config: Config) -> None:
    """Write config.json."""
    storage.write(CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())

"""One trial of a search: the same training loop as everywhere, told to Ray Tune epoch by epoch.

A trial is a run, with a folder, checkpoints and metrics of its own. Whoever takes the search up again starts every
trial again: one that has ended only tells its epochs once more, any other goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dogvae.cluster.nodes import Workers
from dogvae.config import Config, Safety
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.on_ray import start
from dogvae.training.run_folder import CHECKPOINTS, save_config
from tune.hparams import hparams
from tune.search_folder import FOLDER
from tune.space import Space, label

POLL_S = 0.5  # between two questions whether the search is to stop
WRITER = "writer.json"  # in Tune's checkpoints, which population based training wants: whose it is


def name_of(number: int, setting: Mapping[str, Any]) -> str:
    """What a trial's folder is called, and TensorBoard's run: `03-latent_dim16-lr0.0021-samples3`."""
    return f"{number:02d}-{label(setting)}"


@dataclass(frozen=True)
class Job:
    """What all trials of a search share."""

    search: str
    """Where the search is stored."""
    config: Config
    """What the settings of a trial are put into."""
    space: Space
    workers: int
    cpus: int
    gpus: float
    """Of each worker."""
    ended: frozenset[str]
    """The names of the trials of an earlier attempt that need no more training."""
    population: bool
    """Whether trials take over each other's state."""
    hub: Any


class _TuneObserver(Observer):
    """Tells Tune each epoch, and ends the training when Tune, or the user, has had enough."""

    wants_saved = True

    def __init__(self, hub: Any, writer: str | None) -> None:
        self._hub, self._writer = hub, writer
        self._asked, self._wanted = time.monotonic(), False

    def epoch(self, record: dict[str, Any]) -> None:
        report(record, self._writer)

    def stopping(self) -> bool:
        now = time.monotonic()
        if now - self._asked >= POLL_S:
            self._asked, self._wanted = now, wants_to_stop(self._hub)
        return self._wanted


def wants_to_stop(hub: Any) -> bool:
    """Whether the search is to be interrupted."""
    import ray

    return ray.get(hub.stopping.remote())


def report(record: Mapping[str, Any], writer: str | None = None) -> None:
    """Tell Tune an epoch, and wait for its word; SystemExit if that is to end. With `writer`, a checkpoint is his."""
    from ray import tune

    loss = record["val_loss"]
    told = {"epochs": record["epoch"] + 1, "record": dict(record)}
    told["loss"] = loss if loss is not None and math.isfinite(loss) else math.inf
    if writer is None:
        tune.report(told)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / WRITER).write_text(json.dumps(writer))
        tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))


def run_trial(config: dict[str, Any], job: Job) -> None:
    """What Tune calls for every trial: `config` has its setting, and Tune's own folder its name."""
    from ray import tune

    name, setting = Path(tune.get_context().get_trial_dir()).name, config["given"]["setting"]
    storage = Storage(job.search) / FOLDER / name
    torch.set_num_threads(max(1, job.cpus))
    for record in metrics.read(storage):
        report(record)
    if name in job.ended:
        return
    if wants_to_stop(job.hub):
        tune.report({"state": "waiting"})
        return
    ours = job.config.replace(**setting)
    observer = _TuneObserver(job.hub, name if job.population else None)
    try:
        if job.population:
            _take_over(job, name, storage, ours)
        save_config(storage, ours)
        hparams(storage, name, setting, job.space)
        train = _distributed if job.workers > 1 else _alone
        done = train(job, ours, storage, observer)
    except (UsageError, RunFailed) as error:
        tune.report({"state": "failed", "reason": str(error).splitlines()[0]})
        return
    if not done:
        tune.report({"state": "waiting"})


def _alone(job: Job, config: Config, storage: Storage, observer: _TuneObserver) -> bool:
    return loop(config, storage, torch.device("cuda" if job.gpus else "cpu"), observer)


def _distributed(job: Job, config: Config, storage: Storage, observer: _TuneObserver) -> bool:
    """Ray Train within the trial: what its workers tell goes to Tune."""
    import ray

    workers = Workers(job.workers, gpu=bool(job.gpus), cpus=job.cpus)
    hub, fit = start(config, storage, workers, Safety(), verbose=False, wants_saved=True)
    asked, failure = False, ""
    while True:
        ended = fit.done()
        try:
            for kind, *payload in ray.get(hub.take.remote()):
                if kind == "epoch":
                    observer.epoch(*payload)
                elif kind == "failed":
                    (failure,) = payload
        except SystemExit:  # Tune has had enough: the workers are to leave their CPUs to the next trial
            hub.stop.remote()
            fit.result()
            raise
        if ended:
            break
        if observer.stopping() and not asked:
            asked = True
            hub.stop.remote()
        time.sleep(0.1)
    if failure:
        raise RunFailed(failure)
    how, message = fit.result()
    if how in ("mistake", "failed"):
        raise RunFailed(message)
    return how == "done"


def _take_over(job: Job, name: str, storage: Storage, config: Config) -> None:
    """Go on from the state that Tune says, maybe another trial's: its weights and its past, with our own setting."""
    from ray import tune

    writer = name
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            writer = json.loads((Path(folder) / WRITER).read_text())
    saved = Checkpoints(Storage(job.search) / FOLDER / writer).latest()
    if saved is None or (writer == name and saved.meta["config"] == config.to_dict()):
        return
    for old in storage.names(CHECKPOINTS):
        storage.delete(f"{CHECKPOINTS}/{old}")
    ours = Checkpoints(storage)
    ours.save(saved.tensors, {**saved.meta, "config": config.to_dict()})
    ours.wait()

"""One trial of a search: the usual training loop, with every epoch reported to Ray Tune.

A trial is a run with its own folder, checkpoints and metrics. A resumed search starts every trial again: an ended trial
only reports its epochs once more, any other goes on from its checkpoint.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dogvae.cluster.nodes import Workers
from dogvae.config import Config, Safety
from dogvae.data import dataset
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.on_ray import start
from dogvae.training.run_folder import CHECKPOINTS, runs_and_name, save_config
from dogvae.training.trackers import Tracking
from tune.hparams import write_hparams
from tune.search_folder import FOLDER
from tune.space import Space, label

POLL_S = 0.5  # how often a trial asks whether the search is stopping
WRITER = "writer.json"  # the only file in Ray Tune's checkpoints, which PBT needs: the trial that wrote it


def name_of(number: int, setting: Mapping[str, Any]) -> str:
    """The name of a trial's folder and of its run in TensorBoard: `03-latent_dim16-lr0.0021-samples3`."""
    return f"{number:02d}-{label(setting)}"


@dataclass(frozen=True)
class SharedByTrials:
    """What all trials of a search have in common."""

    search: str
    """The path or URI of the search."""
    config: Config
    """The config of every trial, before its own settings are put in."""
    space: Space
    workers: int
    cpus: int
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    ended: frozenset[str]
    """The names of the trials of an earlier attempt that need no more training."""
    population: bool
    """Whether the scheduler is PBT: trials copy each other's weights."""
    events: Any
    """The actor that knows whether the search is stopping."""
    tracking: Tracking | None = None
    """Trackers that get the trials."""


class _TuneObserver(Observer):
    """Reports each epoch to Ray Tune, and stops the training when Tune or the user asks for it."""

    wants_saved = True

    def __init__(self, events: Any, writer: str | None) -> None:
        self._events, self._writer = events, writer
        self._asked, self._stopping = time.monotonic(), False
        self._warnings: list[str] = []

    def epoch(self, record: dict[str, Any]) -> None:
        warnings, self._warnings = self._warnings, []
        report(record, self._writer, warnings)

    def note(self, line: str) -> None:
        if line.startswith("--log"):  # the console of a search has no room for more
            self._warnings.append(line)

    def stopping(self) -> bool:
        now = time.monotonic()
        if now - self._asked >= POLL_S:
            self._asked, self._stopping = now, is_stopping(self._events)
        return self._stopping


def is_stopping(events: Any) -> bool:
    """Whether the user has interrupted the search, or its time is up."""
    import ray

    return ray.get(events.stopping.remote())


def report(record: Mapping[str, Any], writer: str | None = None, warnings: Sequence[str] = ()) -> None:
    """Report an epoch to Ray Tune; raises SystemExit if Tune ends the trial.

    With `writer`, attach a checkpoint that names it. `warnings` are lines for the user.
    """
    from ray import tune

    loss = record["val_loss"]
    numbers = {"epochs": record["epoch"] + 1, "record": dict(record)}
    numbers |= {"warnings": list(warnings)} if warnings else {}
    numbers["loss"] = loss if loss is not None and math.isfinite(loss) else math.inf
    if writer is None:
        tune.report(numbers)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / WRITER).write_text(json.dumps(writer))
        tune.report(numbers, checkpoint=tune.Checkpoint.from_directory(folder))


def run_trial(config: dict[str, Any], shared: SharedByTrials) -> None:
    """The trainable: Ray Tune calls it for every trial. A failed trial reports its reason instead of raising."""
    from ray import tune

    # The name is that of Tune's folder: PBT replaces the config by one of another trial.
    name, setting = Path(tune.get_context().get_trial_dir()).name, config["trial"]["setting"]
    storage = Storage(shared.search) / FOLDER / name
    torch.set_num_threads(max(1, shared.cpus))
    if shared.workers == 1 and shared.gpus:
        torch.cuda.set_device(0)  # the only one that this process sees
        dataset.gpu_share = min(1.0, shared.gpus)
    for record in metrics.read(storage):
        report(record)
    if name in shared.ended:
        return
    if is_stopping(shared.events):
        tune.report({"state": "waiting"})
        return
    own_config = shared.config.replace(**setting)
    observer = _TuneObserver(shared.events, name if shared.population else None)
    try:
        if shared.population:
            _load_population_checkpoint(shared, name, storage, own_config)
        save_config(storage, own_config)
        search = runs_and_name(Storage(shared.search))[1]
        write_hparams(storage, f"{search} {name.partition('-')[0]}", setting, shared.space)
        train = _train_on_workers if shared.workers > 1 else _train_here
        done = train(shared, own_config, storage, observer)
    except (UsageError, RunFailed) as error:
        tune.report({"state": "failed", "reason": str(error).splitlines()[0]})
        return
    finally:
        if torch.cuda.is_initialized():  # the trials beside this one need what torch keeps for the next
            gc.collect()
            torch.cuda.empty_cache()
    if not done:
        tune.report({"state": "waiting"})


def _train_here(shared: SharedByTrials, config: Config, storage: Storage, observer: _TuneObserver) -> bool:
    device = torch.device("cuda" if shared.gpus else "cpu")
    return loop(config, storage, device, observer, tracking=shared.tracking)


def _train_on_workers(shared: SharedByTrials, config: Config, storage: Storage, observer: _TuneObserver) -> bool:
    """Train with Ray Train, and pass the epochs of its workers on to Ray Tune. Returns whether all epochs are done."""
    import ray

    workers = Workers(shared.workers, gpu=bool(shared.gpus), cpus=shared.cpus)
    events, fit = start(config, storage, workers, Safety(), False, wants_saved=True, tracking=shared.tracking)
    stop_sent, failure = False, ""
    while True:
        ended = fit.done()
        try:
            for kind, *payload in ray.get(events.take.remote()):
                if kind == "epoch":
                    observer.epoch(*payload)
                elif kind == "note":
                    observer.note(*payload)
                elif kind == "failed":
                    (failure,) = payload
        except SystemExit:  # Tune ends the trial: wait until its workers have freed their CPUs
            events.stop.remote()
            fit.result()
            raise
        if ended:
            break
        if observer.stopping() and not stop_sent:
            stop_sent = True
            events.stop.remote()
        time.sleep(0.1)
    if failure:
        raise RunFailed(failure)
    how, message = fit.result()
    if how in ("mistake", "failed"):
        raise RunFailed(message)
    return how == "done"


def _load_population_checkpoint(shared: SharedByTrials, name: str, storage: Storage, config: Config) -> None:
    """Make the checkpoint that PBT chose, maybe another trial's, this trial's only one, with this trial's config."""
    from ray import tune

    writer = name
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            writer = json.loads((Path(folder) / WRITER).read_text())
    saved = Checkpoints(Storage(shared.search) / FOLDER / writer).latest()
    if saved is None or (writer == name and Config.make_nested(saved.meta["config"]) == config):
        return
    for old in storage.names(CHECKPOINTS):
        storage.delete(f"{CHECKPOINTS}/{old}")
    checkpoints = Checkpoints(storage)
    checkpoints.save(saved.tensors, {**saved.meta, "config": config.to_dict()})
    checkpoints.wait()

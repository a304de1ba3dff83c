"""Training by Ray Train, from the command's side: starting it, its progress on the console, its failures, stopping it.

What the workers run is in worker.py.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from importlib import import_module
from threading import Thread
from typing import Any

from dogvae.cluster import nodes
from dogvae.cluster.network import worker_environment
from dogvae.cluster.nodes import Workers
from dogvae.config import Config, Safety
from dogvae.console import Progress, clock
from dogvae.errors import RunFailed, UsageError
from dogvae.signals import stop_signals
from dogvae.storage import Storage
from dogvae.training import fast_start, metrics
from dogvae.training.events import in_background, start_events
from dogvae.training.run_folder import runs_and_name
from dogvae.training.trackers import Tracking

NODES_INTERVAL_S = 5.0  # without a word from the workers, until it is looked whether they have nodes
RESIZE_INTERVAL_S = 10.0  # how often an elastic run looks for more workers
# How soon Ray Train notices. Its defaults are for jobs of hours: 2 s for a death, 5 s for a node that will go.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
# After the loss of a node an elastic run first asks for as many workers as before, and waits so long in vain (60 s).
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def _work(settings: dict[str, Any]) -> tuple[str, str]:
    from dogvae.training.worker import work

    return work(settings)


def launch(
    config: Config, storage: Storage, workers: Workers, safety: Safety, verbose: bool, tracking: Tracking | None = None
) -> int | None:
    """Train to the last epoch and show progress.

    Returns None when it is done, or the signal (SIGINT, SIGTERM) that stopped it after a checkpoint. Raises UsageError
    and RunFailed as the workers do, RunFailed if lost nodes are not back after `safety.node_patience_s`, and Ray's
    TrainingFailedError when more than `safety.max_failures` workers were lost.
    """
    title = "prior" if config.flow else "training"
    with stop_signals() as received, Progress(title, plain_interval_s=60) as line:
        line.update(0, config.epochs, "starting the workers")
        events, fit = start(config, storage, workers, safety, verbose, tracking=tracking)
        _watch(events, fit, received, line, config, workers, safety)
    how, message = fit.result()
    if how == "mistake":
        raise UsageError(message)
    if how == "failed":
        raise RunFailed(message)
    return received[0] if how == "stopped" else None


def start(
    config: Config,
    storage: Storage,
    workers: Workers,
    safety: Safety,
    verbose: bool,
    wants_saved: bool = False,
    tracking: Tracking | None = None,
) -> tuple[Any, Future[tuple[str, str]]]:
    """Begin training in the background. Returns the events' actor, and a future of what `worker.work` returns.

    With `wants_saved`, an epoch's checkpoint is on the storage before the epoch is told.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(START_TIMEOUT, "10" if isinstance(workers.count, tuple) else "30")
    one_machine = nodes.is_one_machine()
    if one_machine:  # no node can leave while others go on
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    early = fast_start.start_workers(workers) if one_machine else None

    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from dogvae.training.process_group import LostWorkers, ProcessGroup

    events = start_events()  # only now, as its process would hold up theirs
    runs, name = runs_and_name(storage)
    # At run time these are Train V2's classes, which keep what the workers return; type checkers see V1's.
    trainer_class: Any = fast_start.trainer_class(early) if one_machine else TorchTrainer
    trainer = trainer_class(
        _work,
        train_loop_config={
            "config": config, "run": storage.uri, "events": events, "threads": workers.cpus, "safety": safety,
            "wants_saved": wants_saved, "nodes_may_go": not one_machine, "tracking": tracking,
        },
        torch_config=ProcessGroup(),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=workers.count,  # type: ignore[arg-type]
            use_gpu=workers.gpu,
            resources_per_worker=workers.resources,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=runs,
            failure_config=FailureConfig(max_failures=safety.max_failures),
            callbacks=[LostWorkers(events)],  # type: ignore[list-item]
            # `LostWorkers` prints one line for what Ray Train would log; the full log is in Ray's session folder.
            logging_config=LoggingConfig(log_level="INFO" if verbose else "CRITICAL"),
            worker_runtime_env={"env_vars": worker_environment()},
        ),
    )  # fmt: skip
    return events, in_background(lambda: trainer.fit().return_value)


def _watch(
    events: Any, fit: Future[Any], received: list[int], line: Progress, config: Config, workers: Workers, safety: Safety
) -> None:
    """Show what the workers tell until the trainer has ended and everything is shown; pass a signal on to them."""
    import ray

    last, stopping, failure = "", False, ""
    began = heard = looked = time.monotonic()
    lacking: float | None = None  # since when there are too few nodes
    # The end of a run needs torch here: it is imported while the last epoch is trained.
    importing = Thread(target=import_module, args=("dogvae.training.export",))
    while True:
        if received and not stopping:
            stopping = True
            events.stop.remote()
            line.note("stopping after a checkpoint; Ctrl-C again stops at once")
        ended = fit.done()
        now = time.monotonic()
        for kind, *payload in ray.get(events.take.remote()):
            if heard == began:  # the time left is that of training
                line.restart()
            heard = now
            if kind == "progress":
                epoch, step, steps = payload
                if epoch == config.epochs - 1 and not importing.ident:
                    importing.start()
                line.update(epoch + step / steps, config.epochs, f"epoch {epoch + 1}/{config.epochs} {last}".rstrip())
            elif kind == "epoch":
                (record,) = payload
                last = f"{metrics.describe(record)}, {record['images_per_s']:.0f} images/s"
                done = record["epoch"] + 1
                line.update(done, config.epochs, f"epoch {done}/{config.epochs} {last}", milestone=True)
            elif kind == "note":
                line.note(*payload)
            elif kind == "failed":
                (failure,) = payload  # the next attempt returns at once
            elif not failure:
                (failures,) = payload
                lost = "; ".join(f"worker {rank}: {message}" for rank, message in failures.items())
                line.note(f"{lost}. Going on from the last checkpoint (--max-failures {safety.max_failures})")
        if ended and failure:
            raise RunFailed(failure)
        if ended:
            return
        if min(now - heard, now - looked) > NODES_INTERVAL_S:
            looked, lack = now, nodes.missing(workers)
            if not lack:
                lacking = None
            elif lacking is None:
                lacking = now
                line.note(f"{lack}: waiting at most {clock(safety.node_patience_s)} for nodes")
            elif now - lacking > safety.node_patience_s:
                raise RunFailed(
                    f"{lack} after {clock(now - lacking)} (--node-patience); nothing is lost: --resume goes on"
                )
        time.sleep(0.2)

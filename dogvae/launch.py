"""The only file that talks to Ray Train: the trainer, its progress on the console, stopping it, and its failures."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from typing import Any

import torch

from dogvae import cluster
from dogvae.cluster import Workers
from dogvae.config import Config, Safety
from dogvae.console import Progress, RunFailed, UsageError, clock, stop_signals
from dogvae.hub import in_background, make_hub
from dogvae.step import keep_freed_memory
from dogvae.storage import Storage
from dogvae.train import Observer, loop

PROGRESS_INTERVAL_S = 0.3
STOP_INTERVAL_S = 0.5
GROUP_TIMEOUT_S = 300  # a worker that answers no more for so long is lost; a death is noticed at once
NODES_INTERVAL_S = 5.0  # without a word from the workers, until it is looked whether they have nodes
RESIZE_INTERVAL_S = 10.0  # how often an elastic run looks for more workers
# How soon Ray Train notices. Its defaults are for jobs of hours: 2 s for a death, 5 s for a node that will go.
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # patched, a worker's line comes out twice
}
# After the loss of a node an elastic run first asks for as many workers as before, and waits so long in vain (60 s).
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class _RayObserver(Observer):
    """Talks to the hub, without ever waiting for it."""

    def __init__(self, hub: Any, rank: int, wants_saved: bool) -> None:
        self._hub, self._rank, self.wants_saved = hub, rank, wants_saved
        self._told = self._asked = 0.0
        self._answer: Any = None
        self._stopping = False

    def progress(self, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_INTERVAL_S:
            self._told = now
            self._hub.tell.remote("progress", epoch, step, steps)

    def epoch(self, record: dict[str, Any]) -> None:
        if self._rank == 0:
            self._hub.tell.remote("epoch", record)

    def note(self, line: str) -> None:
        self._hub.tell.remote("note", line)

    def stopping(self) -> bool:
        import ray

        now = time.monotonic()
        if self._rank == 0 and self._answer is None and now - self._asked >= STOP_INTERVAL_S:
            self._asked, self._answer = now, self._hub.stopping.remote()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stopping, self._answer = ray.get(self._answer), None
        return self._stopping

    def preempted(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None


def _worker(settings: dict[str, Any]) -> tuple[str, str]:
    """What every Ray Train worker runs. Returns how it ended: an error that is returned, not raised, is not retried."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(settings["threads"])
    observer = _RayObserver(settings["hub"], ray.train.get_context().get_world_rank(), settings["wants_saved"])
    device = ray.train.torch.get_device()
    try:
        done = loop(settings["config"], Storage(settings["run"]), device, observer, settings["safety"])
    except UsageError as error:
        return "mistake", str(error)
    except RunFailed as error:
        return "failed", str(error)
    return ("done" if done else "stopped"), ""


def _prepare(network: dict[str, str], gpu: bool) -> None:
    """Runs in each worker's process before its training thread is started."""
    cluster.choose_interface(network)
    if not gpu:
        keep_freed_memory()


def launch(config: Config, storage: Storage, workers: Workers, safety: Safety, verbose: bool) -> int | None:
    """Train to the last epoch and show progress.

    Returns None when it is done, or the signal (SIGINT, SIGTERM) that stopped it after a checkpoint. Raises UsageError
    and RunFailed as the workers do, RunFailed if lost nodes are not back after `safety.node_patience_s`, and Ray's
    TrainingFailedError when more than `safety.max_failures` workers were lost.
    """
    hub = make_hub()
    with stop_signals() as received, Progress("training", plain_interval_s=60) as line:
        fit = start(config, storage, workers, safety, verbose, hub)
        _watch(hub, fit, received, line, config, workers, safety)
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
    hub: Any,
    wants_saved: bool = False,
) -> Future[tuple[str, str]]:
    """Begin training in the background. `hub` is told what happens; the result is how it ended: see `_worker`.

    With `wants_saved` an epoch is on the storage before it is told.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(START_TIMEOUT, "10" if isinstance(workers.count, tuple) else "30")
    if cluster.is_one_machine():
        # No node will go and leave others behind: one process less to start, before training and after each failure.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            hub.tell.remote("failure", {rank: _first_line(e) for rank, e in worker_exceptions.items()})

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_prepare, network, workers.gpu)
            super().on_start(worker_group, backend_config)

    network = cluster.network_settings()

    class Torch(TorchConfig):
        backend_cls = Backend

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # We have no Ray datasets. Their manager is one more process that every start and every recovery waits for.
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            return [c for c in callbacks if type(c).__name__ != "DatasetsCallback"]

    place, mark, options = storage.uri.partition("?")  # options of an object store, as pyarrow takes them
    head, _, name = place.rpartition("/")
    # At run time these are Train V2's classes, which keep what the workers return; type checkers see V1's.
    trainer = Trainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={
            "config": config, "run": storage.uri, "hub": hub, "threads": workers.cpus, "safety": safety,
            "wants_saved": wants_saved,
        },
        torch_config=Torch(timeout_s=GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=workers.count,  # type: ignore[arg-type]
            use_gpu=workers.gpu,
            resources_per_worker=workers.resources,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=head + mark + options,
            failure_config=FailureConfig(max_failures=safety.max_failures),
            callbacks=[Failures()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
    )  # fmt: skip
    fit: Any = trainer.fit
    return in_background(lambda: fit().return_value)


def _watch(
    hub: Any, fit: Future[Any], received: list[int], line: Progress, config: Config, workers: Workers, safety: Safety
) -> None:
    """Show what the workers tell until the trainer has ended and everything is shown; pass a signal on to them."""
    import ray

    last, stopping = "", False
    heard = looked = time.monotonic()
    lacking: float | None = None  # since when there are too few nodes
    while True:
        if received and not stopping:
            stopping = True
            hub.stop.remote()
            line.note("stopping after a checkpoint; once more stops at once")
        ended = fit.done()
        now = time.monotonic()
        for kind, *payload in ray.get(hub.take.remote()):
            heard = now
            if kind == "progress":
                epoch, step, steps = payload
                line.update(epoch + step / steps, config.epochs, f"epoch {epoch + 1}/{config.epochs} {last}".rstrip())
            elif kind == "epoch":
                (record,) = payload
                last = describe(record)
                done = record["epoch"] + 1
                line.update(done, config.epochs, f"epoch {done}/{config.epochs} {last}", milestone=True)
            elif kind == "note":
                line.note(*payload)
            else:
                (failures,) = payload
                lost = "; ".join(f"worker {rank}: {message}" for rank, message in failures.items())
                line.note(f"{lost}. Going on from the last checkpoint (--max-failures {safety.max_failures})")
        if ended:
            return
        if min(now - heard, now - looked) > NODES_INTERVAL_S:
            looked, lack = now, cluster.missing(workers)
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


def describe(record: dict[str, Any]) -> str:
    """An epoch in one line."""
    return (
        f"loss {record['val_loss']:.0f} = reconstruction {record['val_reconstruction']:.0f} "
        f"+ KL {record['val_kl']:.0f}, {record['images_per_s']:.0f} images/s, explained {record['val_explained']:.3f}"
    )


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1] if 'Traceback' in lines[0] else lines[0]}".strip(": ")

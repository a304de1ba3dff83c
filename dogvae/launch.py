"""The only file that talks to Ray Train: the trainer, its progress on the console, and its failures."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import torch

from dogvae.cluster import Workers
from dogvae.config import Config
from dogvae.console import Progress, UsageError
from dogvae.storage import Storage
from dogvae.train import Observer, loop

PROGRESS_INTERVAL_S = 0.3


class _RayObserver(Observer):
    """Sends what rank 0 has to tell to the driver's queue, without ever waiting for it."""

    def __init__(self, queue: Any, rank: int) -> None:
        self._queue, self._rank, self._last = queue, rank, 0.0

    def _send(self, kind: str, *payload: Any) -> None:
        self._queue.actor.put_nowait.remote((kind, *payload))

    def progress(self, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            self._send("progress", epoch, step, steps)

    def epoch(self, record: dict[str, Any]) -> None:
        if self._rank == 0:
            self._send("epoch", record)


def _worker(settings: dict[str, Any]) -> str | None:
    """What every Ray Train worker runs. Returns a user's mistake: raised, it would be tried again and again."""
    import ray.train
    import ray.train.torch

    torch.set_num_threads(settings["threads"])
    context = ray.train.get_context()
    observer = _RayObserver(settings["queue"], context.get_world_rank())
    try:
        loop(settings["config"], Storage(settings["run"]), ray.train.torch.get_device(), observer)
    except UsageError as mistake:
        return str(mistake)
    return None


def launch(config: Config, storage: Storage, workers: Workers, max_failures: int, verbose: bool) -> None:
    """Train to the last epoch and show progress; raises what a worker raised if it cannot go on."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            queue.put_nowait(("failure", {rank: _first_line(e) for rank, e in worker_exceptions.items()}))

    head, _, name = storage.uri.rpartition("/")
    # At run time these are Train V2's classes, which keep what the workers return; type checkers see V1's.
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"config": config, "run": storage.uri, "queue": queue, "threads": workers.cpus},
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": 1} if workers.gpu else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=head,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[Failures()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
    )
    fit: Future[Any] = Future()

    def run() -> None:
        try:
            fit.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  (the main thread raises it)
            fit.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon: Ctrl-C must not wait for it
    _show(queue, fit, config, max_failures)
    queue.shutdown()
    if mistake := fit.result().return_value:
        raise UsageError(mistake)


def _show(queue: Any, fit: Future[Any], config: Config, max_failures: int) -> None:
    """Draw what the workers send until the trainer has ended and everything is drawn."""
    from ray.util.queue import Empty

    last = ""
    with Progress("training", plain_interval_s=60) as line:
        while True:
            ended = fit.done()
            try:
                kind, *payload = queue.get(timeout=0.5)
            except Empty:
                if ended:
                    return
                continue
            if kind == "progress":
                epoch, step, steps = payload
                line.update(epoch + step / steps, config.epochs, f"epoch {epoch + 1}/{config.epochs} {last}")
            elif kind == "epoch":
                (record,) = payload
                last = describe(record)
                done = record["epoch"] + 1
                line.update(done, config.epochs, f"epoch {done}/{config.epochs} {last}", milestone=True)
            else:
                (failures,) = payload
                for rank, message in failures.items():
                    line.note(f"worker {rank} failed: {message}")
                line.note(f"going on from the last checkpoint (at most {max_failures} times: --max-failures)")


def describe(record: dict[str, Any]) -> str:
    """An epoch in one line."""
    return (
        f"loss {record['val_loss']:.1f} = reconstruction {record['val_reconstruction']:.1f} "
        f"+ KL {record['val_kl']:.1f}, explained {record['val_explained']:.3f}, {record['images_per_s']:.0f} images/s"
    )


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"{type(cause).__name__}: {lines[-1] if 'Traceback' in lines[0] else lines[0]}"

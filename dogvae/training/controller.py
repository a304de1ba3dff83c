"""Ray Train's trainer for `worker.work`, without what only its other users' jobs need.

Each process that it would start more takes seconds of every start and every recovery, nearly all of them imports. So
the controller runs here, not in an actor; the first workers have been started before (early.py); and only they import
torch. How they find each other is as in ray.train.torch.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import ray
from ray.train import UserCallback
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, state, worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dogvae.training.early import EarlyWorkers

LEAVE_TIMEOUT_S = 30  # for the workers' group to be dissolved


def _join(*args: Any) -> None:
    from dogvae.training.worker import join

    join(*args)


def _leave() -> None:
    from dogvae.training.worker import leave

    leave()


class _Group(Backend):
    """The process group of all workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        host, port = worker_group.execute_single(0, get_address_and_port)
        address, count = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", len(worker_group)
        joining = [
            worker_group.execute_single_async(
                rank, _join, backend_config.network, backend_config.gpu, address, rank, count
            )
            for rank in range(count)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_TIMEOUT_S)


class Torch(BackendConfig):
    """torch.distributed by nccl, else gloo. `network` is what `cluster.network_settings` said here."""

    backend_cls = _Group

    def __init__(self, gpu: bool, network: dict[str, str]) -> None:
        self.gpu, self.network = gpu, network


class Failures(UserCallback):
    """Tells the hub of workers that were lost."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._hub.tell.remote("failure", {rank: _first_line(e) for rank, e in worker_exceptions.items()})


class _Nobody:
    """Where Ray Train has a process for its collectives. The only one that we use tells of nodes that will go."""

    def options(self, **_: Any) -> _Nobody:
        return self

    remote = options


class _Workers(WorkerGroup):
    early: EarlyWorkers | None = None  # for the first group of a training

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        # With settings of their own they would not get the processes that a cluster has ready, and on one machine there
        # is nobody to make such a process: `cluster._lean_node`.
        return {}

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        self._taken, _Workers.early = _Workers.early, None
        if self._taken:
            return DefaultPlacementGroupHandle(self._taken.placement_group)
        return super()._create_placement_group(scaling_config, worker_group_context)

    def _create_workers(self, *args: Any, **kwargs: Any) -> list[Worker]:
        if not self._taken:
            return super()._create_workers(*args, **kwargs)
        actors = self._taken.actors
        try:
            metadata = ray.get([actor.get_metadata.remote() for actor in actors])
        except ray.exceptions.RayActorError as error:  # they go with their placement group
            raise WorkerGroupStartupFailedError(str(error)) from error
        resources = self.get_worker_group_context().resources_per_worker
        workers = [Worker(actor, data, resources) for actor, data in zip(actors, metadata, strict=True)]
        return WorkerGroup._assign_worker_ranks(workers)

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        """As Ray Train's, without a controller that workers could ask for their checkpoints: ours are elsewhere."""
        given = [{name: values[i] for name, values in train_context_args.items()} for i in range(len(workers))]
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **more,
                )
                for worker, more in zip(workers, given, strict=True)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers


class _Fixed(FixedScalingPolicy):
    """Asks no autoscaler for nodes: where there is one machine, none can come."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class Trainer(DataParallelTrainer):
    """`fit` runs until training has ended; an event loop of its own, so in any thread.

    `early` are the first workers; `one_machine` says that there is no other machine, nor will be.
    """

    def __init__(self, early: EarlyWorkers | None, one_machine: bool, *args: Any, **kwargs: Any) -> None:
        self._early, self._one_machine = early, one_machine
        super().__init__(*args, **kwargs)

    def _create_default_callbacks(self) -> list[Any]:
        # We have no Ray datasets. And on one machine what is reserved is given back when the driver ends: Ray ties it
        # to the driver's life.
        spared = ["DatasetsCallback"] + ["PlacementGroupCleanerCallback"] * self._one_machine
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in spared]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self._one_machine:
            worker_group.SynchronizationActor = _Nobody()  # type: ignore[assignment, misc]
            state._shutdown_sync_actor = lambda _: None  # type: ignore[assignment]
            if isinstance(given["scaling_policy"], FixedScalingPolicy):
                given["scaling_policy"] = _Fixed(self.scaling_config)  # type: ignore[arg-type]
        _Workers.early = self._early
        controller = _Controller(**given)
        asyncio.run(controller.run())
        return controller.get_result()


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1] if 'Traceback' in lines[0] else lines[0]}".strip(": ")

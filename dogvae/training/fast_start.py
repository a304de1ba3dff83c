"""Shortcuts of a start on one machine, through private names of Ray.

    node        Ray starts without the processes that serve its dashboard, its autoscaler and its logs
    controller  Ray Train's controller runs in the command, not in an actor that first imports it all anew
    workers     the workers start while the command still imports Ray Train

Each saves about a second or more of a start (`python benchmarks/overhead.py --shortcuts`). They are taken
only with the releases on which the tests ran, and not with `DOGVAE_FAST_START=0`. Whatever goes wrong while one sets
itself up, Ray's public way is taken instead, with one note.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from dogvae.cluster.network import worker_environment
from dogvae.cluster.nodes import Workers
from dogvae.compat import release
from dogvae.console import warn

SWITCH = "DOGVAE_FAST_START"
TESTED = ("2.60",)  # releases of Ray on which the tests ran
PRIVATE = (
    "ray._private.node:Node.start_api_server",
    "ray._private.node:Node.start_monitor",
    "ray._private.node:Node.start_log_monitor",
    "ray._private.services:start_ray_process",
    "ray.train.torch:TorchTrainer._create_default_callbacks",
    "ray.train.torch:TorchTrainer._initialize_and_run_controller",
    "ray.train.v2._internal.exceptions:WorkerGroupStartupFailedError",
    "ray.train.v2._internal.execution.controller:TrainController.run",
    "ray.train.v2._internal.execution.controller:TrainController.get_result",
    "ray.train.v2._internal.execution.controller:TrainController.worker_group_cls",
    "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy.after_controller_start",
    "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy._maybe_send_resource_request",
    "ray.train.v2._internal.execution.worker_group:Worker",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup._assign_worker_ranks",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup._create_placement_group",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup._create_workers",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup._decorate_worker_log_file_paths",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup._init_train_context_on_workers",
    "ray.train.v2._internal.execution.worker_group.placement_group_handle:DefaultPlacementGroupHandle",
    "ray.train.v2._internal.execution.worker_group.worker:RayTrainWorker",
)
"""All private names that this file uses, as MODULE:ATTRIBUTE; a test says which of them a new release lacks."""

_noted = False


def uses(shortcut: str) -> bool:
    """Whether `node`, `controller` or `workers` is taken: `DOGVAE_FAST_START` is unset or 1, or names it."""
    wanted = os.environ.get(SWITCH, "1")
    return release("ray") in TESTED and (wanted == "1" or shortcut in wanted.split(","))


def _note(shortcut: str, error: BaseException) -> None:
    global _noted
    if not _noted:
        warn(f"starting without the shortcut {shortcut!r} ({type(error).__name__}: {error}): some seconds slower")
        _noted = True


def start_ray(verbose: bool, **options: Any) -> None:
    """`ray.init(**options)` for a Ray on this machine alone."""
    if not uses("node"):
        ray.init(**options)
        return
    try:
        with _lean_node(verbose):
            # Processes start when there is work for them, so that none has to be waited for.
            ray.init(**options, _system_config={"prestart_worker_first_driver": False})
    except Exception as error:  # noqa: BLE001  (of private names anything may come; the public way says what is wrong)
        _note("node", error)
        ray.shutdown()
        ray.init(**options)


@contextmanager
def _lean_node(verbose: bool) -> Iterator[None]:
    """A Ray that is started within has no dashboard, autoscaler and agents, and a reader of logs only if `verbose`.

    Also with `include_dashboard=False` Ray starts them, waits for each, and they keep the cores busy.
    """
    from ray._private import node, services

    class Node(node.Node):
        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""

        def start_monitor(self) -> None: ...

        def start_log_monitor(self) -> None:
            if verbose:
                super().start_log_monitor()

    def start(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == "raylet":
            command = [*command, *absent]  # of a flag given twice the last counts
        return start_process(command, process_type, *args, **kwargs)

    # A raylet waits until each of its agents has told its port, and ends when one does. `cat` ends with the raylet, as
    # an agent does; -1 is what an agent tells that serves no port.
    absent = ["--dashboard_agent_command=cat", "--metrics_agent_port=-1", "--metrics_export_port=-1"]
    absent += ["--dashboard_agent_listen_port=-1", "--num_prestart_python_workers=0"]
    usual, start_process = node.Node, services.start_ray_process
    node.Node, services.start_ray_process = Node, start  # type: ignore[misc]
    try:
        yield
    finally:
        node.Node, services.start_ray_process = usual, start_process  # type: ignore[misc]


class EarlyRayTrainWorker:
    """Stands in for Ray Train's worker: this actor imports Ray Train while the command does.

    Ray asks the class for its methods in the command, where Ray Train's class is not known yet: hence the list.
    """

    METHODS = (
        "clear_result_queue", "execute", "get_metadata", "init_train_context", "mark_preempt", "poll_status",
        "run_train_fn", "shutdown",
    )  # fmt: skip

    def __init__(self) -> None:
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

        import dogvae.training.worker  # noqa: F401

        self.worker = RayTrainWorker()


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: EarlyRayTrainWorker, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, name)(*args, **kwargs)

    return method


for _name in EarlyRayTrainWorker.METHODS:
    setattr(EarlyRayTrainWorker, _name, _passed_on(_name))


@dataclass
class EarlyWorkers:
    """Actors, in the order of their ranks, and the placement group that holds their resources."""

    actors: list[Any]
    placement_group: Any


def start_workers(workers: Workers) -> EarlyWorkers | None:
    """Have Ray start the workers, without waiting for them; None where Ray Train is to start them."""
    if not (uses("controller") and uses("workers")) or isinstance(workers.count, tuple):
        return None
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([workers.resources] * workers.count)
    worker = ray.remote(
        num_cpus=workers.cpus, num_gpus=int(workers.gpu), runtime_env={"env_vars": worker_environment()}
    )(EarlyRayTrainWorker)
    places = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(workers.count)]
    return EarlyWorkers([worker.options(scheduling_strategy=place).remote() for place in places], group)


def trainer_class(early: EarlyWorkers | None) -> Any:
    """A TorchTrainer that runs its controller in this process and takes over the early workers; else Ray's own."""
    from ray.train.torch import TorchTrainer

    if not uses("controller"):
        return TorchTrainer
    try:
        return _in_process_trainer(early)
    except Exception as error:  # noqa: BLE001  (see `start_ray`)
        _note("controller", error)
        _release(early)
        return TorchTrainer


def _release(early: EarlyWorkers | None) -> None:
    if early:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(early.placement_group)


def _in_process_trainer(early: EarlyWorkers | None) -> Any:
    import ray.train.torch
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle

    class Group(WorkerGroup):
        def _create_placement_group(self, *args: Any) -> Any:
            nonlocal early
            self._taken, early = early, None  # the first group has them; later ones start their own
            if self._taken:
                return DefaultPlacementGroupHandle(self._taken.placement_group)
            return super()._create_placement_group(*args)

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
            """As Ray Train's, but there is no actor of the controller whose handle workers could have."""
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

    trainer: Any = ray.train.torch.TorchTrainer  # at run time Train V2's; type checkers see V1's

    class Controller(TrainController):
        worker_group_cls = Group

    class Fixed(FixedScalingPolicy):
        """Asks no autoscaler for nodes: where there is one machine, none can come."""

        def after_controller_start(self, train_run_context: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    class InProcessTrainer(trainer):
        """`fit` runs the controller here, in an event loop of its own; as an actor it would first import all anew."""

        def _create_default_callbacks(self) -> list[Any]:
            # There are no Ray datasets. What is reserved on this machine is given back when the command ends.
            spared = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in spared]

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            try:
                if isinstance(given["scaling_policy"], FixedScalingPolicy):
                    given["scaling_policy"] = Fixed(self.scaling_config)
                controller = Controller(**given)
            except Exception as error:  # noqa: BLE001  (see `start_ray`)
                _note("controller", error)
                _release(early)
                return super()._initialize_and_run_controller(**given)
            asyncio.run(controller.run())
            return controller.get_result()

    return InProcessTrainer

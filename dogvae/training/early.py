"""Workers that start, and import what they need, while the command imports Ray Train.

Ray Train starts its workers itself, but not before it is imported: seconds that both need, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dogvae.cluster.nodes import Workers


class EarlyRayTrainWorker:
    """Ray Train's RayTrainWorker in all that it is asked; the import of that is its own business."""

    def __init__(self) -> None:
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

        import dogvae.training.worker  # noqa: F401

        self.worker = RayTrainWorker()


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: EarlyRayTrainWorker, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, name)(*args, **kwargs)

    return method


# Ray asks the class for its methods, in the command, where Ray Train's is not known yet.
METHODS = "clear_result_queue execute get_metadata init_train_context mark_preempt poll_status run_train_fn shutdown"
for _name in METHODS.split():
    setattr(EarlyRayTrainWorker, _name, _passed_on(_name))


@dataclass
class EarlyWorkers:
    """So many actors, in order, and the placement group that holds their resources."""

    actors: list[Any]
    placement_group: Any


def start(workers: Workers) -> EarlyWorkers:
    """Have Ray start the least number of workers, without waiting for them."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([workers.resources] * workers.least)
    worker = ray.remote(num_cpus=workers.cpus, num_gpus=int(workers.gpu))(EarlyRayTrainWorker)
    places = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(workers.least)]
    return EarlyWorkers([worker.options(scheduling_strategy=place).remote() for place in places], group)

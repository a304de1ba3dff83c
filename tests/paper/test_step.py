"""What a training step launches, copies and waits for on a GPU, counted on the paper GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Run = Callable[..., list[dict[str, Any]]]
ALONE = {"PAPER_ALONE": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": None}  # one process, with torch's cache of memory
LAUNCHES = {1: 305, 4: 308}  # by number of GPUs, of a step on 64 images; 79 of them are convolutions
COLLECTIVES = {1: 0, 4: 3}  # two buckets of gradients, and the squared error that sigma comes from


def test_step_launches_few_kernels_and_makes_the_host_wait_nowhere(on_paper_gpu: Run) -> None:
    found = on_paper_gpu("steps:steps", ALONE, settings=[{"world_size": world_size} for world_size in LAUNCHES])
    for (world_size, most), step in zip(LAUNCHES.items(), found, strict=True):
        counts = step["counts"]
        assert counts["waits"] == 0
        assert counts["launches"] <= most, step["kernels"]
        assert counts["collectives"] == COLLECTIVES[world_size]
        assert step["bf16"]
        assert step["strides"] == []  # of weights, gradients and moments, which Adam's kernel needs to be equal


def test_step_of_other_networks_and_of_empty_slices_runs(on_paper_gpu: Run) -> None:
    settings = [{"n": 3}, {"preset": "notebook"}, {"precision": "fp32"}, {"samples": 3, "grad_clip": 0.0}]
    for step in on_paper_gpu("steps:steps", ALONE, settings=[{"world_size": 4, **each} for each in settings]):
        assert (step["counts"]["waits"], step["strides"]) == (0, [])


def test_bf16_is_not_the_default_where_the_hardware_lacks_it(on_paper_gpu: Run) -> None:
    (step,) = on_paper_gpu("steps:steps", {**ALONE, "PAPER_MAJOR": "7"}, settings=[{"world_size": 1}])
    assert not step["bf16"]

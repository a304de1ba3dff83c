"""What a training step launches, copies and waits for on a GPU, counted on the paper GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., dict[str, Any]]
LAUNCHES = {1: 306, 4: 310}  # by number of GPUs; 79 of them are convolutions
ALONE = {"PAPER_ALONE": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": None}  # one process, with torch's cache of memory
COLLECTIVES = {1: 0, 4: 4}  # three groups of gradients, and the squared error that sigma comes from


@pytest.mark.parametrize("world_size", [1, 4])
def test_step_stays_within_its_counts(on_paper_gpu: Run, world_size: int) -> None:
    found = on_paper_gpu("steps:step", ALONE, world_size=world_size)
    counts = found["counts"]
    assert counts["waits"] == 0
    assert counts["launches"] <= LAUNCHES[world_size], found["kernels"]
    assert counts["collectives"] == COLLECTIVES[world_size]
    assert found["strides"] == []


@pytest.mark.parametrize("settings", [{"n": 3}, {"preset": "notebook"}, {"precision": "fp32"}])
def test_step_of_other_networks_and_empty_slices_runs(on_paper_gpu: Run, settings: dict[str, Any]) -> None:
    assert on_paper_gpu("steps:step", ALONE, world_size=4, **settings)["strides"] == []

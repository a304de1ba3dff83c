"""The training loop on the paper GPU: all kinds of data and batches, resuming, and what keeps the host waiting."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dogvae.training.loop import POLL_STEPS_CUDA

Run = Callable[..., list[dict[str, Any]]]


DDP_MEASURES = 10  # first steps of a process, in which DDP takes the time, and waits for it

NOTEBOOK = {"architecture": "notebook", "likelihood": "bernoulli"}  # with batch norm


@pytest.mark.parametrize(
    ("world_size", "streamed", "settings"),
    [
        (1, False, {}),
        (1, True, NOTEBOOK),
        (4, True, {"batch_size": 33}),  # the last batch has one image: three ranks have none
        (2, False, {"batch_size": 33, **NOTEBOOK}),
    ],
)
def test_run_trains_to_its_end_and_waits_for_the_gpu_only_in_polls(
    on_paper_gpu: Run, tmp_path: Path, world_size: int, streamed: bool, settings: dict[str, Any]
) -> None:
    epochs = 5 if world_size > 1 else 2
    (run,) = on_paper_gpu(
        "runs:train", {"PAPER_GPUS": str(world_size)}, where=str(tmp_path), world_size=world_size, streamed=streamed,
        epochs=epochs, **settings,
    )  # fmt: skip
    steps = -(-100 // settings.get("batch_size", 8))
    assert (run["done"], run["epochs"]) == (True, [steps * epoch for epoch in range(1, epochs + 1)])
    checked = 0
    for before, after in pairwise(run["steps"]):
        step, polled = after["step"], before["step"] % POLL_STEPS_CUDA == 0
        measured = world_size > 1 and step <= DDP_MEASURES
        if step % steps != 1 and not polled and not measured:  # without a validation or a poll between them
            checked += 1
            assert after["waits"] == before["waits"], f"step {step} makes the host wait for the GPU"
    assert checked > 5
    uploads = run["steps"][-1]["host_to_device"] - run["steps"][-2]["host_to_device"]
    assert uploads <= 5  # flips, which to turn, how far, and the indices of the batch or the batch


def test_stopped_run_goes_on(on_paper_gpu: Run, tmp_path: Path) -> None:
    stopped, went_on = on_paper_gpu("runs:train", where=str(tmp_path), world_size=1, stop_at=[2, None], epochs=2)
    assert (stopped["done"], stopped["epochs"]) == (False, [13])
    assert (went_on["done"], went_on["epochs"]) == (True, [13, 26])
    assert went_on["notes"] == ["going on in epoch 2 after step 3, with 1 worker"]

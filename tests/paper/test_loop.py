"""The training loop on the paper GPU: all kinds of data and batches, resuming, and what keeps the host waiting."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., dict[str, Any]]
POLL = 8  # steps between two polls on a GPU


@pytest.mark.parametrize(
    ("world_size", "streamed", "settings"),
    [
        (1, False, {}),
        (1, True, {"architecture": "notebook", "likelihood": "bernoulli"}),
        (4, True, {"batch_size": 33}),  # the last batch has one image: three ranks have none
        (4, False, {"batch_size": 33, "architecture": "notebook", "likelihood": "bernoulli"}),
    ],
)
def test_run_trains_to_its_end(
    on_paper_gpu: Run, tmp_path: Path, world_size: int, streamed: bool, settings: dict[str, Any]
) -> None:
    done = on_paper_gpu(
        "runs:train", {"PAPER_GPUS": str(world_size)}, where=str(tmp_path), world_size=world_size, streamed=streamed,
        epochs=2, **settings,
    )  # fmt: skip
    steps = -(-100 // settings.get("batch_size", 8))
    assert (done["done"], done["epochs"]) == (True, [steps, 2 * steps])
    for before, after in pairwise(done["steps"]):
        step, polled = after["step"], before["step"] % POLL == 0
        if step % steps != 1 and not polled:  # without a validation or a poll between them
            assert after["waits"] == before["waits"], f"step {step} makes the host wait for the GPU"


def test_stopped_run_goes_on(on_paper_gpu: Run, tmp_path: Path) -> None:
    stopped = on_paper_gpu("runs:train", where=str(tmp_path), world_size=1, stop_at=2, epochs=2)
    assert (stopped["done"], stopped["epochs"]) == (False, [13])
    went_on = on_paper_gpu("runs:train", where=str(tmp_path), world_size=1, epochs=2)
    assert (went_on["done"], went_on["epochs"]) == (True, [13, 26])
    assert went_on["notes"] == ["going on in epoch 2 after step 3, with 1 worker"]

"""The run that all fault tests interrupt, and its result without an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import EPOCHS, VARIANTS, job, make_dataset, train


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 20 validation images of 32x32 pixels."""
    return make_dataset(tmp_path_factory.mktemp("faults") / "dataset")


@pytest.fixture(scope="session")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `EPOCHS` epochs on two ranks, without Ray."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(job(dataset, epochs=EPOCHS), out, 2)
    return out


@pytest.fixture(scope="session")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs of the `VARIANTS` on one rank, four epochs each."""
    out = {variant: tmp_path_factory.mktemp("alone") / variant for variant in VARIANTS}
    for variant, path in out.items():
        train(job(dataset, **VARIANTS[variant]), path)
    return out

"""The job that all fault tests run, and where it ends when nothing befalls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import EPOCHS, job, make_dataset, train


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 20 validation images of 32x32 pixels."""
    return make_dataset(tmp_path_factory.mktemp("faults") / "dataset")


@pytest.fixture(scope="session")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job on two ranks for `EPOCHS`, without Ray and uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(job(dataset, epochs=EPOCHS), out, 2)
    return out

"""What the tests of datasets share: an empty cache for each test, and a dataset that is somewhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WriteDataset
from tests.support.datasets import noise, release_copies


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this node's copies."""
    monkeypatch.setenv("DOGVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DOGVAE_CACHE_GB", raising=False)
    yield tmp_path / "cache/datasets"
    release_copies()


@pytest.fixture
def remote(write_dataset: WriteDataset) -> Path:
    """Four shards of 40, 5, 4 and 2 images: 6 to 123 kB."""
    return write_dataset([noise(n, n) for n in (40, 5, 4)], [noise(2, 9)], "remote")

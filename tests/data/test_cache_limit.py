"""The room for copies on a node: what is deleted for a new copy, and what is said when there is no room."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from dogvae.data import cache as module
from dogvae.data.cache import local_copy
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from tests.conftest import WriteDataset
from tests.support.datasets import FETCH, child, fetched, noise, shards


@pytest.fixture
def three(write_dataset: WriteDataset) -> list[str]:
    """The URIs of datasets of the same size."""
    return [f"file://{write_dataset([noise(8, i)], [noise(1, 10 + i)], f'remote-{i}')}" for i in range(3)]


def limit(monkeypatch: pytest.MonkeyPatch, datasets: float) -> None:
    """Set the limit so that so many of the `three` fit."""
    monkeypatch.setenv("DOGVAE_CACHE_GB", str(datasets * (9 * 3 * 32 * 32 + 2 * 128) / 2**30))


def copy_of(uri: str, cache: Path) -> Path:
    return cache / Dataset(uri.removeprefix("file://")).fingerprint


def last_used(folder: Path, seconds: float) -> None:
    """Pretend that the copy was last used so many seconds ago."""
    then = time.time() - seconds
    os.utime(folder.with_suffix(".lock"), (then, then))


def test_least_recently_used_copy_is_deleted_first(
    three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = (copy_of(uri, cache) for uri in three)
    limit(monkeypatch, 2.1)
    assert [fetched(uri) for uri in three[:2]] == [a, b]
    last_used(a, 200)
    last_used(b, 100)
    fetched(three[0])  # makes it the most recently used one
    fetched(three[2])
    assert [path.exists() for path in (a, b, c)] == [True, False, True]
    fetched(three[1])
    assert [path.exists() for path in (a, b, c)] == [False, True, True]
    assert shards(b) == shards(Path(three[1].removeprefix("file://")))


def test_copy_in_use_is_kept(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (copy_of(uri, cache) for uri in three)
    fetched(three[0])
    user = child(FETCH + "import time; time.sleep(600)", three[1])
    assert user.stdout is not None
    assert user.stdout.readline() == f"{b}\n"
    try:
        last_used(a, 100)
        last_used(b, 200)
        limit(monkeypatch, 2.1)
        fetched(three[2])
        assert [path.exists() for path in (a, b, c)] == [False, True, True]
        limit(monkeypatch, 1.1)
        with pytest.raises(UsageError, match=r"^DOGVAE_CACHE_GB: .* MB, other copies .* in use .* MB.* MB: .* higher$"):
            local_copy(three[0])
        assert [path.exists() for path in (a, b, c)] == [False, True, True]  # an unused copy is not deleted in vain
    finally:
        user.kill()
        user.wait()
    fetched(three[0])
    assert [path.exists() for path in (a, b, c)] == [True, False, False]


def test_dataset_larger_than_the_limit_is_refused(three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a = fetched(three[0])
    limit(monkeypatch, 0.9)
    with pytest.raises(UsageError, match=r"DOGVAE_CACHE_GB: the dataset takes 0\.0 MB, and .* may take 0\.0 MB"):
        local_copy(three[1])
    assert fetched(three[0]) == a  # a copy that exists is used


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf", "50GB"])
def test_limit_must_be_a_positive_number(value: str, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOGVAE_CACHE_GB", value)
    with pytest.raises(UsageError, match=f"^DOGVAE_CACHE_GB: '{value}' is not a number"):
        local_copy(f"file://{remote}")


def test_unused_copies_are_deleted_when_the_disk_is_full(
    three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = fetched(three[0])
    free, usage = 0, shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    lock = module._lock(a.with_suffix(".lock"), module.fcntl.LOCK_SH)
    with pytest.raises(UsageError, match=r"^DOGVAE_CACHE: .* has room for 0\.0 MB, the dataset needs 0\.0 MB"):
        local_copy(three[1])
    os.close(lock)
    assert a.exists()
    assert shards(fetched(three[1])) == shards(Path(three[1].removeprefix("file://")))
    assert not a.exists()
    free = 10**9
    assert local_copy(three[2]).exists()
    assert copy_of(three[1], cache).exists()


def test_only_copies_are_deleted(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other files in the cache nor what a symlink in it points to."""
    fetched(three[0])
    for path in (cache / "mine", cache.parent / "oxford-pets", cache / ("a" * 63), cache.parent.parent / "elsewhere"):
        path.mkdir()
        (path / "file").write_bytes(bytes(10**6))
    (cache / ("b" * 64)).symlink_to(cache.parent.parent / "elsewhere")
    before = {path for path in cache.parent.parent.rglob("*") if copy_of(three[0], cache) not in (path, *path.parents)}
    limit(monkeypatch, 1.1)
    fetched(three[1])
    assert not copy_of(three[0], cache).exists()
    assert before <= set(cache.parent.parent.rglob("*"))


def test_cache_that_cannot_be_written_is_named(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DOGVAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=f"^DOGVAE_CACHE: {tmp_path}/file/datasets cannot be used .*: name a folder"):
        local_copy(f"file://{remote}")

"""Writing a folder atomically: it appears complete or not at all, next to other processes that write the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dogvae.data.atomic import atomic_folder
from tests.conftest import WriteDataset
from tests.support.datasets import contents, noise


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep/out") as folder:
        (folder / "x").write_bytes(b"1")
        assert names(tmp_path / "deep") == [folder.name]
    assert contents(tmp_path / "deep/out") == {"x": b"1"}
    assert names(tmp_path / "deep") == ["out"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "x").write_bytes(b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_leftovers_are_deleted_unless_another_process_uses_them(tmp_path: Path, write_dataset: WriteDataset) -> None:
    """And of two processes that write the same folder, the first one to finish wins."""
    first, second = (write_dataset([noise(2, i)], [noise(1, i)], f"dataset-{i}") for i in range(2))
    folder = tmp_path / "here"
    with atomic_folder(folder / "out") as slow:
        (folder / ".out.partial-dead").mkdir()
        (folder / ".other.partial-dead").mkdir()
        with atomic_folder(folder / "out") as fast:
            assert names(folder) == sorted([".other.partial-dead", slow.name, fast.name])
            for name, data in contents(first).items():
                (fast / name).write_bytes(data)
        for name, data in contents(second).items():
            (slow / name).write_bytes(data)
    assert names(folder) == [".other.partial-dead", "out"]
    assert contents(folder / "out") == contents(first)

"""Files below a path or URI: read and written whole, listed in order, deleted without complaint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.errors import UsageError
from dogvae.storage import Storage


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=len)
def test_file_is_written_read_listed_and_deleted(prefix: str, data: bytes, tmp_path: Path) -> None:
    storage = Storage(f"{prefix}{tmp_path}/runs")
    for version in (b"a first version", data):
        storage.write("a/b/c.bin", version)
        assert storage.read("a/b/c.bin") == version
        assert (tmp_path / "runs/a/b/c.bin").read_bytes() == version
        assert (storage / "a" / "b").read("c.bin") == version
    assert (storage / "a/b").uri == f"{tmp_path}/runs/a/b"
    assert (storage / "a/b").names() == storage.names("a/b") == ["c.bin"]
    for _ in range(2):  # deleting a file that does not exist is not an error
        storage.delete("a/b/c.bin")
        assert storage.names("a/b") == []
    storage.delete("nowhere/x")


def test_names_are_the_sorted_files_of_a_folder(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for name in ("b", "a", "step-2", "step-10", "deeper/c"):
        storage.write(name, b"")
    assert storage.names() == ["a", "b", "step-10", "step-2"]
    assert storage.names("nowhere") == Storage(tmp_path / "nowhere").names() == []


def test_exists_finds_files_and_folders(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert not storage.exists("a/b")
    storage.write("a/b", b"")
    assert storage.exists("a/b")
    assert storage.exists("a")
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


# --- atomic writes


def test_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"old")
    with pytest.raises(TypeError):
        storage.write("x", "text is not bytes")  # type: ignore[arg-type]
    assert storage.read("x") == b"old"
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write("taken", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "x"]
    assert list((tmp_path / "taken").iterdir()) == []


def test_open_file_stays_the_old_one_after_a_write(tmp_path: Path) -> None:
    Storage(tmp_path).write("x", b"old" * 1000)
    with (tmp_path / "x").open("rb") as reader:
        assert reader.read(3) == b"old"
        Storage(tmp_path).write("x", b"new")
        assert reader.read() == (b"old" * 1000)[3:]


def test_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave an empty file of that name."""
    flushed: list[tuple[int, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_size, (tmp_path / "x").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    Storage(tmp_path).write("x", bytes(1000))
    assert flushed == [(1000, False)]


# --- places and names


@pytest.mark.parametrize("uri", ["ftp://host/runs", "nonsense://x", "s4://bucket/runs", "https://host/x"])
def test_unknown_kind_of_uri_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=f"^{uri} is neither a folder nor a URI of a known file system: "):
        Storage(uri)


@pytest.mark.parametrize("uri", ["runs", "runs/", "./runs", "runs//", "~/runs"])
def test_local_path_becomes_absolute(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have other working directories, where the path must mean the same."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    storage = Storage(uri)
    assert storage.local == tmp_path / "runs"
    assert storage.uri == f"{tmp_path}/runs"
    assert Storage("/").local == Path("/")


def test_options_stay_at_the_end_of_a_uri(tmp_path: Path) -> None:
    storage = Storage("s3://bucket/runs?region=eu-north-1")
    assert storage.local is None
    assert (storage / "a" / "b").uri == "s3://bucket/runs/a/b?region=eu-north-1"
    assert (Storage(tmp_path / "which?") / "a").uri == f"{tmp_path}/which?/a"  # a path has no options


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(NAMES.filter(lambda name: name not in (".", "..")), st.binary(max_size=50), max_size=5))
def test_any_file_name_can_be_used(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    storage = Storage(tmp_path_factory.mktemp("names"))
    for name, data in files.items():
        storage.write(name, data)
    assert storage.names() == sorted(files)
    assert {name: storage.read(name) for name in storage.names()} == files

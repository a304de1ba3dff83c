"""Whole files, below any URI: written at once or not at all, listed in order, deleted without complaint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.errors import UsageError
from dogvae.storage import Storage


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_reads_what_was_written(tmp_path: Path, data: bytes) -> None:
    storage = Storage(tmp_path)
    storage.write("a/b/c.bin", data)
    assert storage.read("a/b/c.bin") == data
    assert (tmp_path / "a/b/c.bin").read_bytes() == data
    assert (storage / "a" / "b").read("c.bin") == data
    assert (storage / "a/b").uri == f"{tmp_path}/a/b"


def test_overwrites(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"a long first version")
    storage.write("x", b"short")
    assert storage.read("x") == b"short"
    assert storage.names() == ["x"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Storage(tmp_path).read("nothing")


def test_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"old")
    with pytest.raises(TypeError):
        storage.write("x", "text has no bytes")  # type: ignore[arg-type]
    assert storage.read("x") == b"old"
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write("taken", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "x"]
    assert list((tmp_path / "taken").iterdir()) == []


def test_readers_see_old_or_new_and_never_a_part(tmp_path: Path) -> None:
    """A file that is open goes on being the old one: the new one takes its name, not its bytes."""
    storage = Storage(tmp_path)
    storage.write("x", b"old" * 1000)
    with (tmp_path / "x").open("rb") as reader:
        assert reader.read(3) == b"old"
        storage.write("x", b"new")
        assert reader.read() == (b"old" * 1000)[3:]


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may come right after: the name must not be there without them."""
    flushed: list[tuple[int, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_size, (tmp_path / "x").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    Storage(tmp_path).write("x", bytes(1000))
    assert flushed == [(1000, False)]


def test_names_are_the_sorted_files(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for name in ("b", "a", "step-2", "step-10", "deeper/c"):
        storage.write(name, b"")
    assert storage.names() == ["a", "b", "step-10", "step-2"]
    assert storage.names("deeper") == ["c"]
    assert storage.names("nowhere") == []
    assert Storage(tmp_path / "nowhere").names() == []


def test_exists(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert not storage.exists("a/b")
    storage.write("a/b", b"")
    assert storage.exists("a/b")
    assert storage.exists("a")


def test_delete_is_idempotent(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("x", b"")
    storage.write("y", b"")
    storage.delete("x")
    storage.delete("x")
    storage.delete("nowhere/x")
    assert storage.names() == ["y"]


@pytest.mark.parametrize("uri", ["ftp://host/runs", "nonsense://x", "s4://bucket/runs", "https://host/x"])
def test_strange_uri(uri: str) -> None:
    with pytest.raises(UsageError) as error:
        Storage(uri)
    assert uri.split(":")[0] in str(error.value)


@pytest.mark.parametrize("uri", ["runs", "runs/", "./runs", "runs//"])
def test_relative_path_is_made_absolute(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other folders: what they are given must mean the same there."""
    monkeypatch.chdir(tmp_path)
    storage = Storage(uri)
    assert storage.local == tmp_path / "runs"
    assert storage.uri == f"{tmp_path}/runs"
    storage.write("x", b"1")
    assert Storage(storage.uri).read("x") == b"1"


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/runs").local == tmp_path / "runs"


def test_options_of_a_uri_stay_at_its_end() -> None:
    storage = Storage("s3://bucket/runs?region=eu-north-1")
    assert storage.local is None
    assert (storage / "a" / "b").uri == "s3://bucket/runs/a/b?region=eu-north-1"


def test_uri_of_a_local_folder(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}")
    storage.write("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    assert storage.read("x") == b"1"
    storage.delete("x")
    storage.delete("x")
    assert storage.names() == []


def test_uri_of_a_local_folder_makes_folders(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/runs")
    storage.write("a/x", b"1")
    assert (tmp_path / "runs/a/x").read_bytes() == b"1"


def test_question_mark_in_a_path(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "which?")
    assert (storage / "a").uri == f"{tmp_path}/which?/a"


def test_root_folder() -> None:
    assert Storage("/").local == Path("/")


@settings(max_examples=30, deadline=None)
@given(
    files=st.dictionaries(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
            lambda name: name not in (".", "..")
        ),
        st.binary(max_size=50),
        max_size=5,
    )
)
def test_any_file_name(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    storage = Storage(tmp_path_factory.mktemp("names"))
    for name, data in files.items():
        storage.write(name, data)
    assert storage.names() == sorted(files)
    assert {name: storage.read(name) for name in storage.names()} == files

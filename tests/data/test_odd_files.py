"""Files that are not what they say: pipes, devices, /proc, archives that declare more than they hold."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from dogvae.data import folders, photos
from dogvae.data.photos import Photo, Rejected
from dogvae.data.source import open_source
from dogvae.data.writer import Row, write_dataset
from dogvae.errors import UsageError
from dogvae.inference.user_images import pixels
from dogvae.user_file import open_file

ODD = {"pipe": "not a regular file", "device": "not a regular file", "sparse": "over 256 MB", "empty": "empty file"}
ODD |= {"proc": "a file of /proc or /sys", "sys": "a file of /proc or /sys"}


@pytest.fixture
def odd_files(tmp_path: Path) -> Path:
    """One `.jpg` of each kind of `ODD`."""
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(40 * 2**30)
    (folder / "empty.jpg").touch()
    for name, target in {"device": "/dev/zero", "proc": "/proc/kmsg", "sys": "/sys/kernel/notes"}.items():
        (folder / f"{name}.jpg").symlink_to(target)
    return folder


def test_folder_rejects_odd_files_and_folders_of_the_kernel(odd_files: Path) -> None:
    (odd_files / "everything").symlink_to("/proc")
    (odd_files / "good.jpg").write_bytes(b"dog")
    found = list(open_source(str(odd_files)))
    reasons = {Path(item.path).stem: item.reason for item in found if isinstance(item, Rejected)}
    assert reasons == ODD | {"everything": "a file of /proc or /sys"}
    assert [item.path for item in found if isinstance(item, Photo)] == ["good.jpg"]


@pytest.mark.parametrize("kind", ODD)
def test_odd_file_as_a_picture_is_refused_in_one_line(kind: str, odd_files: Path) -> None:
    with pytest.raises(UsageError, match=rf"^'?{odd_files}/{kind}\.jpg'? cannot be read: {ODD[kind]}$"):
        pixels(odd_files / f"{kind}.jpg", 32)


def test_file_that_becomes_a_pipe_is_refused_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dog.jpg").write_bytes(b"dog")
    seen = os.stat(tmp_path / "dog.jpg")
    (tmp_path / "dog.jpg").unlink()
    os.mkfifo(tmp_path / "dog.jpg")
    monkeypatch.setattr(os, "stat", lambda path: seen)
    with pytest.raises(OSError, match="not a regular file"):
        open_file(tmp_path / "dog.jpg")


@pytest.mark.parametrize("name", ["dogs.zip", "dogs.tar"])
def test_archive_that_is_a_file_of_proc_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/kmsg")
    with pytest.raises(UsageError, match="cannot be opened: a file of /proc or /sys"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("size", [2**20, 2**40, 2**60])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tar_that_declares_more_than_it_has_gives_the_photos_before(tmp_path: Path, size: int, suffix: str) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for i in range(5):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 1000
            archive.addfile(member, io.BytesIO(bytes([i]) * 1000))
        end = archive.offset
    big = tarfile.TarInfo("big.jpg")
    big.size = size
    data = written.getvalue()[:end] + big.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024
    (tmp_path / f"dogs.{suffix}").write_bytes(gzip.compress(data) if suffix == "tar.gz" else data)
    found = list(open_source(str(tmp_path / f"dogs.{suffix}")))
    assert [item.data for item in found if isinstance(item, Photo)] == [bytes([i]) * 1000 for i in range(5)]
    reasons = {item.path: item.reason for item in found if isinstance(item, Rejected)}
    assert reasons["big.jpg"] == ("unexpected end of data" if size < 2**28 else "over 256 MB")
    assert reasons[f"dogs.{suffix}"].startswith("the rest of the archive was not read: ")


def test_sparse_map_of_a_tar_that_never_ends_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("map.jpg")
    member.size = 512
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    data = member.tobuf(tarfile.PAX_FORMAT) + (b"99999999\n" + b"1\n" * 300)[:512]
    (tmp_path / "dogs.tar").write_bytes(data)
    with pytest.raises(UsageError, match="cannot be opened: "):
        open_source(str(tmp_path / "dogs.tar"))


def test_zip_member_that_declares_gigabytes_is_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "dogs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.writestr(name, b"x" * 5000)
        archive.getinfo("b.jpg").file_size = 2**31
    found = list(open_source(str(tmp_path / "dogs.zip")))
    assert [item.path for item in found if isinstance(item, Photo)] == ["a.jpg"]
    assert {item.path for item in found if isinstance(item, Rejected)} == {"b.jpg"}


@pytest.mark.parametrize("installed", [False, True])
def test_suffix_of_heic_says_which_extra_reads_it(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.HEIC", "b.heif", "c.jxl", "d.avif", "e.tiff"):
        (tmp_path / name).write_bytes(b"x")
    signatures = []
    for reads in (False, installed):
        monkeypatch.setattr(photos, "reads_heic", lambda reads=reads: reads)
        monkeypatch.setattr(folders, "reads_heic", lambda reads=reads: reads)
        signatures.append(open_source(str(tmp_path)).signature())
    assert (signatures[0] != signatures[1]) == installed  # so that the photos are prepared again
    items = list(open_source(str(tmp_path)))
    rejected = {item.path: item.reason for item in items if isinstance(item, Rejected)}
    assert rejected.pop("c.jxl") == "suffix '.jxl': JPEG XL is not read; convert it to JPEG or PNG"
    heic = {
        name: f"suffix {name[1:]!r}: HEIC is read after: pip install 'dogvae[heic]'" for name in ("a.HEIC", "b.heif")
    }
    assert rejected == ({} if installed else heic)
    assert [item.path for item in items if isinstance(item, Photo)] == (list(heic) if installed else []) + [
        "d.avif",
        "e.tiff",
    ]


def test_dataset_without_photos_names_the_extra_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the first rejected file is a sidecar of a photo."""
    monkeypatch.setattr(photos, "reads_heic", lambda: False)
    for name in ("1.AAE", "1.HEIC", "2.AAE", "2.HEIC"):
        (tmp_path / name).write_bytes(b"x")
    rows = [Row(item.path, None, b"", item.reason) for item in open_source(str(tmp_path)) if isinstance(item, Rejected)]
    (tmp_path / "out").mkdir()
    with pytest.raises(
        UsageError, match=r"all 4 files were rejected, for example 1\.HEIC: .*pip install 'dogvae\[heic\]'"
    ):
        write_dataset(tmp_path / "out", rows, {"name": "photos"}, {"size": 32, "val_fraction": 0.1})

"""Sources: which files of a folder or archive become photos, with which boxes, and why others are rejected."""

from __future__ import annotations

import io
import os
import pickle
import socket
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dogvae.data import photos
from dogvae.data.drawn import draw
from dogvae.data.photos import Drawing, Photo, Rejected
from dogvae.data.source import open_source
from dogvae.errors import UsageError


def xml(*boxes: tuple[object, ...]) -> bytes:
    """A Pascal VOC annotation with boxes (left, top, right, bottom)."""
    side = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    return f"<annotation>{''.join(f'<object>{side.format(*box)}</object>' for box in boxes)}</annotation>".encode()


def read(spec: object, crop: str = "center") -> tuple[dict[str, Photo], dict[str, str]]:
    """The photos of a source by path, and the reasons of its rejected files by path."""
    items = list(open_source(str(spec), crop))
    photos = {item.path: item for item in items if isinstance(item, Photo)}
    return photos, {item.path: item.reason for item in items if isinstance(item, Rejected)}


def data(found: dict[str, Photo]) -> dict[str, object]:
    return {path: photo.data for path, photo in found.items()}


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# --- folders


def test_photos_of_a_folder_are_sorted_and_other_files_rejected(tmp_path: Path) -> None:
    files = {"b/2.JPG": b"2", "b/1.webp": b"1", "a dög.png": b"3", "notes.txt": b"x", "noext": b"x", "empty.gif": b""}
    hidden = (".hidden.jpg", "__MACOSX/x.jpg", ".DS_Store", "Thumbs.db", ".git/y.jpg")
    found, rejected = read(tree(tmp_path, files | dict.fromkeys(hidden, b"x")))
    assert list(data(found).items()) == [("a dög.png", b"3"), ("b/1.webp", b"1"), ("b/2.JPG", b"2")]
    assert rejected == {
        "notes.txt": "suffix '.txt' is not an image's",
        "noext": "suffix '' is not an image's",
        "empty.gif": "empty file",
    }


def test_folder_follows_links_once_and_rejects_special_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tree(tmp_path / "outside", {"far.jpg": b"far"})
    root = tree(tmp_path / "root", {"real/dog.jpg": b"dog"})
    (root / "real/loop").symlink_to(root)
    (root / "a_file.jpg").symlink_to(outside / "far.jpg")
    (root / "a_folder").symlink_to(outside)
    (root / "broken.jpg").symlink_to(root / "nowhere")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "dir.jpg").mkdir()
    os.mkfifo(root / "fifo.jpg")
    monkeypatch.chdir(root)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket.jpg")
    found, rejected = read(root)
    assert data(found) == {"a_file.jpg": b"far", "a_folder/far.jpg": b"far", "real/dog.jpg": b"dog"}
    assert rejected == {
        "broken.jpg": "No such file or directory",
        "self.jpg": "Too many levels of symbolic links",
        "fifo.jpg": "not a regular file",
        "socket.jpg": "not a regular file",
        "real/loop": "a folder that is already read as the source itself: a link",
    }


def test_folders_that_link_to_each_other_are_read_once(tmp_path: Path) -> None:
    for i in range(8):
        tree(tmp_path, {f"{i}/dog.jpg": b"x"})
        for j in range(8):
            (tmp_path / f"{i}/to{j}").symlink_to(tmp_path / str(j))
    assert len(read(tmp_path)[0]) == 8  # more than 8! paths lead to them


def test_file_over_the_size_limit_is_rejected_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(photos.MAX_BYTES + 1)  # a sparse file
    assert read(tmp_path)[1] == {"huge.jpg": "over 256 MB"}


def test_photos_of_a_folder_can_be_read_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dogs = {"a.jpg": b"1", "empty.gif": b"", "notes.txt": b"x"}
    monkeypatch.chdir(tree(tmp_path / "dogs", dogs))
    now = list(open_source("."))
    source = open_source(".")
    source.defer_reading = True
    items = pickle.dumps(list(source))
    monkeypatch.chdir("/")
    later = pickle.loads(items)
    assert [isinstance(item, photos.UnreadPhoto) for item in later] == [True, True, False]
    assert [item.read() if isinstance(item, photos.UnreadPhoto) else item for item in later] == now
    archive = open_source(str(make_zip(tmp_path / "dogs.zip", dogs)))
    archive.defer_reading = True  # without effect: an archive is a single file
    assert sorted(archive, key=str) == sorted(now, key=str)


def test_signature_of_a_folder_changes_with_names_and_times_only(tmp_path: Path) -> None:
    root = tree(tmp_path / "photos", {"a.jpg": b"1", "b/c.jpg": b"2"})
    first = open_source(str(root)).signature()
    moved = root.rename(tmp_path / "moved")
    assert open_source(str(moved)).signature() == first
    os.utime(moved / "a.jpg", ns=(1, 1))
    second = open_source(str(moved)).signature()
    (moved / "b").rename(moved / "d")
    third = open_source(str(moved)).signature()
    assert len({first, second, third}) == 3


# --- archives


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tgz"])
def test_archive_gives_its_photos_and_rejects_paths_that_lead_outside(tmp_path: Path, suffix: str) -> None:
    members = {"b.jpg": b"2", "./dogs/a.jpg": b"1", "x.txt": b"x", "../climbs.jpg": b"x", "/absolute.jpg": b"x"}
    members |= {"C:\\drive.jpg": b"x", "empty.png": b"", "__MACOSX/._a.jpg": b"x", "a/../../b.jpg": b"x"}
    path = tmp_path / f"dogs.{suffix}"
    if suffix == "zip":
        make_zip(path, members)
    else:
        make_tar(path, members, "w" if suffix == "tar" else "w:gz")
    found, rejected = read(path)
    assert data(found) == {"dogs/a.jpg": b"1", "b.jpg": b"2"}
    outside = ("../climbs.jpg", "/absolute.jpg", "C:\\drive.jpg", "a/../../b.jpg")
    assert rejected == {
        "x.txt": "suffix '.txt' is not an image's",
        "empty.png": "empty file",
        **dict.fromkeys(outside, "would land outside the folder that the archive is unpacked into"),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_unreadable_zip_members_are_rejected(tmp_path: Path) -> None:
    members = {"good.jpg": b"good", "huge.jpg": b"x", "secret.jpg": b"x", "bomb.jpg": bytes(2**20)}
    path = make_zip(tmp_path / "dogs.zip", members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo("broken.jpg"), b"PAYLOAD")  # not compressed, so that it can be damaged below
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.getinfo("huge.jpg").file_size = photos.MAX_BYTES + 1
        archive.getinfo("bomb.jpg").file_size = 10
        archive.getinfo("secret.jpg").flag_bits |= 1
    path.write_bytes(path.read_bytes().replace(b"PAYLOAD", b"PAYLOAX"))
    found, rejected = read(path)
    assert data(found) == {"good.jpg": b"good"}
    assert rejected == {
        "bomb.jpg": "Bad CRC-32 for file 'bomb.jpg'",
        "broken.jpg": "Bad CRC-32 for file 'broken.jpg'",
        "huge.jpg": "over 256 MB",
        "link.jpg": "a link",
        "secret.jpg": "encrypted",
    }


def test_tar_links_and_devices_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "dogs.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("f.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert read(path) == ({}, {"s.jpg": "a link", "h.jpg": "a link", "f.jpg": "not a regular file"})


GIANT = tarfile.TarInfo("@LongLink")
GIANT.type, GIANT.size = tarfile.GNUTYPE_LONGNAME, 2**40
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated tar": (lambda tar: tar[:55_000], "was not read: "),
    "truncated gzip": (lambda tar: tar[:55_000], "was not read: "),
    "bad header": (lambda tar: tar.replace(b"5.jpg", b"X.jpg", 1), "was not read: truncated or damaged"),
    "giant header": (lambda tar: tar[: 5 * 10_752] + GIANT.tobuf(tarfile.GNU_FORMAT), "extended header of over 1 MB"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tar_gives_the_photos_before_the_damage(damage: str, tmp_path: Path) -> None:
    whole = {f"{i}.jpg": os.urandom(10_000) for i in range(10)}
    path = make_tar(tmp_path / "dogs.tar", whole, "w:gz" if "gzip" in damage else "w")
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    found, rejected = read(path)
    readable = 4 if "gzip" in damage else 5  # gzip is read in blocks, and the block that was cut is lost
    assert data(found) == {name: whole[name] for name in list(whole)[:readable]}
    assert message in rejected.pop("dogs.tar")
    assert list(rejected) == ([f"{readable}.jpg"] if "truncated" in damage else [])


@pytest.mark.parametrize("name", ["dogs.zip", "dogs.tar", "dogs.tar.gz", "dogs.tgz"])
def test_file_that_is_not_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8bPK" + os.urandom(600))
    with pytest.raises(UsageError, match=r"SOURCE .*dogs.* cannot be opened"):
        open_source(str(tmp_path / name))


def test_spec_that_names_no_source_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"dogs.7z": b"x"})
    (tmp_path / "folder").mkdir()
    make_zip(tmp_path / "nothing.zip", {})
    for spec, message in {
        str(tmp_path / "missing"): r"SOURCE .* does not exist; give a folder",
        str(tmp_path / "dogs.7z"): r"SOURCE .* is not of a known kind; give a folder, a \.zip",
        str(tmp_path / "folder"): r"SOURCE .* is empty",
        str(tmp_path / "nothing.zip"): r"SOURCE .* is empty",
        "drawn:0": "as in drawn:5000:0",
        "drawn:x": "as in drawn:5000:0",
        "drawn:5:-1": "as in drawn:5000:0",
        "drawn:": "as in drawn:5000:0",
        "portraits:x": "as in portraits:5000:0",
        "/dev/null": "is not of a known kind",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(spec)


# --- bounding boxes


LAYOUT = {
    "all-dogs/n1_1.jpg": b"one",
    "all-dogs/n1_2.jpg": b"two",
    "all-dogs/n2_9.jpg": b"bare",
    "Annotation/n1-Chihuahua/n1_1": xml((1, 2, 30, 40)),
    "Annotation/n1-Chihuahua/n1_2": xml((1, 2, 3, 4), (5.4, 6, 7, 8)),
    "Annotation/README.txt": b"x",
    "Annotation/n1-Chihuahua/picture.jpg": b"never a photo",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("spelling", ["Annotation", "annotation", "deep/ANNOTATIONS"])
def test_photos_get_the_boxes_of_their_annotations(tmp_path: Path, kind: str, spelling: str) -> None:
    files = {name.replace("Annotation", spelling): data for name, data in LAYOUT.items()}
    path = tmp_path / f"dogs.{kind}"
    {"folder": tree, "zip": make_zip, "tar": make_tar}[kind](path, files)
    found, rejected = read(path, "box")
    assert {path: p.boxes for path, p in found.items()} == {
        "all-dogs/n1_1.jpg": ((1, 2, 30, 40),),
        "all-dogs/n1_2.jpg": ((1, 2, 3, 4), (5, 6, 7, 8)),
    }
    assert rejected == {"all-dogs/n2_9.jpg": "no bounding box"}
    found, rejected = read(path)
    assert {p.boxes for p in found.values()} == {()}
    assert (len(found), rejected) == (3, {})


def test_annotations_of_the_same_name_are_matched_by_breed(tmp_path: Path) -> None:
    tree(tmp_path, {f"Images/{breed}/1.jpg": b"x" for breed in "ab"})
    tree(tmp_path, {f"Annotation/{breed}/1.xml": xml((0, 0, i, i)) for i, breed in enumerate("ab", 5)})
    assert [p.boxes for p in read(tmp_path, "box")[0].values()] == [((0, 0, 5, 5),), ((0, 0, 6, 6),)]


def test_photo_with_a_bad_annotation_is_rejected(tmp_path: Path) -> None:
    lol = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY l0 "lol">{lol}]><l>&l11;</l>'
    bad = {
        "torn": xml((1, 2, 3, 4))[:60],
        "number": xml(("x", 0, 1, 1)),
        "infinite": xml(("1e999", 0, 1, 1)),
        "none": xml(),
        "bomb": bomb.encode(),
        "bomb16": bomb.replace('"1.0"', '"1.0" encoding="utf-16"').encode("utf-16"),
        "coded": b'<?xml version="1.0" encoding="klingon"?><a/>',
        "large": b" " * (2**20 + 1),
        "hollow": b"",
    }
    tree(tmp_path, dict.fromkeys([f"{name}.jpg" for name in bad], b"x"))
    tree(tmp_path / "annotation", {f"{name}.xml": text for name, text in bad.items()})
    started = time.monotonic()
    found, rejected = read(tmp_path, "box")
    assert time.monotonic() - started < 2
    assert (list(found), len(rejected)) == ([], len(bad))
    assert all(reason.startswith("bad annotation annotation/") for reason in rejected.values())
    assert "declares entities" in rejected["bomb.jpg"]


def test_crop_box_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--crop box: .* use --crop center"):
        read(tree(tmp_path, {"a.jpg": b"x"}), "box")
    with pytest.raises(UsageError, match="--crop box"):
        open_source("drawn:5", "box")


# --- Oxford-IIIT Pet and drawn dogs


def test_oxford_pets_gives_its_dogs_without_a_download_if_it_is_there(tmp_path: Path) -> None:
    tree(
        tmp_path / "oxford-iiit-pet",
        {
            "images/beagle_1.jpg": b"dog",
            "images/great_pyrenees_2.jpg": b"dog2",
            "images/Abyssinian_1.jpg": b"cat",
            "images/Abyssinian_1.mat": b"x",
            "annotations/trainval.txt": b"beagle_1 5 2 1\n",
            "annotations/test.txt": b"Abyssinian_1 1 1 1\n",
            "annotations/trimaps/beagle_1.png": b"mask",
            "annotations/xmls/beagle_1.xml": xml((1, 1, 9, 9)),
            "images.tar.gz": b"x",
        },
    )
    found, rejected = read(f"oxford-pets:{tmp_path}")
    assert (list(found), rejected) == (["images/beagle_1.jpg", "images/great_pyrenees_2.jpg"], {})
    found, rejected = read(f"oxford-pets:{tmp_path}", "box")
    assert found["images/beagle_1.jpg"].boxes == ((1, 1, 9, 9),)
    assert rejected == {"images/great_pyrenees_2.jpg": "no bounding box"}


@pytest.mark.slow
@pytest.mark.usefixtures("no_internet")
def test_oxford_pets_without_internet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"oxford-pets cannot be downloaded .* check the internet connection"):
        open_source(f"oxford-pets:{tmp_path}")


@pytest.mark.parametrize("kind", ["drawn", "portraits"])
def test_drawn_dogs_are_drawn_only_when_they_are_decoded(kind: str) -> None:
    source = open_source(f"{kind}:3:7")
    assert [p.data for p in source if isinstance(p, Photo)] == [Drawing(i, 7, kind) for i in range(3)]
    assert source.signature() == open_source(f"{kind}:3:7").signature() != open_source(f"{kind}:3").signature()
    assert Drawing(1, 7, kind).draw(32) == draw(1, 7, 32, posed=kind == "portraits")
    assert open_source("portraits:3:7").signature() != open_source("drawn:3:7").signature()


def test_progress_grows_towards_1(tmp_path: Path) -> None:
    members = {f"{i}.jpg": os.urandom(20_000) for i in range(10)}
    for path in (
        tree(tmp_path / "f", members),
        make_zip(tmp_path / "d.zip", members),
        make_tar(tmp_path / "d.tar", members),
    ):
        source = open_source(str(path))
        source.signature()
        progress = [source.progress for _ in source]
        assert progress == sorted(progress)
        assert 0 <= progress[0] < 0.3
        assert 0.7 < progress[-1] <= 1


def test_opening_a_source_imports_neither_ray_nor_torch_nor_pillow() -> None:
    code = "import sys, dogvae.data.source; sys.exit(bool({'ray', 'torch', 'torchvision', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

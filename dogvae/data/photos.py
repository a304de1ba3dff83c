"""What a source gives: photos as they are stored, and what is rejected. Knows no Ray, no torch; decodes nothing."""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from dogvae.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Boxes = tuple[Box, ...]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp"}
MAX_BYTES = 256 * 2**20  # of one photo; more is not a photo, and an archive can declare any size
MAX_HEADER_BYTES = 2**20  # of one annotation, or of one long name in a tar

# What reading a damaged file or archive raises: all the ways of zipfile, tarfile and their decompressors.
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)
READ_ERRORS += (lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
ANNOTATION_ERRORS: tuple[type[Exception], ...] = (*READ_ERRORS, ElementTree.ParseError, ArithmeticError, LookupError)


@dataclass(frozen=True)
class Drawing:
    """A drawn dog before it is drawn: drawing costs a CPU, so the workers do it."""

    index: int
    seed: int
    kind: str = "drawn"  # or "portraits"

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}:{self.seed}"

    def draw(self, size: int) -> Image.Image:
        """The picture, RGB, `size` x `size` pixels."""
        from dogvae.data.drawn import draw

        return draw(self.index, self.seed, size, posed=self.kind == "portraits")


@dataclass(frozen=True)
class Photo:
    """`path` is relative to the source, with `/`; `data` is the file as it is; `crop="box"` fills in `boxes`."""

    path: str
    data: bytes | Drawing
    boxes: Boxes = ()


@dataclass(frozen=True)
class Rejected:
    """Something in the source that gives no photo, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A regular file in a source. `read` returns at most `MAX_BYTES`, or one more where there is more."""

    path: str
    size: int
    read: Callable[[], bytes]
    mtime_ns: int = 0


@dataclass(frozen=True)
class Unread:
    """A photo that is still to be read, by whoever decodes it."""

    entry: Entry
    boxes: Boxes = ()

    @property
    def path(self) -> str:
        """As the photo's."""
        return self.entry.path

    def read(self) -> Photo | Rejected:
        """It, or why it cannot be read."""
        try:
            return Photo(self.entry.path, _read(self.entry, MAX_BYTES), self.boxes)
        except READ_ERRORS as error:
            return Rejected(self.entry.path, why(error))


class Source:
    """Iterate for `Photo | Rejected`. `share` (0 to 1) is how much of it the iteration has handed out so far.

    Once `unread` is set, by someone who can read the source's files in other processes too, a folder gives `Unread`.
    """

    kind: str
    name: str
    share: float = 0.0
    unread: bool = False

    def signature(self) -> str:
        """A cheap fingerprint: changes with the listing, sizes or times of the source; reads no photo."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Photo | Unread | Rejected]:
        raise NotImplementedError


class FileSource(Source):
    """What a folder and an archive share: which files are photos, and which bounding boxes belong to them."""

    apart = False  # whether each photo is a file of its own

    def __init__(self, path: str, crop: str) -> None:
        self.name, self._path, self._crop = os.path.abspath(path), path, crop

    def entries(self) -> Iterator[Entry | Rejected]:
        """Every file, links followed, but those that no one means: hidden ones and a file manager's traces."""
        raise NotImplementedError

    def signature(self) -> str:
        status = os.stat(self._path)
        text = f"{os.path.basename(self.name)}\0{status.st_size}\0{status.st_mtime_ns}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def __iter__(self) -> Iterator[Photo | Unread | Rejected]:
        boxes = self._boxes() if self._crop == "box" else None
        for entry in self.entries():
            if isinstance(entry, Rejected):
                yield entry
            elif not _is_annotation(entry.path):
                photo = self._photo(entry, boxes)
                yield photo if isinstance(photo, Rejected) or (self.unread and self.apart) else photo.read()

    def _photo(self, entry: Entry, boxes: dict[str, dict[str, Boxes | str]] | None) -> Unread | Rejected:
        path = PurePosixPath(entry.path)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return Rejected(entry.path, f"suffix {path.suffix!r} is not an image's")
        found: Boxes | str = ()
        if boxes is not None:
            candidates = boxes.get(path.stem, {})
            # By breed where that decides it: `Images/BREED/x.jpg` has `Annotation/BREED/x`, `all-dogs/x.jpg` has not.
            only = next(iter(candidates.values())) if len(candidates) == 1 else "no bounding box"
            found = candidates.get(path.parent.name, only)
        if isinstance(found, str):
            return Rejected(entry.path, found)
        return Unread(entry, found)

    def _boxes(self) -> dict[str, dict[str, Boxes | str]]:
        """name without suffix -> folder's name -> boxes, or the reason why there are none."""
        boxes: dict[str, dict[str, Boxes | str]] = {}
        for entry in self.entries():
            if isinstance(entry, Entry) and _is_annotation(entry.path):
                path = PurePosixPath(entry.path)
                # Stanford's have no suffix, so that `dog.1` is the annotation of `dog.1.jpg`; others' are .xml.
                name = path.stem if path.suffix.lower() == ".xml" else path.name
                if name == path.name and path.suffix[1:].isalpha():
                    continue
                found: Boxes | str
                try:
                    found = _parse_boxes(_read(entry, MAX_HEADER_BYTES))
                except ANNOTATION_ERRORS as error:
                    found = f"bad annotation {entry.path}: {why(error)}"
                boxes.setdefault(name, {})[path.parent.name] = found
        if not boxes:
            raise UsageError(f"--crop box: {self.name} has no Annotation folder with bounding boxes; use --crop center")
        return boxes


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def _is_annotation(path: str) -> bool:
    return any(part.lower() in ("annotation", "annotations") for part in path.split("/")[:-1])


def _read(entry: Entry, limit: int) -> bytes:
    """The bytes of a file or member; ValueError if there are none or more than `limit`."""
    if entry.size > limit or len(data := entry.read()) > limit:
        raise ValueError(f"over {limit // 2**20} MB")
    if not data:
        raise ValueError("empty file")
    return data


def _parse_boxes(xml: bytes) -> Boxes:
    """The `bndbox` elements of a Pascal VOC annotation, as Stanford Dogs has them; ValueError if there is none."""
    if b"<!DOCTYPE" in xml or b"<!ENTITY" in xml:
        raise ValueError("it declares entities")  # which can expand to gigabytes
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        [round(float(box.findtext(side, ""))) for side in sides] for box in ElementTree.fromstring(xml).iter("bndbox")
    ]
    if not boxes:
        raise ValueError("no bounding box")
    return tuple((left, top, right, bottom) for left, top, right, bottom in boxes)


def why(error: BaseException) -> str:
    """One line: what the system says of an OSError without the path, else the message or at least the kind."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())

"""What a source of photos yields: photos as they are stored, and the files that are rejected, with the reason.

Nothing is decoded here, and neither Ray, torch nor Pillow is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING
from xml.etree import ElementTree

from dogvae.errors import UsageError
from dogvae.user_file import MAX_BYTES, read_at_most

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Boxes = tuple[Box, ...]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff"}
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
HEIC_EXTRA = "HEIC is read after: pip install 'dogvae[heic]'"
MAX_HEADER_BYTES = 2**20  # of one annotation, or of one long name in a tar

# Everything that zipfile, tarfile and their decompressors raise on a damaged file.
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error)
READ_ERRORS += (lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, ArithmeticError, LookupError)
ANNOTATION_ERRORS: tuple[type[Exception], ...] = (*READ_ERRORS, ElementTree.ParseError)


@dataclass(frozen=True)
class Drawing:
    """A cartoon dog that is not drawn yet: drawing takes CPU time, so the Ray tasks do it."""

    index: int
    seed: int
    kind: str = "drawn"  # or "portraits"

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}:{self.seed}"

    def draw(self, size: int) -> Image.Image:
        """The image, RGB, `size` x `size` pixels."""
        from dogvae.data.drawn import draw

        return draw(self.index, self.seed, size, posed=self.kind == "portraits")


@dataclass(frozen=True)
class Photo:
    """A photo in memory. `path` is relative to the source, with `/`; `boxes` is filled in only for `crop="box"`."""

    path: str
    data: bytes | Drawing
    """The bytes of the image file, not decoded."""
    boxes: Boxes = ()


@dataclass(frozen=True)
class Rejected:
    """A file of the source that gives no photo, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A regular file in a source. `open` opens it to read its bytes; `size` is what its folder or archive declares."""

    path: str
    size: int
    open: Callable[[], IO[bytes]]
    mtime_ns: int = 0


@dataclass(frozen=True)
class UnreadPhoto:
    """A photo whose bytes are not read yet: the process that decodes it calls `read`."""

    entry: Entry
    boxes: Boxes = ()

    @property
    def path(self) -> str:
        """Relative to the source, as in `Photo`."""
        return self.entry.path

    def read(self) -> Photo | Rejected:
        """The photo, or why it cannot be read."""
        try:
            return Photo(self.entry.path, read_at_most(self.entry.open, self.entry.size, MAX_BYTES), self.boxes)
        except READ_ERRORS as error:
            return Rejected(self.entry.path, reason_of(error))


class Source:
    """A collection of photos: iterate for `Photo | UnreadPhoto | Rejected`, always in the same order.

    `progress` is the share (0 to 1) of the source that the iteration has yielded so far. Set `defer_reading` if other
    processes can read the source's files: a folder then yields `UnreadPhoto` instead of `Photo`.
    """

    kind: str
    name: str
    progress: float = 0.0
    defer_reading: bool = False

    def signature(self) -> str:
        """A hash that changes with the names, sizes and modification times of the files; no photo is read."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Photo | UnreadPhoto | Rejected]:
        raise NotImplementedError


class FileSource(Source):
    """What a folder and an archive share: which files are photos, and which bounding boxes belong to them."""

    separate_files = False  # whether each photo is a file of its own

    def __init__(self, path: str, crop: str) -> None:
        self.name, self._path, self._crop = os.path.abspath(path), path, crop

    def entries(self) -> Iterator[Entry | Rejected]:
        """All files, symlinks followed, except hidden files and what operating systems add (see `is_hidden`)."""
        raise NotImplementedError

    def signature(self) -> str:
        status = os.stat(self._path)
        text = f"{os.path.basename(self.name)}\0{status.st_size}\0{status.st_mtime_ns}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def __iter__(self) -> Iterator[Photo | UnreadPhoto | Rejected]:
        defer = self.defer_reading and self.separate_files
        boxes = self._boxes() if self._crop == "box" else None
        for entry in self.entries():
            if isinstance(entry, Rejected):
                yield entry
            elif not _is_annotation(entry.path):
                photo = self._photo(entry, boxes)
                yield photo if isinstance(photo, Rejected) or defer else photo.read()

    def _photo(self, entry: Entry, boxes: dict[str, dict[str, Boxes | str]] | None) -> UnreadPhoto | Rejected:
        path = PurePosixPath(entry.path)
        suffix = path.suffix.lower()
        if suffix in HEIC_SUFFIXES and not reads_heic():
            return Rejected(entry.path, f"suffix {path.suffix!r}: {HEIC_EXTRA}")
        if suffix == ".jxl":
            return Rejected(entry.path, f"suffix {path.suffix!r}: JPEG XL is not read; convert it to JPEG or PNG")
        if suffix not in IMAGE_SUFFIXES | HEIC_SUFFIXES:
            return Rejected(entry.path, f"suffix {path.suffix!r} is not an image's")
        found: Boxes | str = ()
        if boxes is not None:
            candidates = boxes.get(path.stem, {})
            # `Images/BREED/x.jpg` belongs to `Annotation/BREED/x`. A photo outside a breed's folder, as
            # `all-dogs/x.jpg`, belongs to the only annotation of that name.
            only = next(iter(candidates.values())) if len(candidates) == 1 else "no bounding box"
            found = candidates.get(path.parent.name, only)
        if isinstance(found, str):
            return Rejected(entry.path, found)
        return UnreadPhoto(entry, found)

    def _boxes(self) -> dict[str, dict[str, Boxes | str]]:
        """File name without suffix -> name of the annotation's folder -> boxes, or the reason why there are none."""
        boxes: dict[str, dict[str, Boxes | str]] = {}
        for entry in self.entries():
            if isinstance(entry, Entry) and _is_annotation(entry.path):
                path = PurePosixPath(entry.path)
                # Annotations of Stanford Dogs have no suffix: `dog.1` belongs to `dog.1.jpg`. Others end in .xml.
                name = path.stem if path.suffix.lower() == ".xml" else path.name
                if name == path.name and path.suffix[1:].isalpha():
                    continue
                found: Boxes | str
                try:
                    found = _parse_boxes(read_at_most(entry.open, entry.size, MAX_HEADER_BYTES))
                except ANNOTATION_ERRORS as error:
                    found = f"bad annotation {entry.path}: {reason_of(error)}"
                boxes.setdefault(name, {})[path.parent.name] = found
        if not boxes:
            raise UsageError(f"--crop box: {self.name} has no Annotation folder with bounding boxes; use --crop center")
        return boxes


@lru_cache(maxsize=1)
def reads_heic() -> bool:
    """Whether the extra `heic` is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was added by macOS or Windows."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def _is_annotation(path: str) -> bool:
    return any(part.lower() in ("annotation", "annotations") for part in path.split("/")[:-1])


def _parse_boxes(xml: bytes) -> Boxes:
    """The `bndbox` elements of a Pascal VOC annotation, the format of Stanford Dogs; ValueError if there is none."""
    if b"<!DOCTYPE" in xml or b"<!ENTITY" in xml:
        raise ValueError("it declares entities")  # which can expand to gigabytes
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        [round(float(box.findtext(side, ""))) for side in sides] for box in ElementTree.fromstring(xml).iter("bndbox")
    ]
    if not boxes:
        raise ValueError("no bounding box")
    return tuple((left, top, right, bottom) for left, top, right, bottom in boxes)


def reason_of(error: BaseException) -> str:
    """The error in one line. An OSError's path is left out; an error without a message gives its type."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())

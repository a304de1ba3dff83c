"""Where photos come from: a folder, an archive, Oxford-IIIT Pet, or drawn dogs.

`open_source(spec)` gives a `Source`; iterating over it yields every photo as a `Photo` and everything else as a
`Rejected` with the reason, always in the same order: sorted by path, or as stored for a tar, which only streams.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from functools import partial

from dogvae.data.archives import Tar, Zip
from dogvae.data.photos import MAX_BYTES, Box, Drawing, Entry, FileSource, Photo, Rejected, Source, is_hidden, why
from dogvae.errors import UsageError
from dogvae.storage import cache_folder

__all__ = ["Box", "Drawing", "Photo", "Rejected", "Source", "open_source"]

DRAWN_KINDS = ("drawn", "portraits")
ACCEPTED = (
    "a folder, a .zip, .tar, .tar.gz or .tgz, oxford-pets[:FOLDER], drawn:COUNT[:SEED], or portraits:COUNT[:SEED]"
)


class _Drawn(Source):
    def __init__(self, kind: str, count: int, seed: int) -> None:
        self.kind = kind
        self.name = f"{kind}:{count}:{seed}"
        self._count, self._seed = count, seed

    def signature(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def __iter__(self) -> Iterator[Photo]:
        for index in range(self._count):
            self.share = index / self._count
            drawing = Drawing(index, self._seed, self.kind)
            yield Photo(str(drawing), drawing)


class _Folder(FileSource):
    kind = "folder"
    apart = True
    _count = 0

    def signature(self) -> str:
        digest, self._count = hashlib.sha256(), 0
        for entry in self.entries():
            self._count += 1
            state = entry.reason if isinstance(entry, Rejected) else f"{entry.size}\0{entry.mtime_ns}"
            digest.update(f"{entry.path}\0{state}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def entries(self) -> Iterator[Entry | Rejected]:
        # A folder is read once, by the path that comes first: links can make loops, or more paths than there are files.
        seen: dict[tuple[int, int], str] = {}
        done, todo = 0, [""]
        while todo:
            path = todo.pop()
            where = os.path.join(self.name, path)
            try:
                status = os.stat(where)
                if stat.S_ISDIR(status.st_mode):
                    first = seen.setdefault((status.st_dev, status.st_ino), path)
                    if first != path:
                        yield Rejected(path, f"a folder that is already read as {first or 'the source itself'}: a link")
                        continue
                    names = sorted((name for name in os.listdir(where) if not is_hidden(name)), reverse=True)
                    todo += [f"{path}/{name}" if path else name for name in names]
                    continue
            except OSError as error:
                if not path:
                    raise UsageError(f"SOURCE {self.name} cannot be read: {why(error)}") from error
                yield Rejected(path, why(error))
                continue
            if not self._wanted(path):
                continue
            self.share = done / self._count if self._count else 0.0
            done += 1
            if stat.S_ISREG(status.st_mode):
                yield Entry(path, status.st_size, partial(_read_file, where), status.st_mtime_ns)
            else:
                yield Rejected(path, "not a regular file")

    def _wanted(self, path: str) -> bool:
        return True


class _Pets(_Folder):
    """Oxford-IIIT Pet as torchvision lays it out. Its cats' file names start with a capital, its dogs' do not."""

    kind = "oxford-pets"

    def _wanted(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return folder == "annotations/xmls" or (folder == "images" and name[:1].islower())


def open_source(spec: str, crop: str = "center") -> Source:
    """Open what SOURCE names. Raises `UsageError` if it is not there, not one of the accepted kinds, or empty."""
    kind, _, rest = spec.partition(":")
    source: FileSource
    if ":" in spec and kind in DRAWN_KINDS:
        return _open_drawn(kind, rest, crop)
    if kind == "oxford-pets":
        source = _open_pets(os.path.expanduser(rest) or str(cache_folder() / "oxford-pets"), crop)
    elif os.path.isdir(spec):
        source = _Folder(spec, crop)
    elif not os.path.exists(spec):
        raise UsageError(f"SOURCE {spec!r} does not exist; give {ACCEPTED}")
    elif os.path.isfile(spec) and spec.lower().endswith(".zip"):
        source = Zip(spec, crop)
    elif os.path.isfile(spec) and spec.lower().endswith((".tar", ".tar.gz", ".tgz")):
        source = Tar(spec, crop)
    else:
        raise UsageError(f"SOURCE {spec!r} is not of a known kind; give {ACCEPTED}")
    if next(source.entries(), None) is None:
        raise UsageError(f"SOURCE {spec!r} is empty; give {ACCEPTED}, with photos in it")
    return source


def _open_drawn(kind: str, rest: str, crop: str) -> Source:
    count, _, seed = rest.partition(":")
    if not (count.isdecimal() and int(count) and (seed or "0").isdecimal()):
        raise UsageError(f"SOURCE '{kind}:{rest}' is not {kind}:COUNT or {kind}:COUNT:SEED, as in {kind}:5000:0")
    if crop == "box":
        raise UsageError("--crop box needs annotations, and drawn dogs have none; use --crop center")
    return _Drawn(kind, int(count), int(seed or 0))


def _open_pets(folder: str, crop: str) -> FileSource:
    base = os.path.join(folder, "oxford-iiit-pet")
    if not os.path.isfile(os.path.join(base, "annotations", "trainval.txt")):
        from torchvision.datasets import OxfordIIITPet

        try:
            OxfordIIITPet(folder, download=True)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise UsageError(
                f"SOURCE oxford-pets cannot be downloaded ({why(error)}): check the internet connection, or put"
                f" images.tar.gz and annotations.tar.gz of Oxford-IIIT Pet, unpacked, into {base}"
            ) from error
    return _Pets(base, crop)


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)

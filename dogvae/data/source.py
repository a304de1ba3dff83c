"""What SOURCE and `--data` may name: a folder, an archive, Oxford-IIIT Pet, or drawn dogs.

`open_source(spec)` returns a `Source`. Iterating over it yields each photo as a `Photo`, and each other file as a
`Rejected` with the reason. The order is always the same: sorted by path, or as stored for a tar, which only streams.
(`--data` may also name a prepared dataset: see `find.py`.)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from dogvae.data.archives import Tar, Zip
from dogvae.data.folders import Folder, open_oxford_pets
from dogvae.data.photos import Drawing, FileSource, Photo, Source
from dogvae.errors import UsageError
from dogvae.storage import cache_folder

DRAWN_KINDS = ("drawn", "portraits")
ACCEPTED = (
    "a folder, a .zip, .tar, .tar.gz or .tgz, oxford-pets[:FOLDER], drawn:COUNT[:SEED], or portraits:COUNT[:SEED]"
)


def open_source(spec: str, crop: str = "center") -> Source:
    """Open the source that `spec` names; for `crop="box"` its photos come with bounding boxes.

    Raises UsageError if it does not exist, is not one of the accepted kinds, or is empty.
    """
    spec = os.path.expanduser(spec)
    kind, _, rest = spec.partition(":")
    source: FileSource
    if ":" in spec and kind in DRAWN_KINDS:
        return _open_drawn(kind, rest, crop)
    if kind == "oxford-pets":
        source = open_oxford_pets(os.path.expanduser(rest) or str(cache_folder() / "oxford-pets"), crop)
    elif os.path.isdir(spec):
        source = Folder(spec, crop)
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


class DrawnDogs(Source):
    """`count` cartoon dogs that the program draws itself; `kind` is "drawn" or "portraits"."""

    def __init__(self, kind: str, count: int, seed: int) -> None:
        self.kind = kind
        self.name = f"{kind}:{count}:{seed}"
        self._count, self._seed = count, seed

    def signature(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def __iter__(self) -> Iterator[Photo]:
        for index in range(self._count):
            self.progress = index / self._count
            drawing = Drawing(index, self._seed, self.kind)
            yield Photo(str(drawing), drawing)


def _open_drawn(kind: str, rest: str, crop: str) -> Source:
    count, _, seed = rest.partition(":")
    if not (count.isdecimal() and int(count) and (seed or "0").isdecimal()):
        raise UsageError(f"SOURCE '{kind}:{rest}' is not {kind}:COUNT or {kind}:COUNT:SEED, as in {kind}:5000:0")
    if crop == "box":
        raise UsageError("--crop box needs annotations, and drawn dogs have none; use --crop center")
    return DrawnDogs(kind, int(count), int(seed or 0))

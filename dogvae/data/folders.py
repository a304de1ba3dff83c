"""Photos in a folder, nested or flat, and Oxford-IIIT Pet, which is a folder too."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from functools import partial

from dogvae.data.photos import HEIC_SUFFIXES, Entry, FileSource, Rejected, is_hidden, reads_heic, reason_of
from dogvae.errors import UsageError
from dogvae.user_file import open_file, refusal


class Folder(FileSource):
    """All photos below a folder, symlinks followed."""

    kind = "folder"
    separate_files = True
    _count = 0

    def signature(self) -> str:
        digest, self._count = hashlib.sha256(), 0
        for entry in self.entries():
            self._count += 1
            state = entry.reason if isinstance(entry, Rejected) else f"{entry.size}\0{entry.mtime_ns}"
            if entry.path.lower().endswith(tuple(HEIC_SUFFIXES)) and reads_heic():
                state += "\0heic"  # to prepare the folder again once the extra is installed
            digest.update(f"{entry.path}\0{state}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def entries(self) -> Iterator[Entry | Rejected]:
        # Symlinks can make loops, or more paths than there are files: each folder is read once, by its first path.
        seen: dict[tuple[int, int], str] = {}
        done, todo = 0, [""]
        while todo:
            path = todo.pop()
            where = os.path.join(self.name, path)
            try:
                status = os.stat(where)
                if reason := refusal(status):
                    if self._is_wanted(path):
                        yield Rejected(path, reason)
                    continue
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
                    raise UsageError(f"SOURCE {self.name} cannot be read: {reason_of(error)}") from error
                yield Rejected(path, reason_of(error))
                continue
            if not self._is_wanted(path):
                continue
            self.progress = done / self._count if self._count else 0.0
            done += 1
            yield Entry(path, status.st_size, partial(open_file, where), status.st_mtime_ns)

    def _is_wanted(self, path: str) -> bool:
        return True


class OxfordPets(Folder):
    """The dogs of Oxford-IIIT Pet, in torchvision's folder layout. Only its cats' file names start with a capital."""

    kind = "oxford-pets"

    def _is_wanted(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return folder == "annotations/xmls" or (folder == "images" and name[:1].islower())


def open_oxford_pets(folder: str, crop: str) -> OxfordPets:
    """Oxford-IIIT Pet in `folder`, downloaded with torchvision if missing; UsageError if the download fails."""
    base = os.path.join(folder, "oxford-iiit-pet")
    if not os.path.isfile(os.path.join(base, "annotations", "trainval.txt")):
        from torchvision.datasets import OxfordIIITPet

        try:
            OxfordIIITPet(folder, download=True)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise UsageError(
                f"SOURCE oxford-pets cannot be downloaded ({reason_of(error)}): check the internet connection, or put"
                f" images.tar.gz and annotations.tar.gz of Oxford-IIIT Pet, unpacked, into {base}"
            ) from error
    return OxfordPets(base, crop)

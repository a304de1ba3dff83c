"""Photos in a .zip, .tar or .tar.gz: streamed, never unpacked to the disk."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PureWindowsPath
from typing import IO, Any, TypeVar

from dogvae.data.photos import MAX_HEADER_BYTES, READ_ERRORS, Entry, FileSource, Rejected, is_hidden, reason_of
from dogvae.errors import UsageError
from dogvae.user_file import open_file

_Opened = TypeVar("_Opened")


class Zip(FileSource):
    kind = "zip"

    def entries(self) -> Iterator[Entry | Rejected]:
        with (
            _opened(self.name, partial(open_file, self._path)) as raw,
            _opened(self.name, partial(zipfile.ZipFile, raw)) as archive,
        ):
            members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
            for index, member in enumerate(members):
                self.progress = index / len(members)
                kind = stat.S_IFMT(member.external_attr >> 16)
                reason = "encrypted" if member.flag_bits & 1 else None
                if kind not in (0, stat.S_IFREG):
                    reason = "a link" if kind == stat.S_IFLNK else "not a regular file"
                yield from _member(member.filename, member.file_size, reason, partial(archive.open, member))


# The kinds of header that tarfile reads into memory whole, however large they claim to be.
_READ_WHOLE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _StrictHeader(tarfile.TarInfo):
    """Raises ReadError for a damaged header, which tarfile takes for the end, and for an extended one over 1 MB."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"truncated or damaged ({error})") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        header = super().frombuf(buf, encoding, errors)
        if header.size > MAX_HEADER_BYTES and header.type in _READ_WHOLE:
            raise tarfile.ReadError("an extended header of over 1 MB")
        return header


class _Stream:
    """A tar's bytes. Raises ReadError where tarfile reads on behind the end, as it does for a length that is not there.

    tarfile skips a member by reading to its declared end, block by block: behind the end that is an endless loop.
    """

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file, self._ended = file, False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if not data and self._ended:
            raise tarfile.ReadError("it is shorter than a length that one of its headers declares")
        self._ended = not data  # the first time it may be the end of an archive without an end mark
        return data


class Tar(FileSource):
    kind = "tar"

    def entries(self) -> Iterator[Entry | Rejected]:
        with _opened(self.name, partial(open_file, self._path)) as raw:
            total = max(1, os.fstat(raw.fileno()).st_size)
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Stream(gzip.GzipFile(fileobj=raw) if is_gzip else raw)
            reader = partial(tarfile.open, fileobj=stream, mode="r|", tarinfo=_StrictHeader)
            with _opened(self.name, reader) as archive:
                try:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all
                        self.progress = raw.tell() / total
                        if member.isdir():
                            continue
                        reason = "a link" if member.issym() or member.islnk() else "not a regular file"
                        opener = partial(_open_member, archive, member)
                        yield from _member(member.name, member.size, None if member.isreg() else reason, opener)
                except READ_ERRORS as error:
                    reason = f"the rest of the archive was not read: {reason_of(error)}"
                    yield Rejected(os.path.basename(self.name), reason)


def _opened(name: str, opener: Callable[[], _Opened]) -> _Opened:
    try:
        return opener()
    except READ_ERRORS as error:
        raise UsageError(f"SOURCE {name} cannot be opened: {reason_of(error)}") from error


def _member(name: str, size: int, reason: str | None, opener: Callable[[], IO[bytes]]) -> Iterator[Entry | Rejected]:
    """One entry for a member, or none if it is hidden. `name` is not to be trusted: it may lead anywhere."""
    path = PureWindowsPath(name)  # splits at both kinds of slashes, and knows drives
    if path.anchor or ".." in path.parts:
        yield Rejected(name, "would land outside the folder that the archive is unpacked into")
    elif not any(is_hidden(part) for part in path.parts):
        yield Rejected(path.as_posix(), reason) if reason else Entry(path.as_posix(), size, opener)


def _open_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file, "only regular members are read"
    return file
